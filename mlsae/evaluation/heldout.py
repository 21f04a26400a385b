"""Open a trained MLSAE, and the transformer and held-out text to measure it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ..config import SAEConfig, TrainConfig
from ..data.stream import DataStream
from ..errors import InputError
from ..model import MLSAE

_DEFAULT_MICRO_TOKENS = 2048


@dataclass(frozen=True)
class HeldoutConfig:
    """Which MLSAE to measure, and on what."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a trained MLSAE, or its name on the Hugging Face hub."""
    dataset: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DATASET]")] = None
    """Text: "builtin", a dataset on the hub (streamed), or a local file or folder; its held-out
    rows are used. None: the text that the run was trained on."""
    tokens: int = 65_536
    """Held-out tokens to measure on, counting special ones; fewer if the text has fewer."""
    layers: tuple[int, ...] | None = None
    """Layers to measure at; they may be others than those it was trained on. None: those it was
    trained on, or all if not known."""
    model: str | None = None
    """The transformer. None: the one it was trained on."""
    column: str | None = None
    """The dataset's column of text. None: as in the run, or "text"."""
    seq_len: int | None = None
    """Tokens per row. None: as in the run."""
    micro_tokens: int | None = None
    """Tokens held in memory at a time; changes nothing else. None: 2,048, or one row if rows are
    longer."""
    resamples: int = 1000
    """Bootstrap resamples of the rows, for the intervals."""
    seed: int | None = None
    """Seed of the order of rows, of examples and of the bootstrap. None: the run's, which gives
    the held-out rows that its training validated on."""
    device: str = "auto"
    """auto: CUDA if available, else the CPU."""
    out: Path | None = None
    """Folder for the results. None: the run's folder, which must then be local."""


def open_run(config: HeldoutConfig, device: torch.device) -> tuple[MLSAE, DataStream]:
    """Load the MLSAE of `config.run`, and open the transformer and text to measure it on.

    Raises InputError for bad input, before anything is measured.
    """
    for name in ("tokens", "resamples", "seq_len", "micro_tokens"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    mlsae = MLSAE.from_pretrained(config.run, device).requires_grad_(False)
    if config.out is None and not config.run.exists():
        raise InputError(f"--out must be given if RUN is on the hub, as {config.run} is, got none")
    stream = DataStream(_settings(config, mlsae), device)
    if stream.d_in != mlsae.config.d_in:
        raise InputError(
            f"MODEL must have a residual stream of width {mlsae.config.d_in}, as the MLSAE in "
            f"{config.run}, and {stream.config.model} has {stream.d_in}; give the model that the "
            "MLSAE was trained on with --model"
        )
    return mlsae, stream


def _settings(config: HeldoutConfig, mlsae: MLSAE) -> TrainConfig:
    """Training settings that read the text and the layers to measure at."""
    trained = mlsae.about.get("training", {})
    dataset = config.dataset or trained.get("dataset")
    model = config.model or mlsae.config.model
    for name, value in (("DATASET", dataset), ("--model", model)):
        if not value:
            raise InputError(
                f"{name} must be given, since config.json in {config.run} names none, got none"
            )
    seq_len = config.seq_len or trained.get("seq_len")
    micro_tokens = config.micro_tokens or max(_DEFAULT_MICRO_TOKENS, seq_len or 0)
    return TrainConfig(
        model,
        dataset,
        SAEConfig(n_latents=mlsae.config.n_latents, k=mlsae.config.k),
        layers=config.layers or mlsae.config.layers or None,
        batch_tokens=micro_tokens,
        micro_tokens=micro_tokens,
        seq_len=seq_len,
        model_dtype=trained.get("model_dtype", "auto"),
        model_device_map=trained.get("model_device_map"),
        model_quantize=trained.get("model_quantize"),
        column=config.column or trained.get("column", "text"),
        eval_tokens=config.tokens,
        seed=config.seed if config.seed is not None else trained.get("seed", 0),
    )
