"""A second basis: every layer's residuals carried into the last layer's, by an affine map each.

    z = A_ℓ x + b_ℓ             the lens, at layer ℓ; at the last layer z = x
    x̂ = x − A_ℓ⁻¹ (z − ẑ)       what a reconstruction ẑ of z says of x

An MLSAE that has a lens works on z. `Lens` is the only place that knows a layer's map: residuals
pass it where they enter the MLSAE, and reconstructions and edits where they leave.

Legend: L layers, n maps, D width of the residual stream; "…" any leading shape.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError

Layers = int | Sequence[int]
"""At which layer vectors (…, D) are, or at which L layers those of (L, …, D) are."""

MOST_CONDITION = 1e6
"""A map of a larger condition number loses too many digits of float32 on the way back."""
_POWER_STEPS = 100  # of the iteration for a norm: 1 % of it is enough


class Lens(nn.Module):
    """Affine maps of a transformer's residuals, by layer, and their inverses.

    The inverses are solved for once, in float64, and kept in float32 as the maps are. A map that is
    the identity, as that of the last layer, keeps the bits of what it is given.

    Raises InputError if the tensors do not fit together or are not finite, or if a map's condition
    number exceeds 10⁶.
    """

    matrix: Tensor
    """(n, D, D) A, float32."""
    bias: Tensor
    """(n, D) b."""
    inverse: Tensor
    """(n, D, D) A⁻¹."""

    def __init__(
        self,
        layers: Sequence[int],
        matrix: Tensor,
        bias: Tensor,
        n_layers: int,
        about: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.n_layers = tuple(layers), n_layers
        self.about = dict(about or {})
        """Where it comes from: {"kind", "model", "revision", "fingerprint", …}."""
        _check(self.layers, matrix, bias, n_layers)
        self.register_buffer("matrix", matrix.float())
        self.register_buffer("bias", bias.float())
        self.condition: dict[int, float] = {}
        """The condition number |A|₂ |A⁻¹|₂ of each layer's map."""
        inverses = []
        for layer, map_ in zip(self.layers, self.matrix, strict=True):
            inverse, self.condition[layer] = _inverse(layer, map_.double())
            inverses.append(inverse.float())
        self.register_buffer("inverse", torch.stack(inverses))
        eye = torch.eye(matrix.shape[1], device=matrix.device)
        self._index = {
            layer: i
            for i, layer in enumerate(self.layers)
            if not (torch.equal(self.matrix[i], eye) and not self.bias[i].any())
        }

    @property
    def d_in(self) -> int:
        """D, the width of the residual stream."""
        return self.matrix.shape[1]

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the maps, which tells lenses apart."""
        digest = hashlib.sha256(repr((self.layers, self.n_layers)).encode())
        for tensor in (self.matrix, self.bias):
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise InputError if the lens has no map of one of `layers`."""
        missing = [n for n in layers if n not in self.layers and n != self.n_layers - 1]
        if missing:
            raise InputError(
                f"--lens must have a map of each layer, and has none of "
                f"{' '.join(map(str, missing))}, but of {' '.join(map(str, self.layers))} and the "
                f"identity of {self.n_layers - 1}; give --layers, or another lens"
            )

    def is_identity(self, layer: int) -> bool:
        """Whether the map of `layer` is the identity."""
        return layer not in self._index

    def forward(self, x: Tensor, layers: Layers) -> Tensor:
        """z = A_ℓ x + b_ℓ: x (…, D) at one layer, or (L, …, D), in float32 or float64."""
        return self._each(x, layers, self.matrix, self.bias)

    def turn(self, change: Tensor, layers: Layers) -> Tensor:
        """A_ℓ Δx: by how much z changes where x changes by `change`, of the shape of x."""
        return self._each(change, layers, self.matrix, None)

    def back(self, change: Tensor, layers: Layers) -> Tensor:
        """A_ℓ⁻¹ Δz: by how much x changes where z changes by `change`, of the shape of x."""
        return self._each(change, layers, self.inverse, None)

    def _each(self, x: Tensor, layers: Layers, matrix: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(layers, int):
            return self._one(x, layers, matrix, bias)
        if len(layers) != len(x):
            raise ValueError(
                f"layers must name one layer for each of the {len(x)} in x {tuple(x.shape)}, got "
                f"{' '.join(map(str, layers))}"
            )
        parts = zip(x, layers, strict=True)
        return torch.stack([self._one(part, layer, matrix, bias) for part, layer in parts])

    def _one(self, x: Tensor, layer: int, matrix: Tensor, bias: Tensor | None) -> Tensor:
        i = self._index.get(layer)
        if i is None:
            self.check_layers([layer])
            return x
        with torch.autocast(x.device.type, enabled=False):  # half precision would be most of ẑ − z
            return F.linear(x, matrix[i].to(x), None if bias is None else bias[i].to(x))


class Carried(NamedTuple):
    """Residual vectors, and the same in the basis in which an MLSAE works; equal without a lens."""

    x: Tensor
    """(…, D) as the model has them, float32 or float64."""
    z: Tensor
    """(…, D) as the MLSAE sees them."""
    lens: Lens | None
    layers: Layers

    def back(self, z_hat: Tensor) -> Tensor:
        """x̂ = x − A⁻¹ (z − ẑ), of a reconstruction ẑ (…, D). Written so, a small error z − ẑ loses
        nothing to the rounding of A⁻¹ A, and a perfect ẑ gives x, bit for bit."""
        if self.lens is None:
            return z_hat
        if isinstance(self.layers, int):
            return self._back(self.lens, self.layers, self.x, self.z, z_hat)
        parts = zip(self.layers, self.x, self.z, z_hat, strict=True)
        return torch.stack([self._back(self.lens, *part) for part in parts])

    def change(self, change: Tensor) -> Tensor:
        """A⁻¹ Δz: a change (…, D) of z, as one of x."""
        return change if self.lens is None else self.lens.back(change, self.layers)

    @staticmethod
    def _back(lens: Lens, layer: int, x: Tensor, z: Tensor, z_hat: Tensor) -> Tensor:
        return z_hat if lens.is_identity(layer) else x - lens.back(z - z_hat, layer)


def carry(x: Tensor, lens: Lens | None, layers: Layers | None) -> Carried:
    """Carry residuals x (…, D) at a layer, or (L, …, D) at L layers, into the basis of `lens`; with
    None, they stay. Raises ValueError if there is a lens and `layers` is None."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if lens is None:
        return Carried(x, x, None, ())
    if layers is None:
        raise ValueError(
            "layers must be given to an MLSAE that has a lens, which maps each layer's residuals "
            "by itself: the layer that x (…, D) is of, or a list of L layers for x (L, …, D)"
        )
    return Carried(x, lens(x, layers), lens, layers)


def _check(layers: tuple[int, ...], matrix: Tensor, bias: Tensor, n_layers: int) -> None:
    """Raise InputError unless the tensors are finite and of the shapes of maps of `layers`."""
    n, d_in = len(layers), matrix.shape[-1] if matrix.ndim else 0
    wanted = {"A": (n, d_in, d_in), "b": (n, d_in)}
    for name, tensor in (("A", matrix), ("b", bias)):
        if tuple(tensor.shape) != wanted[name] or not n or not d_in:
            raise InputError(
                f"{name} of a lens must have the shape {wanted[name]}, for its {n} layers, got "
                f"{tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise InputError(f"{name} of a lens must be finite numbers, and some are not")
    if list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= n_layers:
        raise InputError(
            f"the layers of a lens must ascend in [0, {n_layers - 1}], got "
            f"{' '.join(map(str, layers))}"
        )


def _inverse(layer: int, matrix: Tensor) -> tuple[Tensor, float]:
    """A⁻¹ of (D, D) in float64, and the condition number. Raises InputError if that is too
    large."""
    inverse, info = torch.linalg.inv_ex(matrix)
    condition = math.inf if info.item() else _norm(matrix) * _norm(inverse)
    if not condition <= MOST_CONDITION:
        raise InputError(
            f"--lens must have maps that can be inverted, of condition numbers up to "
            f"{MOST_CONDITION:.0e}, and that of layer {layer} has {condition:.1e}; give a lens of "
            "another kind, or one without that layer (`python -m mlsae.lens --layers`)"
        )
    return inverse, condition


def _norm(matrix: Tensor) -> float:
    """|A|₂ of (D, D), by power iteration on AᵀA."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(matrix.shape[1], generator=generator, dtype=torch.float64)
    vector = vector.to(matrix)
    for _ in range(_POWER_STEPS):
        vector = matrix.T @ (matrix @ F.normalize(vector, dim=0))
    return vector.norm().sqrt().item()
