"""See at which layers the latents of an MLSAE are active: over many tokens, and for one.

    python -m mlsae.analyze runs/demo                          # the text it was trained beside
    python -m mlsae.analyze runs/70m my-text.jsonl --tokens 10000000
    python -m mlsae.analyze runs/demo --prompt "def main(argv):"      # one text, token by token

It prints a summary, and leaves in the run's folder analysis.json (ratios, entropy, MMCS, …),
analysis.safetensors (numbers of each latent and layer), analysis_latents.parquet (a row a latent),
analysis_examples.parquet (where each latent is active, with the text around) and
analysis_prompt.json (one text, token by token). With --prompt it measures nothing anew, and leaves
analysis_prompt.json and prompt.html.

Legend: L layers, R rows, T positions, N tokens, D width of the residual stream, M latents.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from .analysis import layer_spread as statistics
from .analysis.accumulate import Accumulator, Adjacent
from .analysis.examples import Examples
from .analysis.geometry import (
    embeddings_of,
    nearest_tokens,
    neighbors,
    random_cosines,
    token_strings,
)
from .analysis.parquet import Text, direction_columns, latent_columns, write_examples, write_table
from .analysis.prompt import prompt_page, prompt_table, read_prompt, tokenize
from .analysis.summary import print_analysis
from .data.stream import DataStream
from .data.tokens import not_special
from .distributed import choose_device
from .errors import InputError, exit_on_bad_input
from .evaluation.heldout import HeldoutConfig, open_run
from .files import write_file
from .memory import peak
from .model import MLSAE
from .report import redraw

_CENTER_TOKENS = 4096  # that the mean residual is taken from: it errs by 1/64 of the deviation
_NEAREST_TOKENS = 5
_PROMPT_TOKENS = 24  # of the first row: shown where no prompt is given


@dataclass(frozen=True)
class AnalyzeConfig(HeldoutConfig):
    """What to analyze, and on what."""

    prompt: str | None = None
    """Show this text alone, token by token; nothing else is measured."""
    count_threshold: int | None = None
    """Tokens at which a latent must be active to count a layer as one of its own. None: a
    thousandth of all, as in the paper (10,000 of 10 million)."""
    examples: int = 4
    """Examples to keep of each latent at each layer: so many of the highest activation, and as
    many spread over all its activations. 0: none."""
    groups: int = 32
    """Groups of neighboring rows that the bootstrap draws from; memory grows with it."""


@torch.inference_mode()
def read_text(
    mlsae: MLSAE,
    stream: DataStream,
    input_ids: Tensor,
    token_mask: Tensor,
    text: Text,
    accumulator: Accumulator,
    examples: Examples | None,
) -> Adjacent:
    """One pass over rows input_ids (R, T), without the special tokens that `token_mask` (R, T) leaves
    out: what is counted is in `accumulator` and `examples`. Nothing else changes."""
    device = stream.device
    first = input_ids[: max(1, _CENTER_TOKENS // stream.seq_len)]
    center = torch.cat(list(stream.residuals(first)), 1).mean(1)
    adjacent = Adjacent(center)
    places = torch.arange(input_ids.numel()).view_as(input_ids)
    bar = tqdm(total=input_ids.numel(), unit=" tokens", unit_scale=True, desc="analyzing")
    with bar:
        for start in range(0, len(input_ids), stream.micro_rows):
            at = slice(start, start + stream.micro_rows)
            keep = token_mask[at].to(device)
            x = stream.reader(input_ids[at].to(device))[:, keep].float()
            codes = mlsae.encode(x)
            place = places[at][token_mask[at]]
            accumulator.update(codes, (place // input_ids.shape[1]).to(device))
            adjacent.update(x)
            if examples:
                examples.update(codes, text.piece[place].to(device), place.to(device))
            bar.update(input_ids[at].numel())
    return adjacent


def analyze(config: AnalyzeConfig) -> dict[str, Any]:
    """Analyze as `config` says, leave the files, and return what analysis.json holds.

    Raises InputError for bad input, before anything is measured.
    """
    started = time.perf_counter()
    device, out = choose_device(config.device), config.out or config.run
    mlsae, stream = _open(config, device)
    input_ids = stream.heldout(config.tokens)
    token_mask = not_special(input_ids, stream.tokenizer)
    if not token_mask.any():
        raise InputError("DATASET must hold tokens that are not special, got none")
    out.mkdir(parents=True, exist_ok=True)
    strings = token_strings(stream.tokenizer)
    text = Text(input_ids, token_mask, strings)
    n_latents, n_layers = mlsae.config.n_latents, len(stream.reader.layers)
    accumulator = Accumulator(n_latents, n_layers, len(input_ids), config.groups, device)
    seed, n = stream.seed, config.examples
    examples = Examples(n_latents, n_layers, n, seed, device) if n else None
    adjacent = read_text(mlsae, stream, input_ids, token_mask, text, accumulator, examples)
    pass_seconds = time.perf_counter() - started

    counts = accumulator.counts.view(n_latents, n_layers).cpu()
    whole, grouped, rows = accumulator.finish()
    threshold = config.count_threshold or max(1, round(token_mask.sum().item() / 1000))
    columns: dict[str, Any] = {
        "latent": torch.arange(n_latents),
        **latent_columns(whole, counts, threshold, int(token_mask.sum())),
        "max_activation": accumulator.max.cpu(),
    }
    directions, about_directions = _directions(mlsae, stream, strings)
    write_table(out / "analysis_latents.parquet", {**columns, **directions})
    n_examples = write_examples(out / "analysis_examples.parquet", examples, text)
    active = whole.profile[0].sum(-1)
    arrays = {
        "counts": counts,
        "totals": whole.totals[0],
        "profile": whole.profile[0] / active[:, None],
        "tokens_active": active.round().long(),
    }
    write_file(out / "analysis.safetensors", safetensors.torch.save(arrays))
    ids = input_ids[0, :_PROMPT_TOKENS]
    _write_json(out / "analysis_prompt.json", read_prompt(mlsae, stream, ids, strings))

    figures = statistics.with_intervals(whole, grouped, config.resamples, seed)
    released = statistics.released_with_intervals(rows, n_latents, config.resamples, seed)
    about = {
        "run": str(config.run),
        "model": stream.config.model,
        "dataset": stream.config.dataset,
        "tokens": int(token_mask.sum()),
        "rows": len(input_ids),
        "seq_len": stream.seq_len,
        "layers": list(stream.reader.layers),
        "trained_on_layers": list(mlsae.config.layers),
        "n_latents": n_latents,
        "k": mlsae.config.k,
        "count_threshold": threshold,
        "active_latents": int((active > 0).sum()),
        "ratios": {
            estimator: {
                name: found[name] if name in "AB" else found[name]["value"]
                for name in statistics.RATIOS
            }
            for estimator, found in (("equations", figures), ("released", released))
        },
        "entropy": {"profile": figures["entropy"], "totals": figures["entropy_totals"]},
        **about_directions,
        "adjacent": adjacent.as_dict(),
        "examples": n_examples,
        "interval": f"95 %, {config.resamples} bootstrap resamples, of {accumulator.groups} groups "
        "of rows (equations, entropy) or of the rows (released)",
        "seed": seed,
        "pass_seconds": pass_seconds,
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak(device),
        "device": str(device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    _write_json(out / "analysis.json", about)
    return about


def show_prompt(config: AnalyzeConfig, prompt: str) -> tuple[Table, str]:
    """Leave analysis_prompt.json and prompt.html of one text; a table to print, and a line that
    says what "many tokens" are.

    Raises InputError for bad input, before anything is written.
    """
    out = config.out or config.run
    mlsae, stream = _open(config, choose_device(config.device))
    ids = tokenize(stream, prompt)
    picture = read_prompt(mlsae, stream, ids, token_strings(stream.tokenizer))
    profile, many = _many(out, config.run, (mlsae.config.n_latents, len(picture["layers"])))
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "analysis_prompt.json", picture)
    write_file(out / "prompt.html", prompt_page(picture, profile).encode())
    return prompt_table(picture, profile), many


def _open(config: AnalyzeConfig, device: torch.device) -> tuple[MLSAE, DataStream]:
    for name, least in (("examples", 0), ("groups", 1), ("count_threshold", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"--{name} must be at least {least}, got {value}")
    return open_run(config, device)


def _directions(
    mlsae: MLSAE, stream: DataStream, strings: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the decoder's rows point at: columns of the table of latents, and what analysis.json
    says of them all."""
    W_dec, W_enc = mlsae.sae.W_dec, mlsae.sae.W_enc
    near = neighbors(W_dec)
    control, control_mmcs = random_cosines(near.edges, *W_dec.shape[::-1])
    embeddings = embeddings_of(stream.reader.model, stream.d_in, len(strings))
    tokens = {
        side: None if weight is None else nearest_tokens(W_dec, weight, _NEAREST_TOKENS)
        for side, weight in embeddings.items()
    }
    columns = {
        "encoder_cosine": F.cosine_similarity(W_enc, W_dec, dim=1).cpu(),
        **direction_columns(near, tokens, strings),
    }
    return columns, {
        "mmcs": {
            "value": near.cosine.mean().item(),
            "low": None,  # of the weights, not of a text
            "high": None,
            "random": control_mmcs,
        },
        "cosine_histogram": {
            "edges": near.edges.tolist(),
            "decoder": near.share.tolist(),
            "random": control.tolist(),
        },
        "embeddings": {
            side: None if found is None else found.cosine[:, 0].mean().item()
            for side, found in tokens.items()
        },
    }


def _many(out: Path, run: Path, shape: tuple[int, int]) -> tuple[Tensor | None, str]:
    """Where latents are active over many tokens, (M, L): from the analysis that is there, else
    from the held-out text of training; None where there is neither, of this shape. And a line
    that says which."""
    for path, name in (
        (out / "analysis.safetensors", "profile"),
        (run / "analysis.safetensors", "profile"),
        (run / "latents.safetensors", "totals"),
    ):
        if path.exists():
            found = safetensors.torch.load_file(path)[name].double()
            if found.shape == shape:
                return found / found.sum(1, keepdim=True), f"over many: {name} of {path}"
    return None, "over many: nothing of these layers; run mlsae.analyze without --prompt first"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=2, allow_nan=False).encode())


def parse(arguments: Sequence[str]) -> AnalyzeConfig:
    """The settings of a command line."""
    return tyro.cli(
        AnalyzeConfig,
        args=arguments,
        description=(__doc__ or "").split("Legend:")[0],
        use_underscores=True,
        prog="python -m mlsae.analyze",
    )


def main() -> None:
    """The program."""
    config = parse(sys.argv[1:])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(highlight=False)
    with exit_on_bad_input():
        if config.prompt is None:
            print_analysis(analyze(config), config.out or config.run, config.tokens)
        else:
            table, many = show_prompt(config, config.prompt)
            console.print(table, many, sep="\n", soft_wrap=True)
            console.print(f"picture: {(config.out or config.run) / 'prompt.html'}", soft_wrap=True)
        redraw(config.out or config.run)


if __name__ == "__main__":
    main()
