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
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import transformers
import tyro
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from . import builtin, data
from .activations import ResidualReader, choose_device, load_transformer
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


@dataclass(frozen=True)
class SAEConfig:
    """The sparse autoencoder."""

    expansion: int = 16
    """Latents per dimension of the residual stream (R): n_latents = expansion · d_model."""
    n_latents: int | None = None
    """Latents, instead of an expansion."""
    k: int = 32
    """Active latents a token and layer."""
    standardize: bool = True
    """Whether each vector is standardised before encoding."""
    aux_weight: float = 1 / 32
    """Weight of the AuxK loss, which revives dead latents."""
    k_aux: int | None = None
    """Dead latents that AuxK activates a token. None: the power of two nearest to d_model / 2."""
    dead_tokens: int | None = None
    """A latent is dead when inactive for this many tokens. None: 10 million, or a tenth of the
    run where that is less."""


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how."""

    model: tyro.conf.Positional[str] = builtin.NAME
    """A causal language model: "builtin", a name on the Hugging Face hub, or a local folder."""
    dataset: tyro.conf.Positional[str] = builtin.NAME
    """Text: "builtin", a dataset on the hub (streamed), or a local file or folder of .txt, .jsonl,
    .jsonl.zst or .parquet."""
    sae: SAEConfig = field(default_factory=SAEConfig)
    layers: tuple[int, ...] | None = None
    """Layers to train on, the first being 0. None: all."""
    tokens: int = 1_000_000
    """Tokens to train on; each gives one vector a layer."""
    batch_tokens: int = 2048
    """Tokens an optimizer step sees."""
    micro_tokens: int | None = None
    """Tokens held in memory at a time; bounds memory and changes nothing else. None: all of a
    batch."""
    seq_len: int | None = None
    """Tokens a row. None: the model's context, 2048 at most."""
    column: str = "text"
    """The dataset's column of text."""
    lr: float | None = None
    """Peak learning rate of Adam. None: 2e-4 / √(n_latents / 2¹⁴), times (10⁹ / tokens)^0.32."""
    warmup: float = 0.01
    """Share of the tokens over which the learning rate rises from 0."""
    decay: float = 0.2
    """Share of the tokens over which the learning rate falls to 0, at the end."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the SAE computes in; its weights stay float32. auto: bfloat16 on CUDA, else float32."""
    device: str = "auto"
    """auto: CUDA where there is one, else the CPU."""
    eval_tokens: int = 65_536
    """Held-out tokens that the final figures are measured on."""
    log_tokens: int | None = None
    """Tokens between two lines of metrics.jsonl. None: a hundredth of the run."""
    seed: int = 0
    """Seed of the initial weights and of the order of rows."""
    out: Path = Path("runs/mlsae")
    """Folder for the run; it must be new or empty."""
    overwrite: bool = False
    """Replace the run that is in the folder."""


def check_config(config: TrainConfig) -> None:
    """Raise InputError for settings that no model or data could make right."""
    positive = ("tokens", "batch_tokens", "eval_tokens", "micro_tokens", "seq_len", "log_tokens")
    for owner, prefix, names in (
        (config, "--", positive),
        (config.sae, "--sae.", ("expansion", "n_latents", "k", "k_aux", "dead_tokens")),
    ):
        for name in names:
            value = getattr(owner, name)
            if value is not None and value < 1:
                raise InputError(f"{prefix}{name} must be at least 1, got {value}")
    if config.lr is not None and not 0 < config.lr < math.inf:
        raise InputError(f"--lr must be greater than 0, got {config.lr}")
    for name in ("warmup", "decay"):
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(f"--{name} must be in [0, 1], got {getattr(config, name)}")


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


def learning_rate(config: TrainConfig, n_latents: int, tokens: int) -> float:
    """The rate after `tokens` tokens: linear up over `warmup`, level, linear down over `decay`.

    The peak defaults to 2e-4 / √(M / 2¹⁴) · (10⁹ / run's tokens)^0.32: the law of Gao et al. (arXiv
    2406.04093, App. A) for the paper's 10⁹ tokens, and the growth of the best rate with a shorter
    horizon that Bjorck et al. found (arXiv 2409.19913).
    """
    law = 2e-4 / math.sqrt(n_latents / 2**14) * (1e9 / config.tokens) ** 0.32
    peak = config.lr if config.lr is not None else law
    done = (tokens + config.batch_tokens / 2) / config.tokens
    up = done / config.warmup if config.warmup else 1.0
    down = (1 - done) / config.decay if config.decay else 1.0
    return peak * max(0.0, min(1.0, up, down))


def train(config: TrainConfig) -> MLSAE:
    """Train as `config` says; leave the run in `config.out`.

    Raises InputError for bad input, before anything is written.
    """
    check_config(config)
    torch.manual_seed(config.seed)
    device = choose_device(config.device)

    # What is read: the transformer, the layers of it, the text.
    model, tokenizer = load_transformer(config.model, device)
    reader = ResidualReader(model, config.layers)
    mlsae_config, seq_len = resolve(config, reader)
    check_out(config.out, config.overwrite, _run_bytes(mlsae_config))
    micro_rows = (config.micro_tokens or config.batch_tokens) // seq_len
    batches = data.batches(
        config.dataset,
        tokenizer,
        seq_len,
        config.batch_tokens // seq_len,
        column=config.column,
        seed=config.seed,
    )

    def residuals(input_ids: Tensor) -> Iterator[Tensor]:
        """The residuals (L, N, D) of rows (B, T), special tokens dropped, a part at a time."""
        for part in input_ids.to(device).split(micro_rows):
            yield reader(part)[:, data.not_special(part, tokenizer)].float()

    # What is trained. The first batch sets b_pre and the first variances, then is trained on.
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    trainer = Trainer(
        MLSAE(mlsae_config, device),
        dead_tokens=config.sae.dead_tokens or min(10_000_000, math.ceil(config.tokens / 10)),
        k_aux=config.sae.k_aux or 2 ** round(math.log2(max(mlsae_config.d_in / 2, 1))),
        aux_weight=config.sae.aux_weight,
        dtype=torch.bfloat16 if half else torch.float32,
    )
    first_batch = next(batches)
    trainer.initialize(residuals(first_batch))

    # Train.
    _empty(config.out)
    log_tokens = config.log_tokens or math.ceil(config.tokens / 100)
    window, started = trainer.sums(), time.perf_counter()
    window_started = started
    with (
        (config.out / "metrics.jsonl").open("a") as metrics_file,
        tqdm(total=config.tokens, unit=" tokens", unit_scale=True, desc="training") as bar,
    ):
        for input_ids in chain([first_batch], batches):
            n_tokens = int(data.not_special(input_ids, tokenizer).sum())
            lr = learning_rate(config, mlsae_config.n_latents, trainer.tokens)
            window.add(trainer.step(residuals(input_ids), n_tokens, lr))
            bar.update(n_tokens)
            if window.moments.count < log_tokens and trainer.tokens < config.tokens:
                continue
            now = time.perf_counter()
            last_line = {
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
            print(json.dumps(last_line), file=metrics_file, flush=True)
            bar.set_postfix(fvu=f"{last_line['fvu']:.3f}", dead=f"{last_line['dead']:.1%}")
            window, window_started = trainer.sums(), now
            if trainer.tokens >= config.tokens:
                break

        # Measure on held-out rows.
        heldout = data.rows(
            config.dataset, tokenizer, seq_len, "heldout", column=config.column, seed=config.seed
        )
        rows = torch.stack(list(islice(heldout, max(1, config.eval_tokens // seq_len))))
        with trainer.autocast():
            figures = evaluate(trainer.mlsae, residuals(rows))
        print(
            json.dumps({"tokens": trainer.tokens, "heldout": figures.as_dict()}), file=metrics_file
        )

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
    _print_summary(config.out, mlsae_config, figures, last_line)
    return trainer.mlsae


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
        f"{last_line['dead']:.1%} of {config.n_latents:,} latents dead"
    )
    console.print(f"run: {out}\nreport: {out / 'report.html'}", soft_wrap=True)


def main() -> None:
    """The program."""
    config = tyro.cli(
        TrainConfig, description=(__doc__ or "").split("Legend:")[0], use_underscores=True
    )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with exit_on_bad_input():
        train(config)


if __name__ == "__main__":
    main()
