"""A run read back from its folder: the files that train, evaluate and analyze write there.

Legend: L layers, M latents.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import safetensors
import safetensors.torch
from torch import Tensor

from ..data.sinks import DropRule
from ..errors import InputError, first_line
from . import schema
from .labels import Labels, read_labels
from .schema import (
    CONFIG,
    COUNT,
    OBJECT,
    TEXT_OR_NULL,
    Each,
    check,
    check_columns,
    check_range,
    check_tensor,
)


@dataclass(frozen=True)
class Analysis:
    """The files that `mlsae.analyze` writes."""

    summary: dict[str, Any]
    """analysis.json: layers, tokens, ratios, entropy, MMCS, …"""
    profile: Tensor
    """(M, L) float64: mean over active tokens of P(layer | token, latent); NaN rows if none."""
    totals: Tensor
    """(M, L) float64: summed activation."""
    counts: Tensor
    """(M, L) int64: tokens at which a latent is active."""
    continued: Tensor | None
    """(M, L − 1) int64: those at which it is active at the next layer, too; None with one layer,
    and in analyses of 0.2."""
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
    labels: Labels
    """What the user wrote about latents."""

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

    Raises InputError if the folder holds no run, or one of its files is damaged: what the pages are
    drawn from is checked here.
    """
    with _raise_unreadable(folder, "give the folder that mlsae.train left"):
        config = _read_json(folder / "config.json")
        check(config, CONFIG, "config.json")
        check(config.get("training", {}).get("dataset"), TEXT_OR_NULL, "training.dataset")
        n_layers = len(config["layers"])
        training, validation = _log(folder / "metrics.jsonl", n_layers)
        totals, path = None, folder / "latents.safetensors"
        if path.exists():
            arrays = safetensors.torch.load_file(path)
            check_tensor(arrays, "totals", (config["n_latents"], n_layers), path.name)
            totals = arrays["totals"].double()
    with _raise_unreadable(folder, "measure it again with mlsae.evaluate"):
        evaluation = _evaluation(folder / "evaluation.json")
    with _raise_unreadable(folder, "measure it again with mlsae.analyze"):
        analysis = _analysis(folder)
    labels = read_labels(folder)
    return RunData(folder, config, training, validation, totals, evaluation, analysis, labels)


@contextmanager
def _raise_unreadable(folder: Path, way_out: str) -> Iterator[None]:
    """Raise InputError, with the way out, if a file of the run cannot be read."""
    try:
        yield
    except (
        OSError, ValueError, RecursionError, pyarrow.ArrowException, safetensors.SafetensorError,
    ) as error:  # fmt: skip
        what = str(error) if isinstance(error, InputError) else first_line(error)
        raise InputError(
            f"RUN must be the folder of a finished training run, and {folder} cannot be read: "
            f"{what}; {way_out}"
        ) from error


def _log(path: Path, n_layers: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The entries of metrics.jsonl: of training steps, and of validations."""
    training, validation = [], []
    for i, line in enumerate(path.read_text().splitlines() if path.exists() else ()):
        where = f"line {i + 1} of {path.name}"
        try:
            entry = _json(line)
        except ValueError as error:
            raise InputError(f"{where} must be JSON: {error}") from error
        check(entry, OBJECT, where)
        if "loss" in entry:
            check(entry, schema.training_step(n_layers), where)
            training.append(entry)
        if "heldout" in entry:
            check(entry, schema.validation(n_layers), where)
            validation.append(entry)
    return training, validation


def _evaluation(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    evaluation = _read_json(path)
    check(evaluation, {"layers": Each(COUNT)}, path.name)
    check(evaluation, schema.evaluation(len(evaluation["layers"])), path.name)
    return evaluation


def _analysis(folder: Path) -> Analysis | None:
    path = folder / "analysis.json"
    if not path.exists():
        return None
    summary = _read_json(path)
    check(summary, {"layers": Each(COUNT)}, path.name)
    n_layers = len(summary["layers"])
    n_bins = schema.length(summary, "cosine_histogram", "edges") - 1
    n_match_bins = schema.length(summary, "stability", "histogram", "edges") - 1
    check(summary, schema.analysis(n_layers, n_bins, n_match_bins), path.name)

    latents, where = folder / "analysis_latents.parquet", "analysis_latents.parquet"
    table = pyarrow.parquet.read_table(latents)
    matches = schema.MATCH_NUMBERS if "stability" in summary else ()
    flow = schema.FLOW_NUMBERS if "flow" in summary else ()
    numbers = ("latent", *schema.LATENT_NUMBERS, *matches, *flow)
    check_columns(table.schema, numbers, schema.is_number_type, "numbers", where)
    texts = ("tokens_in", "tokens_out")
    check_columns(table.schema, texts, schema.is_text_list, "lists of text", where)
    check_range(table["latent"], table.num_rows, "latent", where)
    check_range(table["tokens_active"], 2**63, "tokens_active", where)

    arrays = safetensors.torch.load_file(folder / "analysis.safetensors")
    shape, place = (table.num_rows, n_layers), "analysis.safetensors"
    for name in ("profile", "totals"):
        check_tensor(arrays, name, shape, place)
    check_tensor(arrays, "counts", shape, place, "integer")
    if flow:
        check_tensor(arrays, "continued", (shape[0], n_layers - 1), place, "integer")
    examples = folder / "analysis_examples.parquet"
    schema.check_examples(pyarrow.parquet.read_schema(examples), examples.name)
    return Analysis(
        summary,
        arrays["profile"].double(),
        arrays["totals"].double(),
        arrays["counts"],
        arrays["continued"] if flow else None,
        table,
        examples,
        _prompt(folder / "analysis_prompt.json"),
    )


def _prompt(path: Path) -> dict[str, Any]:
    """analysis_prompt.json, which may be about other layers than analysis.json."""
    prompt = _read_json(path)
    check(prompt, {"layers": Each(COUNT)}, path.name)
    n_tokens, n_entries = (schema.length(prompt, *at) for at in (("tokens",), ("entries", "token")))
    check(prompt, schema.prompt(len(prompt["layers"]), n_tokens, n_entries), path.name)
    return prompt


def _json(text: str) -> Any:
    """JSON. NaN and Infinity, which Python writes though JSON has neither, become None."""
    return json.loads(text, parse_constant=lambda _: None)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError if it holds something else."""
    try:
        content = _json(path.read_text())
    except ValueError as error:
        raise InputError(f"{path.name} must be JSON: {error}") from error
    check(content, OBJECT, path.name)
    parsed: dict[str, Any] = content
    return parsed
