"""Which transformer a lens belongs to, wherever its files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import builtin
from ..basis import Lens
from ..errors import InputError
from .config import DataConfig
from .fingerprint import fingerprint


def model_id(config: DataConfig) -> dict[str, Any]:
    """What a lens keeps of the transformer of `config`: its name, its revision on the hub, and the
    fingerprint of its files if they are a local folder."""
    folder = builtin.MODEL_DIR if config.model == builtin.NAME else Path(config.model).expanduser()
    local = fingerprint(folder) if folder.exists() else None
    return {"model": config.model, "revision": config.revision, "fingerprint": local}


def check_lens_model(lens: Lens, config: DataConfig, d_in: int) -> None:
    """Raise InputError unless `lens` is of the transformer of `config`, of width `d_in`: two local
    folders are told apart by their fingerprints; else the last part of the name counts, and the
    revision where both have one."""
    if lens.d_in != d_in:
        raise InputError(
            f"--lens must be of MODEL's width, {d_in}, and has {lens.d_in}; give a lens of "
            f"{config.model}"
        )
    own, theirs = model_id(config), lens.about
    if own["fingerprint"] and theirs.get("fingerprint"):
        same = own["fingerprint"] == theirs["fingerprint"]
    else:
        ends = [Path(str(about.get("model", ""))).name for about in (own, theirs)]
        revisions = {about.get("revision") for about in (own, theirs)} - {None}
        same = not ends[1] or (ends[0] == ends[1] and len(revisions) < 2)
    if not same:
        at = f" at {theirs['revision']}" if theirs.get("revision") else ""
        raise InputError(
            f"--lens must be of MODEL {config.model}, and is of {theirs.get('model')}{at}, with "
            "other weights; train one of this model with `python -m mlsae.lens`"
        )
