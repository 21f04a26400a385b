"""Train a multi-layer SAE on the residual stream of every layer of a transformer.

    python -m mlsae.train                                    # built-in model and corpus, offline
    python -m mlsae.train EleutherAI/pythia-70m-deduped monology/pile-uncopyrighted \\
        --sae.expansion 64 --sae.k 32 --tokens 1000000000 --batch_tokens 131072 --out runs/70m

It leaves a folder that stands alone: config.json, model.safetensors, latents.safetensors,
metrics.jsonl and report.html. `MLSAE.from_pretrained(FOLDER)` loads it.

Legend: L layers, B rows, T positions, N tokens, D width of the residual stream, M latents.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import safetensors.torch
import torch
import transformers
import tyro
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from . import data
from .activations import ResidualReader, choose_device, load_transformer
from .config import TrainConfig, check_config, learning_rate
from .errors import InputError, exit_on_bad_input
from .evaluate import Evaluation, evaluate
from .files import check_out, write_file
from .model import MLSAE, MLSAEConfig
from .report import write_report
from .trainer import Trainer

RUN_FILES = (
    "config.json",
    "model.safetensors",
    "latents.safetensors",
    "metrics.jsonl",
    "report.html",
)


def resolve(config: TrainConfig, reader: ResidualReader) -> tuple[MLSAEConfig, int]:
    """The MLSAE that `config` asks for on this model, and the length of its rows."""
    text_config = reader.model.config.get_text_config()  # type: ignore[operator, union-attr]
    d_in = text_config.hidden_size
    n_latents = config.sae.n_latents or config.sae.expansion * d_in
    if config.sae.k > n_latents:
        raise InputError(
            f"--sae.k must be in [1, {n_latents}] (the number of latents), got {config.sae.k}"
        )
    context = getattr(text_config, "max_position_embeddings", None) or 2048
    seq_len = config.seq_len or min(context, 2048)
    if seq_len > context:
        raise InputError(
            f"--seq_len must be at most {context} (the model's context), got {seq_len}"
        )
    smallest = min(config.batch_tokens, config.micro_tokens or config.batch_tokens)
    if smallest < seq_len:
        raise InputError(
            f"--batch_tokens and --micro_tokens must be at least {seq_len} (a row; see --seq_len), "
            f"got {smallest}"
        )
    return MLSAEConfig(
        d_in, n_latents, config.sae.k, reader.layers, config.sae.standardize, config.model
    ), seq_len


class Source:
    """Rows of tokens, and the residuals of the transformer at them.

    Raises InputError where the model or the settings cannot be had or do not fit one another.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        model, self.tokenizer = load_transformer(config.model, device)
        self.reader = ResidualReader(model, config.layers)
        self.mlsae_config, self.seq_len = resolve(config, self.reader)
        self.config, self.device = config, device
        self.micro_rows = (config.micro_tokens or config.batch_tokens) // self.seq_len

    def batches(self) -> Iterator[Tensor]:
        """Batches (B, T) to train on, without end."""
        config, rows = self.config, self.config.batch_tokens // self.seq_len
        return data.batches(
            config.dataset,
            self.tokenizer,
            self.seq_len,
            rows,
            column=config.column,
            seed=config.seed,
        )

    def heldout(self) -> Tensor:
        """Rows (B, T) that are never trained on, `eval_tokens` in all where there are as many."""
        config = self.config
        rows = data.rows(
            config.dataset,
            self.tokenizer,
            self.seq_len,
            "heldout",
            column=config.column,
            seed=config.seed,
        )
        return torch.stack(list(islice(rows, max(1, config.eval_tokens // self.seq_len))))

    def count(self, input_ids: Tensor) -> int:
        """Tokens of rows (B, T), special ones dropped."""
        return int(data.not_special(input_ids, self.tokenizer).sum())

    def residuals(self, input_ids: Tensor) -> Iterator[Tensor]:
        """Residuals (L, N, D) of rows (B, T), special tokens dropped, a part at a time."""
        for part in input_ids.to(self.device).split(self.micro_rows):
            yield self.reader(part)[:, data.not_special(part, self.tokenizer)].float()


def train(config: TrainConfig) -> MLSAE:
    """Train as `config` says; leave the run in `config.out`.

    Raises InputError for bad input, before anything is written.
    """
    check_config(config)
    torch.manual_seed(config.seed)

    # What is read: the transformer, the layers of it, the text.
    source = Source(config, choose_device(config.device))
    check_out(config.out, config.overwrite, _run_bytes(source.mlsae_config))
    heldout = source.heldout()
    batches = source.batches()
    first_batch = next(batches)

    # What is trained. The first batch sets b_pre and the first variances, then is trained on.
    trainer = _new_trainer(config, source)
    trainer.initialize(source.residuals(first_batch))

    # Train, and measure on held-out rows.
    _empty(config.out)
    with (config.out / "metrics.jsonl").open("a") as metrics_file:
        last_line = _fit(trainer, source, chain([first_batch], batches), metrics_file)
        with trainer.autocast():
            figures = evaluate(trainer.mlsae, source.residuals(heldout))
        measured = {"tokens": trainer.tokens, "heldout": figures.as_dict()}
        print(json.dumps(measured), file=metrics_file)

    # Leave a folder that stands alone.
    trainer.mlsae.save_pretrained(
        config.out,
        training=json.loads(json.dumps(asdict(config), default=str)),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
    latents = {
        "totals": figures.totals.float().contiguous().cpu(),
        "counts": figures.counts.long().contiguous().cpu(),
    }
    write_file(config.out / "latents.safetensors", safetensors.torch.save(latents))
    write_report(config.out)
    _print_summary(config.out, source.mlsae_config, figures, last_line)
    return trainer.mlsae


def _new_trainer(config: TrainConfig, source: Source) -> Trainer:
    d_in, device = source.mlsae_config.d_in, source.device
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    return Trainer(
        MLSAE(source.mlsae_config, device),
        dead_tokens=config.sae.dead_tokens or min(10_000_000, math.ceil(config.tokens / 10)),
        k_aux=config.sae.k_aux or 2 ** round(math.log2(max(d_in / 2, 1))),
        aux_weight=config.sae.aux_weight,
        dtype=torch.bfloat16 if half else torch.float32,
    )


def _fit(
    trainer: Trainer, source: Source, batches: Iterator[Tensor], metrics_file: TextIO
) -> dict[str, Any]:
    """Train on `batches` up to the tokens asked for, a line of metrics each `log_tokens`; return
    the last line."""
    config = source.config
    log_tokens = config.log_tokens or math.ceil(config.tokens / 100)
    window, started = trainer.sums(), time.perf_counter()
    window_started = started
    line: dict[str, Any] = {}
    with tqdm(total=config.tokens, unit=" tokens", unit_scale=True, desc="training") as bar:
        while trainer.tokens < config.tokens:
            input_ids = next(batches)
            n_tokens = source.count(input_ids)
            lr = learning_rate(config, source.mlsae_config.n_latents, trainer.tokens)
            window.add(trainer.step(source.residuals(input_ids), n_tokens, lr))
            bar.update(n_tokens)
            if window.moments.count < log_tokens and trainer.tokens < config.tokens:
                continue
            now = time.perf_counter()
            line = {
                "tokens": trainer.tokens,
                "steps": trainer.steps,
                "loss": window.loss.item() / window.steps,
                "fvu": window.fvu().mean().item(),
                "fvu_layers": window.fvu().tolist(),
                "aux": window.aux.item() / window.steps,
                "dead": trainer.dead().double().mean().item(),
                "lr": lr,
                "tokens_per_second": window.moments.count / (now - window_started),
                "seconds": now - started,
            }
            print(json.dumps(line), file=metrics_file, flush=True)
            bar.set_postfix(fvu=f"{line['fvu']:.3f}", dead=f"{line['dead']:.1%}")
            window, window_started = trainer.sums(), now
    return line


def _run_bytes(config: MLSAEConfig) -> int:
    """What a run takes on the disk: two weights, the counts of latents, the report."""
    return 4 * config.n_latents * (2 * config.d_in + 3 * len(config.layers)) + 12 * 2**20


def _empty(folder: Path) -> None:
    """Make the folder, and remove the run in it, if any: `check_out` has said that it may."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)


def _print_summary(
    out: Path, config: MLSAEConfig, figures: Evaluation, last_line: dict[str, Any]
) -> None:
    console = Console(highlight=False)
    console.print(figures.table(config.layers))
    tokens, seconds = last_line["tokens"], last_line["seconds"]
    console.print(
        f"trained on {tokens:,} tokens in {seconds:.0f} s ({tokens / seconds:,.0f} tokens/s); "
        f"{last_line['dead']:.1%} of {config.n_latents:,} latents dead",
        soft_wrap=True,
    )
    console.print(f"run: {out}\nreport: {out / 'report.html'}", soft_wrap=True)


def main() -> None:
    """The program."""
    config = tyro.cli(
        TrainConfig,
        description=(__doc__ or "").split("Legend:")[0],
        use_underscores=True,
        prog="python -m mlsae.train",
    )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with exit_on_bad_input():
        train(config)


if __name__ == "__main__":
    main()
