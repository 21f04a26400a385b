"""Load a trained MLSAE, for a measurement or an intervention."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..formats.places import check_residual
from ..model import MLSAE

_TRAINED = {  # the settings of the training that a measurement begins from
    "dataset": str, "column": str, "seq_len": int, "seed": int, "model_dtype": str,
    "model_device_map": str, "model_quantize": str, "dataset_config": str, "dataset_split": str,
    "dataset_revision": str, "heldout_share": float, "max_bad_records": float,
}  # fmt: skip
_CHOICES = {
    "model_dtype": ("auto", "float32", "bfloat16", "float16"),
    "model_quantize": (None, "8bit", "4bit"),
}


def load_run(run: Path, device: torch.device, lens: Path | None) -> MLSAE:
    """Load the MLSAE of `run`, with the lens at `lens` if its own files hold none. Raises
    InputError if it cannot be loaded, is not of the residual stream, or has no lens and needs
    one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is an error here
        mlsae = MLSAE.from_pretrained(run, device, lens=lens).requires_grad_(False)
    check_residual(mlsae.about, f"RUN {run}")
    check_trained(mlsae.about.get("training", {}), run)
    if mlsae.lens is None and mlsae.about.get("released", {}).get("tuned_lens"):
        raise InputError(
            f"--lens must be given for RUN {run}, which was trained on residuals that a tuned lens "
            "had transformed, and does not hold it, got none; give the lens's folder, with "
            "config.json and params.pt"
        )
    return mlsae


def check_trained(trained: Any, run: Path) -> None:
    """Raise InputError if what config.json says of the training is damaged."""
    if not isinstance(trained, dict):
        raise InputError(f"training in {run / 'config.json'} must be an object, got {trained!r}")
    for name, kind in _TRAINED.items():
        value = trained.get(name)
        kinds = (int, float) if kind is float else kind
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise InputError(
                f"training.{name} in {run / 'config.json'} must be of type {kind.__name__}, got "
                f"{value!r}; repair the file"
            )
    for name, choices in _CHOICES.items():
        if trained.get(name, choices[0]) not in choices:
            rule = " or ".join(map(str, choices))
            raise InputError(
                f"training.{name} in {run / 'config.json'} must be {rule}, got "
                f"{trained[name]!r}; repair the file"
            )
