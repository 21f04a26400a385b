"""The SAEs that an analysis compares with: those given, or the runs beside it that differ only in
the seed of their weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from .. import formats
from ..errors import InputError
from ..evaluation.heldout import is_same_place
from ..formats import SavedSAE
from ..formats.places import check_residual
from ..formats.remote import folders_in, listed
from ..formats.saved import read_json, read_tensors
from ..model import MLSAE
from ..training.settings import differ_in_weights_seed
from .stability import LatentRows


def runs_beside(run: Path, given: Sequence[Path] | None) -> list[Path]:
    """The SAEs to compare the one in `run` with: those `given`; if None, its `siblings`.

    Raises InputError unless each can be read, is another than `run`, and is of the same model and
    width. Their weights are read to check them, and are not kept.
    """
    names = siblings(run) if given is None else list(given)
    if not names:
        return []
    for i, name in enumerate(names):
        if is_same_place(str(name), str(run)):
            raise InputError(f"--beside must be other SAEs than RUN, got {name}; leave it out")
        if any(is_same_place(str(name), str(other)) for other in names[:i]):
            raise InputError(f"--beside must name each SAE once, got {name} twice; leave one out")
    mlsae = MLSAE.from_pretrained(run)
    own, digest = mlsae.config, mlsae.lens and mlsae.lens.digest
    for name in names:
        saved, _ = _read(name)
        if saved.model and own.model and not is_same_place(saved.model, own.model):
            raise InputError(
                f"--beside must be SAEs of RUN's model, {own.model}, and {name} is of "
                f"{saved.model}; leave it out"
            )
        if saved.d_in != own.d_in:
            raise InputError(
                f"--beside must be SAEs of RUN's width, {own.d_in}, and {name} has {saved.d_in}; "
                "leave it out"
            )
        if (saved.lens and saved.lens.digest) != digest:
            raise InputError(
                f"--beside must be SAEs with the lens of RUN, or none as it, and {name} works in "
                "another basis; leave it out"
            )
    return names


def siblings(run: Path) -> list[Path]:
    """The runs in the folder that holds `run` that are the same but for the seed of their initial
    weights (see `training.settings.differ_in_weights_seed`), by name. What cannot be read there is
    none."""
    if not (run / "config.json").is_file():  # on the hub, or no run, which opening it tells
        return []
    found, own = [], read_json(run / "config.json")
    for path in sorted(run.absolute().parent.glob("*/config.json")):
        with suppress(InputError):
            about = read_json(path)
            same = all(about.get(name) == own.get(name) for name in formats.own.CONFIG)
            if same and differ_in_weights_seed(own, about):
                found.append(run.parent / path.parent.name)
    return found


def read_rows(names: Sequence[Path], device: torch.device) -> Iterator[tuple[str, LatentRows]]:
    """The name and the `LatentRows` of one SAE after another. Active are its latents with a count
    in latents.safetensors, of the held-out text of its training; without that file, all."""
    for name in names:
        saved, active = _read(name)
        decoder, encoder = (saved.weights[which].to(device) for which in ("W_dec", "W_enc"))
        yield str(name), LatentRows(decoder, encoder, active.to(device))


def _read(name: Path) -> tuple[SavedSAE, torch.Tensor]:
    """The SAE and which of its latents (M,) were active. Raises InputError if it cannot be read."""
    path = Path(os.path.expanduser(name))
    try:
        local = os.path.exists(path)
        saved = formats.read(path) if local else MLSAE.from_pretrained(name).to_saved()
        check_residual(saved.about, str(name))
        return saved, _active(path, saved.n_latents)
    except InputError as error:
        inside = folders_in(path) if os.path.isdir(path) else []
        if inside and "." not in inside:
            raise InputError(
                f"--beside must be one SAE each, and {name} has several: {listed(inside)}; give "
                "those"
            ) from error
        raise InputError(
            f"--beside must be SAEs that can be read, and {name} cannot: {error}; leave it out (if "
            "it was not given, by --beside without values)"
        ) from error


def _active(folder: Path, n_latents: int) -> torch.Tensor:
    path = folder / "latents.safetensors"
    if not os.path.isfile(path):
        return torch.ones(n_latents, dtype=torch.bool)
    counts = read_tensors(path).get("counts", torch.empty(0, 0))
    if counts.ndim != 2 or len(counts) != n_latents:
        raise InputError(
            f"counts in {path} must have a row for each of {n_latents} latents, got "
            f"{tuple(counts.shape)}"
        )
    return (counts > 0).any(1)
