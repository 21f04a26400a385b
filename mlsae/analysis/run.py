"""Analyze at which layers the latents of an MLSAE are active.

Legend: L layers, T positions, M latents.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.table import Table
from torch import Tensor

from ..data.stream import DataStream
from ..data.tokens import not_special
from ..distributed import choose_device
from ..errors import InputError
from ..evaluation.heldout import HeldoutConfig, check_kept, open_run
from ..evaluation.provenance import provenance_of
from ..files import ANALYSIS_FILES, check_folder, write_file
from ..formats.saved import read_tensors
from ..model import MLSAE
from ..report.prompt_page import prompt_page
from .beside import read_rows, runs_beside
from .collect import Collected, collect
from .geometry import Directions, compute_directions, token_strings
from .layer_spread import bootstrap_layer_spread, bootstrap_released_spread
from .parquet import TokenText, activity_columns, direction_columns, write_examples, write_table
from .prompt import latents_by_token, prompt_table, read_prompt, tokenize
from .result import AnalysisResult
from .stability import LatentRows, Stability, stability

_PROMPT_TOKENS = 24  # of the first row: shown if no prompt is given


@dataclass(frozen=True)
class AnalyzeConfig(HeldoutConfig):
    """What to analyze, and on what."""

    prompt: str | None = None
    """Show only this text, token by token; nothing else is measured."""
    count_threshold: int | None = None
    """Tokens at which a latent must be active for a layer to count as one of its own. None: a
    thousandth of all tokens, as in the paper (10,000 of 10 million)."""
    examples: int = 4
    """Examples to keep per latent and layer: this many of the highest activation, and as many
    drawn from all of its activations. 0: none."""
    beside: tuple[Path, ...] | None = None
    """Other SAEs of the same model and width, named as RUN is: each latent's best match in them is
    told. None: the runs in the same folder that differ from RUN only in the seed of their weights.
    (Without values: none.)"""
    groups: int = 32
    """Groups of neighboring rows that the bootstrap draws from; memory grows with it."""


def analyze(config: AnalyzeConfig) -> AnalysisResult:
    """Analyze as `config` says, and write the analysis' files.

    Raises InputError for bad input, before anything is measured.
    """
    started = time.perf_counter()
    others = runs_beside(config.run, config.beside)
    mlsae, stream = _open(config)
    out = config.out or config.run
    input_ids = stream.heldout(config.tokens)
    text_mask = not_special(input_ids, stream.tokenizer)
    token_mask = stream.token_mask(input_ids)
    check_kept(token_mask, text_mask)

    text = TokenText(input_ids, token_mask, token_strings(stream.tokenizer))
    collected = collect(mlsae, stream, text, config.groups, config.examples)
    pass_seconds = time.perf_counter() - started

    sae = mlsae.sae
    directions = compute_directions(
        sae.W_dec, sae.W_enc, stream.reader.model, len(text.strings), mlsae.lens is not None
    )
    active = collected.whole.profile[0].sum(1) > 0
    rows = LatentRows(sae.W_dec, sae.W_enc, active.to(stream.device))
    found = stability(rows, read_rows(others, stream.device), stream.seed) if others else None
    threshold = config.count_threshold or max(1, round(token_mask.sum().item() / 1000))
    out.mkdir(parents=True, exist_ok=True)
    n_examples = _write_tables(out, collected, directions, found, threshold, text)
    reading = read_prompt(mlsae, stream, input_ids[0, :_PROMPT_TOKENS], text.strings)
    _write_json(out / "analysis_prompt.json", reading)

    n, seed = config.resamples, stream.seed
    spread = bootstrap_layer_spread(collected.whole, collected.grouped, n, seed)
    released = bootstrap_released_spread(collected.rows, mlsae.config.n_latents, n, seed)
    interval = (
        f"95 %, {n} bootstrap resamples, of {len(collected.grouped.within)} groups of rows "
        "(equations, entropy) or of the rows (released)"
    )
    result = AnalysisResult(
        provenance_of(config.run, mlsae, stream, token_mask, text_mask, interval, started),
        spread,
        released,
        directions,
        collected.adjacent,
        collected.flow,
        found,
        count_threshold=threshold,
        active_latents=int(active.sum()),
        examples=n_examples,
        pass_seconds=pass_seconds,
    )
    _write_json(out / "analysis.json", result.as_dict())
    return result


def show_prompt(config: AnalyzeConfig, prompt: str) -> tuple[Table, str]:
    """Write analysis_prompt.json and prompt.html for one text.

    Returns a table to print, and a line that says what its column "over many" is. Raises InputError
    for bad input, before anything is written.
    """
    if config.beside:
        raise InputError(
            "--beside is for an analysis of many tokens, and --prompt shows one text only; leave "
            "one of them out"
        )
    mlsae, stream = _open(config)
    out = config.out or config.run
    ids = tokenize(stream, prompt)
    reading = read_prompt(mlsae, stream, ids, token_strings(stream.tokenizer))
    shape = mlsae.config.n_latents, len(reading["layers"])
    profile, source = _profile_over_text(out, config.run, shape)
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "analysis_prompt.json", reading)
    page = prompt_page(reading, latents_by_token(reading), profile)
    write_file(out / "prompt.html", page.encode())
    return prompt_table(reading, profile), source


def _open(config: AnalyzeConfig) -> tuple[MLSAE, DataStream]:
    """See `open_run`."""
    check_folder(config.out or config.run, files=ANALYSIS_FILES)
    for name, least in (("examples", 0), ("groups", 1), ("count_threshold", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"--{name} must be at least {least}, got {value}")
    return open_run(config, choose_device(config.device))


def _write_tables(
    out: Path,
    collected: Collected,
    directions: Directions,
    found: Stability | None,
    threshold: int,
    text: TokenText,
) -> int:
    """Write analysis_latents.parquet, analysis_examples.parquet and analysis.safetensors: the
    number of examples."""
    counts, whole = collected.counts, collected.whole
    n_tokens = int(text.token_mask.sum())
    columns = {
        "latent": torch.arange(len(counts)),
        **activity_columns(whole, counts, threshold, n_tokens),
        "max_activation": collected.max,
        **direction_columns(directions, text.strings),
        **(collected.flow.columns() if collected.flow else {}),
        **(found.columns() if found else {}),
    }
    write_table(out / "analysis_latents.parquet", columns)
    active = whole.profile[0].sum(-1)
    arrays = {
        "counts": counts,
        "totals": whole.totals[0],
        "profile": whole.profile[0] / active[:, None],
        "tokens_active": active.round().long(),
        **({"continued": collected.flow.continued} if collected.flow else {}),
    }
    write_file(out / "analysis.safetensors", safetensors.torch.save(arrays))
    return write_examples(out / "analysis_examples.parquet", collected.examples, text)


def _profile_over_text(out: Path, run: Path, shape: tuple[int, int]) -> tuple[Tensor | None, str]:
    """Where latents are active over many tokens, of `shape` (M, L), and a line that says from what.

    It is taken from an analysis in `out` or `run`, else from the validation of the training run;
    None if none of them has this shape. Raises InputError if one is damaged.
    """
    for path, name in (
        (out / "analysis.safetensors", "profile"),
        (run / "analysis.safetensors", "profile"),
        (run / "latents.safetensors", "totals"),
    ):
        if path.exists():
            weights = read_tensors(path).get(name, torch.empty(0)).double()
            if weights.shape == shape:
                return weights / weights.sum(1, keepdim=True), f"over many: {name} of {path}"
    return None, "over many: nothing at these layers; run mlsae.analyze without --prompt first"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=2, allow_nan=False).encode())
