"""The settings of `python -m mlsae.trace`, and how they are followed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..files import check_folder, write_file
from ..intervention import OpenConfig
from ..intervention.opening import open_transformer, read_run
from ..report.trace_page import trace_page
from .memory import check_weights
from .result import Trace
from .run import check_counts, trace


@dataclass(frozen=True, kw_only=True)
class TraceConfig(OpenConfig):
    """What to trace, in which text."""

    prompt: str
    """The text, with the special tokens that the tokenizer adds at its start."""
    target: str | None = None
    """The next token whose logit is traced, such as " Paris". None: the likeliest."""
    against: str | None = None
    """The token whose logit is subtracted. None: the mean of all logits is."""
    latent: int | None = None
    """Trace the activation of this latent, and no logit."""
    at_layer: int | None = None
    """The layer of --latent."""
    at_token: int = -1
    """The position of --latent; negative ones count from the prompt's end."""
    check: int = 10
    """So many of the strongest latents, and as many errors, are also ablated, each in a pass."""
    edges: int = 0
    """Also tell what rests on what among so many of the strongest latents, each by a pass."""
    show: int = 10
    """Rows of the tables."""
    save: Path | None = None
    """Write everything to this JSON file."""
    page: Path | None = None
    """Draw it in this HTML file, which opens offline."""


def trace_run(config: TraceConfig, tell: Callable[[str], object]) -> Trace:
    """Trace what `config` names, and write its files; `tell` is given a line on memory before.

    Raises InputError for bad input, and if it would not fit in memory, before the pass."""
    check_counts(check=config.check, edges=config.edges, show=config.show)
    for path, argument in ((config.save, "--save"), (config.page, "--page")):
        if path is not None:
            check_folder(path.parent, argument, files=(path.name,))
    if config.save is not None and config.save == config.page:
        raise InputError(f"--save and --page must be two files, got {config.save} for both")
    mlsae, data = read_run(config)
    check_weights(mlsae, data)
    opened = open_transformer(mlsae, data)
    result = trace(
        opened,
        config.prompt,
        target=config.target,
        against=config.against,
        latent=config.latent,
        at_layer=config.at_layer,
        at_token=config.at_token,
        check=config.check,
        edges=config.edges,
        tell=tell,
    )
    if config.save is not None:
        content = {"run": str(config.run), "prompt": config.prompt, **result.as_dict()}
        _write(config.save, json.dumps(content).encode())
    if config.page is not None:
        _write(config.page, trace_page(result.as_dict(), str(config.run)))
    return result


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content)
