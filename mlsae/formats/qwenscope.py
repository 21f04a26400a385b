"""Qwen-Scope: one file per layer, in repositories such as Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50.

layer12.sae.pt    torch.save of {W_enc (M, D), W_dec (D, M), b_enc (M,), b_dec (D,)}, float32

z = x W_encᵀ + b_enc, without subtracting b_dec, of which the k largest stay; k is only in the name
of the repository, after L0_. Their model card keeps the k largest of either sign, sae-lens ReLU of
them, as here: that differs for a token with fewer than k scores above 0. Layer N is the residual
stream after block N. Checked against sae-lens 6.54.12's reader.

Legend: D inputs, M latents.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError
from .saved import SavedSAE, read_pickle, rename_weights
from .thresholds import center

_FILE = re.compile(r"layer(\d+)\.sae\.pt")
_REPOSITORY = re.compile(r"SAE-Res-(.+?)-W\d+K-L0_(\d+)")
_NAMES = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


def matches(path: Path) -> bool:
    """Whether `path` is a file in this format."""
    return _FILE.fullmatch(path.name) is not None and path.is_file()


def read(path: Path) -> SavedSAE:
    """Read the SAE. Raises InputError if it is damaged, or no folder above it names k."""
    layer = _FILE.fullmatch(path.name)
    named = _REPOSITORY.search(path.absolute().parent.as_posix())
    if layer is None or named is None:
        raise InputError(
            f"{path} must be layerN.sae.pt in a folder named as its repository, since only that "
            "name tells k, such as SAE-Res-Qwen3-8B-Base-W64K-L0_50; rename the folder"
        )
    weights = rename_weights(read_pickle(path), _NAMES, path)
    weights["W_dec"] = weights["W_dec"].T.contiguous()
    return SavedSAE(
        center(weights),
        int(named[2]),
        standardize=False,
        layers=(int(layer[1]),),
        model=f"Qwen/{named[1]}",
    )
