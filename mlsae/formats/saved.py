"""SavedSAE: the content of a saved SAE in any format, by this project's names; and the readers that
the formats share.

Legend: D inputs, M latents.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import safetensors
import torch
from torch import Tensor

from ..basis import Lens
from ..errors import InputError, first_line

WEIGHTS = ("W_enc", "W_dec", "b_dec")  # and b_enc, if latents have a bias
THRESHOLD = "threshold"  # the weight that an SAE of jumprelu has in addition


@dataclass(frozen=True)
class SavedSAE:
    """What an SAE computes, and what else its files record.

        x̃ = (x − μ) / (σ + 1e-5) with `standardize`, else x
        x̂ = Σ ReLU(TopK(W_enc (x̃ − b_dec) + b_enc)) · W_dec rows + b_dec, de-standardized

    With `k_max` and `threshold` (batchtopk), TopK is of the k_max largest, of which those above
    `threshold` stay. With the weight "threshold", θ, (jumprelu), a latent is active where its score
    exceeds θ ≥ 0, and k_max is how many a sparse code has room for.

    Raises InputError if the shapes of the weights do not match, k is not in [1, M], or a setting
    is of the wrong type, as in a damaged file.
    """

    weights: dict[str, Tensor]
    """W_enc (M, D), W_dec (M, D), b_dec (D,), if latents have a bias b_enc (M,), and of jumprelu
    threshold () or (M,); in the files' dtype."""
    k: int
    """Active latents per token; with k_max, their mean; of jumprelu k_max, if no file tells it."""
    standardize: bool
    """Whether each vector is standardized before encoding."""
    layers: tuple[int, ...] = ()
    """The transformer's layers that it was trained on; empty if the files do not say."""
    model: str = ""
    """The transformer's name; empty if the files do not say."""
    about: dict[str, Any] = field(default_factory=dict)
    """Other JSON-serializable settings: those of the training, and the fields of another format
    under that format's name."""
    carried: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that no output depends on, such as counters of dead latents: "format.name"."""
    k_max: int | None = None
    """The most active latents per token, with batchtopk and jumprelu; None with topk."""
    threshold: float | None = None
    """What an activation must exceed, with batchtopk; None otherwise."""
    lens: Lens | None = None
    """What carries each layer's residuals x into the basis that it works in, if that is another."""

    def __post_init__(self) -> None:
        missing = [name for name in WEIGHTS if name not in self.weights]
        extra = [name for name in self.weights if name not in (*WEIGHTS, "b_enc", THRESHOLD)]
        if missing or extra:
            raise InputError(
                f"an SAE must have the weights {', '.join(WEIGHTS)} and b_enc or none, and it "
                f"{_differences(missing, extra)}"
            )
        W_enc = self.weights["W_enc"]
        M, D = W_enc.shape if W_enc.ndim == 2 and W_enc.numel() else (-1, -1)
        shapes = {"W_enc": (M, D), "W_dec": (M, D), "b_dec": (D,), "b_enc": (M,), THRESHOLD: (M,)}
        if M < 1:
            raise InputError(
                f"W_enc must have latents and inputs, (M, D), got {tuple(W_enc.shape)}"
            )
        for name, weight in self.weights.items():
            one_for_all = name == THRESHOLD and weight.ndim == 0
            if tuple(weight.shape) != shapes[name] and not one_for_all:
                raise InputError(
                    f"{name} must have the shape {shapes[name]} to match W_enc, "
                    f"got {tuple(weight.shape)}"
                )
            if not weight.is_floating_point():
                raise InputError(f"{name} must be floating-point, got {weight.dtype}")
        if not is_integer(self.k) or not 1 <= self.k <= M:
            raise InputError(f"k must be in [1, {M}] (the number of latents), got {self.k!r}")
        for name, rule, holds in (
            ("standardize", "true or false", isinstance(self.standardize, bool)),
            ("layers", "integers, 0 or more", all(is_integer(n) and n >= 0 for n in self.layers)),
            ("model", "a name", isinstance(self.model, str)),
        ):
            if not holds:
                raise InputError(f"{name} must be {rule}, got {getattr(self, name)!r}")
        if self.activation != "topk":
            self._check_threshold()
        if self.lens is not None and self.lens.d_in != D:
            raise InputError(f"the lens must be of width {D}, as the SAE, got {self.lens.d_in}")

    @property
    def activation(self) -> str:
        """The activation's name: "topk", "batchtopk" or "jumprelu"."""
        if THRESHOLD in self.weights:
            return "jumprelu"
        return "topk" if self.k_max is None and self.threshold is None else "batchtopk"

    def _check_threshold(self) -> None:
        if not is_integer(self.k_max) or not self.k <= self.k_max <= self.n_latents:
            raise InputError(
                f"k_max must be in [{self.k}, {self.n_latents}] (k to the number of latents), got "
                f"{self.k_max!r}"
            )
        if self.activation == "jumprelu":
            if (self.weights[THRESHOLD] < 0).any():
                raise InputError("threshold must be 0 or more, since ReLU makes 0 of what is less")
            return
        is_number = is_integer(self.threshold) or isinstance(self.threshold, float)
        if not is_number or not 0 <= self.threshold < math.inf:  # type: ignore[operator]
            raise InputError(f"threshold must be a number, 0 or more, got {self.threshold!r}")

    @property
    def d_in(self) -> int:
        """D, the width of the inputs."""
        return self.weights["W_enc"].shape[1]

    @property
    def n_latents(self) -> int:
        """M, the number of latents."""
        return self.weights["W_enc"].shape[0]

    def b_enc(self) -> Tensor:
        """The latents' bias (M,); zeros if they have none, for formats that always store one."""
        W_enc = self.weights["W_enc"]
        return self.weights.get("b_enc", torch.zeros_like(W_enc[:, 0]))

    def settings_of(self, name: str, *inner: str) -> dict[str, Any]:
        """The fields of the format `name`; empty if the SAE was never in it. Raises InputError if
        they, or the `inner` ones, are no objects, as in a damaged file."""
        found = self.about.get(name, {})
        values = {name: found}
        if isinstance(found, dict):
            values |= {key: found.get(key, {}) for key in inner}
        for key, value in values.items():
            if not isinstance(value, dict):
                raise InputError(
                    f"{key} among the settings of the SAE must be an object, got {value!r}"
                )
        return found

    def require_plain_inputs(self, to: str) -> None:
        """Raise InputError if the SAE standardizes its inputs, which format `to` cannot express."""
        if self.standardize:
            raise InputError(
                f"--to {to} must not be given for an SAE that standardizes its inputs, since that "
                "format cannot express it and the outputs would differ; give --to saelens, "
                "openai, released or mlsae"
            )

    def require_topk(self, to: str) -> None:
        """Raise InputError if the SAE has a threshold, which format `to` cannot express."""
        if self.activation == "jumprelu":
            raise InputError(
                f"--to {to} must not be given for an SAE of the activation jumprelu, since that "
                "format keeps the k largest, and the outputs would differ; give --to mlsae or "
                "saelens"
            )
        if self.k_max is not None:
            raise InputError(
                f"--to {to} must not be given for an SAE of --sae.activation batchtopk, since that "
                f"format has no threshold below which the {self.k_max} largest (k_max) are cut, "
                "and the outputs would differ; give --to mlsae"
            )

    def require_no_lens(self, to: str) -> None:
        """Raise InputError if the SAE has a lens, which format `to` cannot express."""
        if self.lens is not None:
            raise InputError(
                f"--to {to} must not be given for an SAE with a lens, since that format has none "
                "and the outputs would differ; give --to mlsae"
            )

    def require_no_latent_bias(self, to: str) -> None:
        """Raise InputError if latents have a bias other than 0, which `to` cannot express."""
        if self.b_enc().any():
            raise InputError(
                f"--to {to} must not be given for an SAE whose latents have a bias (b_enc), since "
                "that format has no such bias; give another --to"
            )


def is_integer(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer; JSON's true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def object_in(content: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """The object `name` in the JSON `content` of `path`; empty if it is null or not there. Raises
    InputError if it is something else."""
    found = content.get(name)
    if found is not None and not isinstance(found, dict):
        raise InputError(f"{name} in {path} must be an object, got {found!r}")
    return found or {}


def layers_in(content: dict[str, Any], path: Path) -> tuple[Any, ...]:
    """The list `layers` in the JSON `content` of `path`; empty if it is null or not there. Raises
    InputError if it is no list."""
    found = content.get("layers")
    if found is not None and not isinstance(found, list):
        raise InputError(f"layers in {path} must be a list of integers, got {found!r}")
    return tuple(found or ())


def check_finite(weights: dict[str, Tensor], path: Path) -> None:
    """Raise InputError if a weight is NaN or infinite: no output would be a number."""
    for name, weight in weights.items():
        if not weight.float().isfinite().all():
            raise InputError(
                f"{name} in {path} must be finite, and some of it is NaN or infinite; give an SAE "
                "from before its training failed"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Raises InputError if there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} must be a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors of a safetensors file whose names begin with `prefix`, which is removed.

    Raises InputError if the file cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} must be a readable safetensors file: {error}") from error


def read_pickle(path: Path) -> dict[str, Any]:
    """Read the dictionary in a file of torch.save, without running code: only tensors, numbers and
    strings are unpickled. Raises InputError if the file holds anything else, or is damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises errors of many types
        raise InputError(
            f"{path} must be a file of torch.save that holds tensors only, since unpickling "
            f"anything else runs code from the file: {first_line(error)}"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a dictionary, got {type(content).__name__}")
    return content


def _differences(missing: Iterable[str], extra: Iterable[str]) -> str:
    named = (("lacks", sorted(map(str, missing))), ("also has", sorted(map(str, extra))))
    return " and ".join(f"{verb} {', '.join(names)}" for verb, names in named if names)


def rename_weights(tensors: dict[str, Any], names: dict[str, str], path: Path) -> dict[str, Tensor]:
    """The tensors of the file `path` by our names; `names` maps the file's names to ours.

    Raises InputError if a tensor is missing, the file has others, or something is no tensor or of
    the wrong number of dimensions.
    """
    missing, extra = names.keys() - tensors.keys(), tensors.keys() - names.keys()
    if missing or extra:
        raise InputError(
            f"{path} must hold {', '.join(names)} and nothing else, and "
            f"{_differences(missing, extra)}"
        )
    for theirs, ours in names.items():
        n_dims = 1 if ours.startswith("b_") else 2
        found = tensors[theirs]
        if not isinstance(found, Tensor) or found.ndim != n_dims:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"{theirs} in {path} must be a tensor of {n_dims} dimension(s), got {got}"
            )
    return {ours: tensors[theirs] for theirs, ours in names.items()}


def unsupported(path: Path, name: str, rule: str, value: object, way_out: str) -> InputError:
    """The error for a setting in another library's files that has no counterpart here."""
    return InputError(f"{name} in {path} must be {rule}, got {value!r}; {way_out}")
