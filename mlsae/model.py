"""The multi-layer SAE: one TopK SAE on the residual stream of every layer.

Legend: L layers, N tokens, D inputs, M latents, K active latents per token; "…" any leading shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from sparse_topk import SAEOutput, SparseTopKSAE, TopK

from . import formats
from .basis import Carried, Layers, Lens, carry
from .batchtopk import BatchTopKSAE
from .distributed import ALONE, Group
from .errors import InputError
from .formats import SavedSAE
from .formats.saved import THRESHOLD
from .hub import HubFiles
from .jumprelu import JumpReLUSAE
from .sharding import ShardedSAE

SIGMA_EPS = 1e-5
ACTIVE = 1e-3  # a latent counts as active above this (arXiv 2409.04185, App. A)


@dataclass(frozen=True)
class MLSAEConfig:
    """What an MLSAE is, apart from its weights: the keys of `config.json` that loading needs."""

    d_in: int
    """Width of the residual stream (D)."""
    n_latents: int
    """Latents of the SAE (M)."""
    k: int
    """Active latents per token and layer (K); with batchtopk, their mean."""
    layers: tuple[int, ...]
    """The transformer's layers it was trained on, in the order of its inputs; empty if a loaded
    file does not say."""
    standardize: bool = True
    """Whether each vector is standardized before encoding."""
    model: str = ""
    """The transformer's name on the hub, or its folder; empty if a loaded file does not say."""
    bias: bool = False
    """Whether latents have a bias, `b_enc`. The paper's have none."""
    k_max: int | None = None
    """The most latents active per token and layer, with batchtopk and jumprelu; None with topk."""
    activation: str = ""
    """Its name: "topk", "batchtopk" or "jumprelu"; if empty the first, or with k_max the second."""

    def __post_init__(self) -> None:
        if not self.activation:
            default = "topk" if self.k_max is None else "batchtopk"
            object.__setattr__(self, "activation", default)


class Standardized(NamedTuple):
    """Residual vectors as the SAE sees them, and what undoes it."""

    x: Tensor
    """(…, D) x̃ = (z − μ) / (σ + 1e-5), float32, or float64 if x is; z = x without a lens."""
    mean: Tensor
    """(…, 1) μ."""
    std: Tensor
    """(…, 1) σ."""
    carried: Carried
    """x and z."""

    def invert(self, y: Tensor) -> Tensor:
        """(…, D) in standardized units → (…, D) in the model's basis: y · σ + μ, carried back."""
        return self.carried.back(y * self.std + self.mean)

    def error(self, y: Tensor) -> Tensor:
        """z − (y · σ + μ): (…, D) in the lens's basis, of a reconstruction y of x̃."""
        return self.carried.z - y * self.std - self.mean


class Reconstruction:
    """What an MLSAE makes of residual vectors x (…, D). Each tensor is computed when it is asked
    for, and is differentiable. x̂ has x's dtype; the errors, being small differences, are in
    float32, or float64 if x is."""

    def __init__(self, x: Tensor, standard: Standardized, output: SAEOutput) -> None:
        self.standard = standard
        self._x, self._output = x, output

    @cached_property
    def x_hat(self) -> Tensor:
        """x̂ (…, D), in the units, the basis and the dtype of x."""
        return self.standard.invert(self._output.x_hat).to(self._x.dtype)

    @cached_property
    def error(self) -> Tensor:
        """x − x̂ (…, D), in the units and the basis of x."""
        return self.standard.carried.change(self.error_in_basis)

    @cached_property
    def error_in_basis(self) -> Tensor:
        """z − ẑ (…, D), in the lens's basis; `error` without a lens."""
        return self.standard.error(self._output.x_hat)

    @property
    def codes(self) -> TopK:
        """The active latents: values and indices, as `MLSAE.encode` gives them."""
        return self._output.codes


class MLSAE(nn.Module, HubFiles):
    """One TopK SAE for the residual vectors of all layers (Lawson et al., arXiv 2409.04185).

        z = x, or with a lens A_ℓ x + b_ℓ at layer ℓ
        μ, σ = mean and unbiased standard deviation of z over its D elements
        x̃ = (z − μ) / (σ + 1e-5)
        h = ReLU(TopK(W_enc (x̃ − b_pre)))        or what exceeds a threshold, see `batchtopk`
        ẑ = (Σ_k h · W_dec rows + b_pre) · σ + μ
        x̂ = ẑ, or with a lens x − A_ℓ⁻¹ (z − ẑ)

    Nothing depends on the layer, but for the lens, if there is one: then the methods need `layers`,
    the layer that x (…, D) is of, or a list of the L layers of x (L, …, D). b_pre is the SAE's
    `b_dec`; there is no latent bias, unless `bias` is on, as in a converted SAE. With
    `standardize=False`, vectors are taken as they are. With `shards`, a group of several processes,
    each process holds some of the latents (see `sharding`).

    `save_pretrained`, `from_pretrained` and `push_to_hub` are those of `hub.HubFiles`.
    """

    about: dict[str, Any]
    """What else `config.json` says: training settings, versions, validation metrics."""

    def __init__(
        self,
        config: MLSAEConfig,
        device: torch.device | str | None = None,
        shards: Group = ALONE.latents,
        lens: Lens | None = None,
    ) -> None:
        super().__init__()
        if lens is not None:
            lens.check_layers(config.layers)
        self.config, self.shards = config, shards
        self.lens = lens
        self.about = {}
        shape = (config.d_in, config.n_latents, config.k)
        self.sae: SparseTopKSAE
        if config.k_max is not None:
            kind = JumpReLUSAE if config.activation == "jumprelu" else BatchTopKSAE
            self.sae = kind(*shape, config.k_max, bias=config.bias, device=device)
        elif shards.size == 1:
            self.sae = SparseTopKSAE(*shape, bias=config.bias, device=device)
        else:
            self.sae = ShardedSAE(*shape, shards, device=device)

    @property
    def threshold(self) -> float | None:
        """What an activation must exceed, with batchtopk; None otherwise."""
        return self.sae.threshold.item() if isinstance(self.sae, BatchTopKSAE) else None

    def carry(self, x: Tensor, layers: Layers | None = None) -> Carried:
        """Residuals x, and z: the same in the basis that the SAE works in; see `basis.carry`."""
        return carry(x, self.lens, layers)

    def standardize(self, x: Tensor, layers: Layers | None = None) -> Standardized:
        """x̃ (…, D) float32, or float64 if x is; μ and σ (…, 1). A constant vector has σ = 0 and
        becomes 0, so x̂ is the constant, exactly. A vector that is not finite becomes NaN, which
        stops training (see `training.loop.raise_if_nonfinite`). Raises ValueError if x is not of a
        floating-point dtype."""
        if not x.is_floating_point():
            raise ValueError(f"x must be of a floating-point dtype, got {x.dtype}")
        carried = self.carry(x, layers)
        z = carried.z
        if not self.config.standardize:
            zeros = torch.zeros_like(z[..., :1])
            return Standardized(z, zeros, torch.ones_like(zeros), carried)
        std, mean = torch.std_mean(z, dim=-1, keepdim=True)
        return Standardized((z - mean) / (std + SIGMA_EPS), mean, std, carried)

    def encode(self, x: Tensor, layers: Layers | None = None) -> TopK:
        """The active latents of residual vectors x (…, D): values and indices (…, K), or (…, k_max)
        with zeros with batchtopk; the values in the parameters' dtype, or autocast's."""
        return self.sae.encode(self.standardize(x, layers).x)

    def reconstruct(self, x: Tensor, layers: Layers | None = None) -> Reconstruction:
        """x̂, x − x̂ and the active latents of residual vectors x (…, D), in one pass."""
        standard = self.standardize(x, layers)
        return Reconstruction(x, standard, self.sae.reconstruct(standard.x))

    def forward(self, x: Tensor, layers: Layers | None = None) -> Tensor:
        """x̂ (…, D), in the units, the basis and the dtype of x."""
        return self.reconstruct(x, layers).x_hat

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, of all shards together. Collective when sharded: every process
        must call it; only rank 0 receives the whole."""
        gather = self.sae.gather_rows
        return {name: gather(p) if p.ndim == 2 else p for name, p in self.sae.state_dict().items()}

    def to_saved(self) -> SavedSAE:
        """What the files of any format are made of. Collective when sharded, as `weights`."""
        config = self.config
        weights = {name: p.detach().cpu() for name, p in self.weights().items()}
        if config.activation == "jumprelu":
            weights[THRESHOLD] = self.sae.get_buffer("threshold").cpu()
        return SavedSAE(
            weights, config.k, config.standardize, config.layers, config.model, self.about,
            k_max=config.k_max, threshold=self.threshold, lens=self.lens,
        )  # fmt: skip

    @classmethod
    def from_saved(
        cls,
        saved: SavedSAE,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = torch.float32,
    ) -> Self:
        """Build an MLSAE from a loaded SAE, in `dtype`; that of the loaded weights if None."""
        config = MLSAEConfig(
            saved.d_in,
            saved.n_latents,
            saved.k,
            saved.layers,
            saved.standardize,
            saved.model,
            "b_enc" in saved.weights,
            saved.k_max,
            saved.activation,
        )
        mlsae = cls(config, device="meta", lens=saved.lens and saved.lens.to(device))
        weights = {name: w.to(device, dtype or w.dtype) for name, w in saved.weights.items()}
        threshold = weights.pop(THRESHOLD, saved.threshold)
        mlsae.sae.load_state_dict(weights, assign=True)
        if threshold is not None:
            mlsae.sae.threshold = torch.as_tensor(threshold, dtype=torch.float32, device=device)
        mlsae.about = dict(saved.about)
        return mlsae.requires_grad_()


def load_sae(
    path: Path | str,
    device: torch.device | str = "cpu",
    *,
    hookpoint: str | None = None,
    k_max: int | None = None,
) -> SparseTopKSAE:
    """The SAE in a folder or file of any of `formats.FORMATS`, or in a repository of the hub (its
    part `hookpoint`, if it has several): ready to use and to train on.

    One with thresholds is a `JumpReLUSAE`, whose codes have room for `k_max` latents; by default
    four times as many as its files say are active in the mean, and 512 at least.

    Raises InputError if it cannot be read, or standardizes its inputs: an MLSAE does that; or if
    k_max is not in [1, M], or is given for another activation.
    """
    saved = formats.read(path, hookpoint)
    if saved.standardize:
        raise InputError(
            f"PATH must hold an SAE that takes its inputs as they are, and that in {path} "
            "standardizes them; load it with MLSAE.from_saved(formats.read(PATH))"
        )
    if k_max is not None and saved.activation != "jumprelu":
        raise InputError(
            f"k_max is for SAEs with thresholds that leave open how many latents are active, got "
            f"{k_max} with {path}, whose activation is {saved.activation}; leave it out"
        )
    if saved.lens is not None:
        raise InputError(
            f"PATH must hold an SAE that takes its inputs as they are, and that in {path} has a "
            "lens; load it with MLSAE.from_saved(formats.read(PATH))"
        )
    if k_max is not None:
        if not 1 <= k_max <= saved.n_latents:
            raise InputError(f"k_max must be in [1, {saved.n_latents}], got {k_max}")
        saved = replace(saved, k_max=k_max, k=min(saved.k, k_max))
    return MLSAE.from_saved(saved, device).sae
