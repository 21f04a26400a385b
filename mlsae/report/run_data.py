"""A run read back from its folder: the files that train, evaluate and analyze write there.

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

from ..data.sinks import DropRule
from ..errors import InputError


@dataclass(frozen=True)
class Analysis:
    """The files that `mlsae.analyze` writes."""

    summary: dict[str, Any]
    """analysis.json: layers, tokens, ratios, entropy, MMCS, …"""
    profile: Tensor
    """(M, L) float64: mean over active tokens of P(layer | token, latent); NaN rows if none."""
    totals: Tensor
    """(M, L) float64: summed activation."""
    latents: pyarrow.Table
    """One row per latent."""
    examples: Path
    """The table of examples. It is large, so only the browser's data read it."""
    prompt: dict[str, Any]
    """The active (token, layer, latent) of one prompt."""


@dataclass(frozen=True)
class RunData:
    """A run at any stage: what has not been measured yet is None, or an empty list."""

    folder: Path
    config: dict[str, Any]
    training: list[dict[str, Any]]
    """metrics.jsonl: one entry per logged training step."""
    validation: list[dict[str, Any]]
    """metrics.jsonl: one entry per measurement on held-out text during training."""
    totals: Tensor | None
    """(M, L) float64: summed activation on the held-out text of training."""
    evaluation: dict[str, Any] | None
    """evaluation.json; its metrics are under "figures"."""
    analysis: Analysis | None

    @property
    def layers(self) -> list[int]:
        """The transformer's layers that the SAE was trained on."""
        layers: list[int] = self.config["layers"]
        return layers

    @property
    def model(self) -> str:
        """The transformer's name."""
        return str(self.config.get("model") or "not named")

    @property
    def dataset(self) -> str | None:
        """The text that the SAE was trained on; None if the config does not say."""
        dataset = self.config.get("training", {}).get("dataset")
        return str(dataset) if dataset else None

    @property
    def dropped(self) -> str:
        """What training left out beside special tokens, in words; "" if nothing."""
        return str(DropRule.from_dict(self.config.get("dropped", {})))

    @property
    def expansion(self) -> float:
        """R: latents per dimension of the residual stream."""
        return self.config["n_latents"] / self.config["d_in"]

    @property
    def quoted(self) -> str:
        """The folder, quoted for a shell."""
        return shlex.quote(str(self.folder))

    def command(self, program: str) -> str:
        """The command that measures what is missing and redraws the page."""
        return f"python -m mlsae.{program} {self.quoted} && python -m mlsae.report {self.quoted}"


def read_run_data(folder: Path) -> RunData:
    """Read the run in `folder`.

    Raises InputError if the folder holds no run, or one of its files is damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        log = [json.loads(line) for line in _text(folder / "metrics.jsonl").splitlines()]
        latents = folder / "latents.safetensors"
        totals = safetensors.torch.load_file(latents)["totals"] if latents.exists() else None
        evaluation = _text(folder / "evaluation.json")
        run = RunData(
            folder,
            config,
            [entry for entry in log if "loss" in entry],
            [entry for entry in log if "heldout" in entry],
            totals.double() if totals is not None else None,
            _json(evaluation) if evaluation else None,
            _analysis(folder) if (folder / "analysis.json").exists() else None,
        )
        _ = run.layers, run.expansion, config["k"]  # raises if config.json is not that of a run
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
    pyarrow.parquet.read_schema(examples)  # raises if the file is damaged
    return Analysis(
        _json((folder / "analysis.json").read_text()),
        arrays["profile"].double(),
        arrays["totals"].double(),
        pyarrow.parquet.read_table(folder / "analysis_latents.parquet"),
        examples,
        _json((folder / "analysis_prompt.json").read_text()),
    )


def _json(text: str) -> dict[str, Any]:
    """A JSON object. NaN and Infinity, which Python writes though JSON has neither, become None."""
    parsed: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return parsed


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
