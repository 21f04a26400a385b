"""The settings of a training run: what `python -m mlsae.train --help` explains.

Legend: M latents.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from . import builtin
from .errors import InputError

Values = Annotated[int | tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")]


@dataclass(frozen=True)
class SAEConfig:
    """The sparse autoencoder. Of several expansions (or numbers of latents) and several ks, each
    combination is one that is trained beside the others, and has a folder in OUT: x16-k32, …"""

    expansion: Values = 16
    """Latents per dimension of the residual stream (R): n_latents = expansion · d_model."""
    n_latents: Values | None = None
    """Latents, instead of an expansion."""
    k: Values = 32
    """Active latents a token and layer."""
    standardize: bool = True
    """Whether each vector is standardized before encoding."""
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

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = builtin.NAME
    """A causal language model: "builtin", a name on the Hugging Face hub, or a local folder."""
    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[DATASET]")] = builtin.NAME
    """Text: "builtin", a dataset on the hub (streamed), or a local file or folder of .txt, .jsonl,
    .jsonl.zst or .parquet."""
    sae: SAEConfig = field(default_factory=SAEConfig)
    layers: tuple[int, ...] | None = None
    """Layers to train on, the first being 0. None: all."""
    tokens: int = 800_000
    """Tokens to train on; each gives one vector a layer."""
    batch_tokens: int = 2048
    """Tokens an optimizer step sees."""
    micro_tokens: int | None = None
    """Tokens held in memory at a time; bounds memory and changes nothing else. None: all of a
    batch."""
    seq_len: int | None = None
    """Tokens a row. None: the model's context, 2048 at most."""
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the transformer computes in. auto: as it was saved on CUDA, else float32."""
    model_device_map: str | None = None
    """Where the transformer is, if not whole on the SAE's device: a device (cuda:1), or a way to
    spread it of accelerate, which must be installed. auto: over all GPUs, leaving room for the
    SAE on its own; what does not fit is in the CPU's memory, and then on the disk."""
    model_quantize: Literal["8bit", "4bit"] | None = None
    """Load the transformer quantized, by bitsandbytes, which must be installed."""
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
    """auto: CUDA where there is one, else the CPU. Of the processes that torchrun starts on a
    node, each takes a GPU."""
    shard_latents: int = 1
    """Processes (GPUs) that share the latents of an SAE out among them, where it is too large for
    one. torchrun's number of processes must be a multiple; groups of so many share the tokens."""
    timeout: float = 600
    """Seconds that a process waits for the others before it ends the run."""
    max_grad_norm: float | None = None
    """Clip the gradient of all weights together to this norm. None: no clipping."""
    eval_tokens: int = 65_536
    """Held-out tokens that figures are measured on."""
    eval_every: int | None = None
    """Tokens between two measurements on held-out text. None: only at the end."""
    log_tokens: int | None = None
    """Tokens between two lines of metrics.jsonl. None: a hundredth of the run."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log to TensorBoard (OUT/tensorboard) or Weights & Biases, where installed."""
    checkpoint_tokens: int | None = None
    """Tokens between two checkpoints. None: a twentieth of the run."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, the newest ones."""
    seed: int = 0
    """Seed of the initial weights and of the order of rows."""
    out: Path = Path("runs/mlsae")
    """Folder for the run; it must be new or empty."""
    push_to_hub: str | None = None
    """At the end, push the run to this repository of the Hugging Face hub, user/name; of several
    runs, each to user/name-RUN. You must be logged in (`hf auth login`), which is checked first."""
    overwrite: bool = False
    """Replace the run that is in the folder."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder, to the same bits as if never stopped; from
    the start where there is none yet."""
    preset: Literal["default", "paper"] = "default"
    """What the settings that are not given default to. paper: all of Lawson et al. (arXiv
    2409.04185): expansion 64, k 32, 10⁹ tokens in batches of 131,072, constant rate 1e-4."""


PRESETS = {
    "default": TrainConfig(),
    "paper": TrainConfig(
        sae=SAEConfig(expansion=64, k=32, aux_weight=1 / 32, dead_tokens=10_000_000),
        tokens=1_000_000_000,
        batch_tokens=131_072,
        lr=1e-4,
        warmup=0.0,
        decay=0.0,
        preset="paper",
    ),
}

_FREE_ON_RESUME = (  # what may differ from the run that is resumed
    "out",
    "push_to_hub",
    "overwrite",
    "resume",
    "preset",
    "device",
    "model_device_map",
    "shard_latents",
    "timeout",
    "micro_tokens",
    "log",
    "checkpoint_tokens",
    "keep_checkpoints",
)


def values_of(setting: Values) -> tuple[int, ...]:
    """The values of a setting that takes one or several."""
    return setting if isinstance(setting, tuple) else (setting,)


def runs_of(config: TrainConfig) -> dict[str, TrainConfig]:
    """The runs that `config` asks for, by name: one for each of its expansions (or numbers of
    latents) and ks, with the settings it has when trained alone. A single run is in the folder
    `out`; each of several is in one of its own there, of its name: "x16-k32", or "n4096-k32"."""
    sae = config.sae
    if sae.n_latents is None:
        saes = {
            f"x{expansion}-k{k}": replace(sae, expansion=expansion, k=k)
            for expansion, k in product(values_of(sae.expansion), values_of(sae.k))
        }
    else:
        saes = {
            f"n{n_latents}-k{k}": replace(sae, n_latents=n_latents, k=k)
            for n_latents, k in product(values_of(sae.n_latents), values_of(sae.k))
        }
    alone = len(saes) == 1
    return {
        name: replace(config, sae=sae, out=config.out if alone else config.out / name)
        for name, sae in saes.items()
    }


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The settings as JSON has them."""
    settings: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return settings


def check_same(config: TrainConfig, saved: dict[str, Any]) -> None:
    """Raise InputError if `config` would not continue the run of the `saved` settings."""
    now = settings_of(config)
    for name, value in _flat(now).items():
        old = _flat(saved).get(name)
        if name not in _FREE_ON_RESUME and value != old:
            raise InputError(
                f"--{name} must be {_shown(old)} to resume this run, as it began, got "
                f"{_shown(value)}; give the same settings, or another --out"
            )


def _shown(value: Any) -> str:
    """A setting as it is given on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def check_config(config: TrainConfig) -> None:
    """Raise InputError for settings that no model or data could make right."""
    positive = (
        "tokens", "batch_tokens", "eval_tokens", "micro_tokens", "seq_len", "log_tokens",
        "eval_every", "checkpoint_tokens", "keep_checkpoints", "shard_latents",
    )  # fmt: skip
    for owner, prefix, names in (
        (config, "--", positive),
        (config.sae, "--sae.", ("expansion", "n_latents", "k", "k_aux", "dead_tokens")),
    ):
        for name in names:
            setting = getattr(owner, name)
            values = () if setting is None else values_of(setting)
            if any(value < 1 for value in values):
                raise InputError(f"{prefix}{name} must be at least 1, got {min(values)}")
            if len(set(values)) < len(values) or setting == ():
                raise InputError(
                    f"{prefix}{name} must have one value or several different ones, got "
                    f"{' '.join(map(str, values)) or 'none'}"
                )
    if config.sae.n_latents is not None and len(values_of(config.sae.expansion)) > 1:
        raise InputError(
            "--sae.n_latents is instead of --sae.expansion, which has the values "
            f"{' '.join(map(str, values_of(config.sae.expansion)))}; give one of them"
        )
    for name in ("lr", "max_grad_norm", "timeout"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} must be greater than 0, got {value}")
    if config.overwrite and config.resume:
        raise InputError("--overwrite and --resume exclude each other; give one of them")
    for name in ("warmup", "decay"):
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(f"--{name} must be in [0, 1], got {getattr(config, name)}")


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
