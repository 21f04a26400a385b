"""An SAE as any format may hold it, in this project's own words; and how its files are read.

Legend: D inputs, M latents.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ..errors import InputError

WEIGHTS = ("W_enc", "W_dec", "b_dec")  # and b_enc, where latents have a bias


@dataclass(frozen=True)
class SavedSAE:
    """What an SAE computes, and what else its files say.

        x̃ = (x − μ) / (σ + 1e-5) with `standardize`, else x
        x̂ = (Σ ReLU(TopK(W_enc (x̃ − b_dec) + b_enc)) · W_dec rows + b_dec), de-standardized

    Raises InputError if the weights do not fit one another, or k not them.
    """

    weights: dict[str, Tensor]
    """W_enc (M, D), W_dec (M, D), b_dec (D,) and, where latents have a bias, b_enc (M,); in the
    dtype of the files."""
    k: int
    """Active latents a token."""
    standardize: bool
    """Whether each vector is standardized before encoding."""
    layers: tuple[int, ...] = ()
    """The transformer's layers it was trained on; empty where the files do not say."""
    model: str = ""
    """The transformer's name; empty where the files do not say."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else is told, as JSON has it: settings of the training; another format's own fields,
    under that format's name."""
    carried: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that no output depends on, such as counters of dead latents: "format.name"."""

    def __post_init__(self) -> None:
        missing = [name for name in WEIGHTS if name not in self.weights]
        if missing:
            raise InputError(f"an SAE must have the weights {', '.join(missing)}, and has not")
        W_enc = self.weights["W_enc"]
        M, D = W_enc.shape if W_enc.ndim == 2 else (-1, -1)
        shapes = {"W_enc": (M, D), "W_dec": (M, D), "b_dec": (D,), "b_enc": (M,)}
        for name, weight in self.weights.items():
            if tuple(weight.shape) != shapes[name]:
                raise InputError(
                    f"{name} must have the shape {shapes[name]} beside W_enc, "
                    f"got {tuple(weight.shape)}"
                )
            if not weight.is_floating_point():
                raise InputError(f"{name} must be floating-point, got {weight.dtype}")
        if not isinstance(self.k, int) or not 1 <= self.k <= M:
            raise InputError(f"k must be in [1, {M}] (the number of latents), got {self.k}")

    @property
    def d_in(self) -> int:
        """D, the width of the inputs."""
        return self.weights["W_enc"].shape[1]

    @property
    def n_latents(self) -> int:
        """M, the number of latents."""
        return self.weights["W_enc"].shape[0]

    def b_enc(self) -> Tensor:
        """The latents' bias (M,); zeros where there is none, for formats that always have one."""
        W_enc = self.weights["W_enc"]
        return self.weights.get("b_enc", torch.zeros_like(W_enc[:, 0]))

    def needs_plain_inputs(self, to: str) -> None:
        """Raise InputError if the SAE standardizes its inputs, which format `to` cannot say."""
        if self.standardize:
            raise InputError(
                f"--to {to} must not be given for an SAE that standardizes each vector, since that "
                "format has no word for it and its outputs would differ; give --to saelens, "
                "openai, released or mlsae"
            )

    def needs_no_latent_bias(self, to: str) -> None:
        """Raise InputError if latents have a bias other than 0, which `to` cannot say."""
        if self.b_enc().any():
            raise InputError(
                f"--to {to} must not be given for an SAE whose latents have a bias (b_enc), since "
                "that format has none; give another --to"
            )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError if there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be a readable JSON file: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names begin with `prefix`, by the names' rest.
    Raises InputError if it cannot be read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} must be a readable safetensors file: {error}") from error


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a file of torch.save, with `weights_only`: tensors, numbers and strings
    are read, code is not run. Raises InputError if it cannot be read so."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it finds: many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path} must be a file of torch.save that holds tensors only, since unpickling "
            f"anything else runs its code: {reason}"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold a dictionary, got {type(found).__name__}")
    return found


def take(tensors: dict[str, Any], names: dict[str, str], path: Path) -> dict[str, Tensor]:
    """The weights of a file, renamed: `names` has ours for theirs. Raises InputError if one is
    missing or the file has more."""
    missing, extra = names.keys() - tensors.keys(), tensors.keys() - names.keys()
    if missing or extra:
        told = [
            f"{what} {', '.join(sorted(some))}"
            for what, some in (("lacks", missing), ("also has", extra))
            if some
        ]
        raise InputError(
            f"{path} must have {', '.join(names)} and nothing else, and {' and '.join(told)}"
        )
    return {ours: tensors[theirs] for theirs, ours in names.items()}


def refuse(path: Path, name: str, rule: str, value: object, way_out: str) -> InputError:
    """The error of a setting in a peer's files that has no counterpart here."""
    return InputError(f"{name} in {path} must be {rule}, got {value!r}; {way_out}")
