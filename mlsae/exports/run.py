"""Write what another tool reads of an MLSAE and a text."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from .. import formats
from ..distributed import choose_device
from ..errors import InputError
from ..evaluation.heldout import HeldoutConfig, open_run
from ..files import new_folder
from .delphi import write_cache
from .explanations import take_labels
from .neuronpedia import check_analysis, write_sources
from .neuronpedia_rows import Names

_ID = re.compile(r"[a-zA-Z0-9_.-]+")


@dataclass(frozen=True)
class ExportConfig(HeldoutConfig):
    """What to export, and for which tool."""

    to: Literal["neuronpedia", "delphi"] | None = None
    """The tool that reads it."""
    labels_from: Path | None = None
    """Folder of explanations that delphi wrote: take them as labels of RUN's latents."""
    out: Path | None = None
    """Folder to write, new or empty. None: beside the run's, named after it and the tool."""
    splits: int | None = None
    """Files that delphi's latents are split into, for each layer. None: 5, or more if a file would
    exceed 256 MB."""
    model_id: str | None = None
    """The model's id at Neuronpedia. None: its name on the hub, without its owner."""
    source_set: str | None = None
    """Name of the sources at Neuronpedia, after the layer and a dash. None: res-mlsae-4k, say, by
    the number of latents."""
    creator_id: str = "clkht01d40000jv08hvalcvly"
    """Id of a user at Neuronpedia, to whom the rows belong. By default that of a new installation's
    own user."""


def export(config: ExportConfig) -> str:
    """Export as `config` says: what to print of it.

    Raises InputError for bad input, before anything is written.
    """
    if (config.to is None) == (config.labels_from is None):
        raise InputError(
            "--to must be given, neuronpedia or delphi, or else --labels_from, and "
            f"{'neither is' if config.to is None else 'both are'}"
        )
    if config.labels_from is not None:
        return take_labels(config.run, config.labels_from)
    if config.splits is not None and config.splits < 1:
        raise InputError(f"--splits must be at least 1, got {config.splits}")
    out = config.out or config.run.with_name(f"{config.run.resolve().name}-{config.to}")
    device = choose_device(config.device)
    if config.to == "neuronpedia":
        check_analysis(config.run)
        names = _names(config)
    with torch.inference_mode(), new_folder(out) as partial:
        mlsae, stream = open_run(replace(config, out=out), device)
        if config.to == "delphi":
            told = write_cache(mlsae, stream, partial, config.tokens, config.splits)
        else:
            told = write_sources(config.run, mlsae, stream, partial, names)
    return f"{told}\n{config.to}: {out}"


def _names(config: ExportConfig) -> Names:
    """Raises InputError if a name is none at Neuronpedia."""
    sae = formats.read(config.run)
    thousands, rest = divmod(sae.n_latents, 1024)
    size = str(sae.n_latents) if rest or not thousands else f"{thousands}k"
    names = Names(
        config.model_id or (config.model or sae.model).rstrip("/").split("/")[-1].lower(),
        config.source_set or f"res-mlsae-{size}",
        config.creator_id,
    )
    for argument, name in (("--model_id", names.model), ("--source_set", names.source_set)):
        if not _ID.fullmatch(name):
            raise InputError(
                f"{argument} must consist of letters, digits, dashes, dots and underscores, got "
                f"{name!r}"
            )
    return names
