"""What is read of a run's folder: the files that train, evaluate and analyze leave in it.

Legend: L layers, M latents.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import safetensors
import safetensors.torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Analysis:
    """What `mlsae.analyze` found."""

    about: dict[str, Any]
    """analysis.json: layers, tokens, ratios, entropy, MMCS, …"""
    profile: Tensor
    """(M, L) float64: mean over active tokens of P(layer | token, latent); NaN rows where none."""
    totals: Tensor
    """(M, L) float64: summed activation."""
    latents: pyarrow.Table
    """A row a latent."""
    examples: Path
    """The table of examples: read only where it is needed, since it is large."""
    prompt: dict[str, Any]
    """The active (token, layer, latent) of one prompt."""


@dataclass(frozen=True)
class Run:
    """A run as far as it has come: what is not there is None, or an empty list."""

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    """A line a log step of the training."""
    heldout: list[dict[str, Any]]
    """A line a measurement on held-out text while training."""
    totals: Tensor | None
    """(M, L) float64: summed activation on the held-out text of training."""
    evaluation: dict[str, Any] | None
    analysis: Analysis | None

    @property
    def layers(self) -> list[int]:
        """The layers it was trained on."""
        layers: list[int] = self.config["layers"]
        return layers

    @property
    def expansion(self) -> float:
        """R: latents per dimension of the residual stream."""
        return self.config["n_latents"] / self.config["d_in"]

    @property
    def quoted(self) -> str:
        """The folder as a shell takes it."""
        return shlex.quote(str(self.folder))

    def command(self, program: str) -> str:
        """The command that makes what is missing, and shows it."""
        return f"python -m mlsae.{program} {self.quoted} && python -m mlsae.report {self.quoted}"


def read_run_data(folder: Path) -> Run:
    """Read the run in `folder`.

    Raises InputError if it is no run, or a file of it is damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        lines = [json.loads(line) for line in _text(folder / "metrics.jsonl").splitlines()]
        latents = folder / "latents.safetensors"
        totals = safetensors.torch.load_file(latents)["totals"] if latents.exists() else None
        evaluation = _text(folder / "evaluation.json")
        run = Run(
            folder,
            config,
            [line for line in lines if "loss" in line],
            [line for line in lines if "heldout" in line],
            totals.double() if totals is not None else None,
            _json(evaluation) if evaluation else None,
            _analysis(folder) if (folder / "analysis.json").exists() else None,
        )
        _ = run.layers, run.expansion, config["k"]
    except (
        OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException,
        safetensors.SafetensorError,
    ) as error:  # fmt: skip
        raise InputError(
            "RUN must be the folder of a finished training run, and "
            f"{folder} cannot be read: {type(error).__name__}: {error}"
        ) from error
    return run


def _analysis(folder: Path) -> Analysis:
    arrays = safetensors.torch.load_file(folder / "analysis.safetensors")
    examples = folder / "analysis_examples.parquet"
    pyarrow.parquet.read_schema(examples)  # raises where it is damaged
    return Analysis(
        _json((folder / "analysis.json").read_text()),
        arrays["profile"].double(),
        arrays["totals"].double(),
        pyarrow.parquet.read_table(folder / "analysis_latents.parquet"),
        examples,
        _json((folder / "analysis_prompt.json").read_text()),
    )


def _json(text: str) -> dict[str, Any]:
    """An object of JSON; NaN and infinity, which it has not but some write, are None."""
    found: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return found


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
