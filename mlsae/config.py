"""The settings of a training run: what `python -m mlsae.train --help` explains.

Legend: D width of the residual stream, M latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .batchtopk import check_activation
from .data.config import DataConfig, check_seed
from .data.heldout_split import check_share
from .errors import InputError

Ints = Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")]


@dataclass(frozen=True)
class SAEOptions:
    """The settings of an SAE that a sweep does not vary."""

    standardize: bool = True
    """Whether each vector is standardized before encoding."""
    aux_weight: float = 1 / 32
    """Weight of the AuxK loss, which revives dead latents. 0: it is not computed."""
    k_aux: int | None = None
    """Dead latents that AuxK activates per token. None: the power of two nearest to d_model / 2."""
    dead_tokens: int | None = None
    """A latent is dead once inactive for this many tokens. None: 10 million, or a tenth of the
    run if that is less."""
    init: Literal["fitted", "unit", "linear"] = "fitted"
    """The first encoder. unit: equal to the decoder, whose rows are random, of norm 1. fitted:
    that, scaled to reconstruct the first batch best. linear: as torch.nn.Linear draws it, and the
    decoder with it, its rows then of norm 1; the paper's."""
    activation: Literal["topk", "batchtopk"] = "topk"
    """topk: the k largest of each vector. batchtopk: the k · n largest of the n vectors of a part
    of a batch (see --micro_tokens), all layers and tokens together; k is then the mean."""
    k_max: int | None = None
    """The most latents that batchtopk activates per token and layer. None: 4 · k."""


@dataclass(frozen=True)
class SAEConfig(SAEOptions):
    """The sparse autoencoder."""

    expansion: int = 16
    """Latents per dimension of the residual stream (R): n_latents = expansion · d_model."""
    n_latents: int | None = None
    """Latents, instead of an expansion."""
    k: int = 32
    """Active latents per token and layer."""

    @property
    def name(self) -> str:
        """What tells it from the other SAEs of a sweep: "x16-k32", or "n4096-k32"."""
        size = f"x{self.expansion}" if self.n_latents is None else f"n{self.n_latents}"
        return f"{size}-k{self.k}"


@dataclass(frozen=True)
class SAESweep(SAEOptions):
    """The sparse autoencoder. With several expansions (or numbers of latents) or several ks, every
    combination is an SAE that trains beside the others, in a folder in OUT: x16-k32, …"""

    expansion: Ints = (16,)
    """Latents per dimension of the residual stream (R): n_latents = expansion · d_model."""
    n_latents: Ints = ()
    """Latents, instead of an expansion."""
    k: Ints = (32,)
    """Active latents per token and layer."""

    def configs(self) -> list[SAEConfig]:
        """Every combination. Raises InputError if a setting has no value, or one value twice."""
        for name in ("expansion", "n_latents", "k"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or (not values and name != "n_latents"):
                raise InputError(
                    f"--sae.{name} must have one value or several different ones, got "
                    f"{' '.join(map(str, values)) or 'none'}"
                )
        if self.n_latents and len(self.expansion) > 1:
            raise InputError(
                "--sae.n_latents is instead of --sae.expansion, which has the values "
                f"{' '.join(map(str, self.expansion))}; give one of them"
            )
        options = {f.name: getattr(self, f.name) for f in fields(SAEOptions)}
        return [
            SAEConfig(expansion=expansion, n_latents=n_latents, k=k, **options)
            for expansion, n_latents, k in product(
                self.expansion, self.n_latents or (None,), self.k
            )
        ]


@dataclass(frozen=True)
class TrainSettings:
    """What to train on, how, and what to leave."""

    data: tyro.conf.OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    tokens: int = 800_000
    """Tokens to train on; each gives one vector per layer. More of them with --resume extend a run:
    its peak rate and warm-up stay, and the decay is that of the new number."""
    batch_tokens: int = 2048
    """Tokens per optimizer step."""
    micro_tokens: int | None = None
    """Tokens held in memory at a time; bounds memory and changes nothing else, but for what
    batchtopk selects among. None: a whole batch."""
    lr: float | None = None
    """Peak learning rate. None: 2e-4 / √(n_latents / 2¹⁴), times (10⁹ / tokens)^0.32; twice that
    with NorMuon."""
    optimizer: Literal["adam", "normuon"] = "normuon"
    """What trains both weights. adam: Adam. normuon: its updates are orthogonalized and have one
    size for every latent; it needs one moment instead of two. Biases always have Adam."""
    decoder_optimizer: Literal["adam", "normuon"] | None = None
    """What trains the decoder, if it is another. None: `--optimizer`."""
    betas: tuple[float, float] = (0.7, 0.95)
    """Decay per step of the running averages of gradients and of their squares."""
    warmup: float = 0.01
    """Share of the tokens over which the learning rate rises from 0."""
    decay: float = 0.2
    """Share of the tokens over which the learning rate falls to 0, at the end."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the SAE computes in; its weights stay float32. auto: bfloat16 on CUDA, else float32."""
    device: str = "auto"
    """auto: CUDA if there is a GPU, else the CPU. Of the processes that torchrun starts on a node,
    each takes a GPU."""
    shard_latents: int = 1
    """Processes (GPUs) that split the latents of an SAE among them, if it is too large for one.
    torchrun's number of processes must be a multiple; groups of so many share the tokens."""
    timeout: float = 600
    """Seconds that a process waits for the others before it ends the run."""
    max_grad_norm: float | None = None
    """Clip the gradient of all weights together to this norm. None: no clipping."""
    eval_tokens: int = 65_536
    """Held-out tokens that the validation metrics are measured on."""
    eval_every: int | None = None
    """Tokens between two validations. None: only at the end."""
    log_tokens: int | None = None
    """Tokens between two lines of metrics.jsonl. None: a hundredth of the run."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log to TensorBoard (OUT/tensorboard) or Weights & Biases, which must be installed."""
    checkpoint_tokens: int | None = None
    """Tokens between two checkpoints. None: a twentieth of the run."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, the newest ones."""
    init_from: str | None = None
    """Start from the weights of a trained SAE: a run's folder, a name on the Hugging Face hub, or a
    file or folder of another library's format. Latents, k, standardization and batchtopk are then
    its own. None: random weights."""
    seed: int = 0
    """Seed of the initial weights and of the order of rows."""
    out: Path = Path("runs/mlsae")
    """Folder for the run; it must be new or empty."""
    push_to_hub: str | None = None
    """At the end, push the run to this repository of the Hugging Face hub, user/name; several SAEs
    go to user/name-x16-k32, …. You must be logged in (`hf auth login`), which is checked first."""
    overwrite: bool = False
    """Replace the run that is in the folder."""
    resume: bool = False
    """Resume from the newest checkpoint in the folder, to the same bits as if never stopped; start
    from the beginning if there is none yet."""
    moved: bool = False
    """With --resume: the model or the dataset has other files or another name than when the run
    began; go on with those given here, without comparing them."""
    preset: Literal["default", "paper"] = "default"
    """What the settings that are not given default to. paper: all of Lawson et al. (arXiv
    2409.04185): expansion 64, k 32, 10⁹ tokens in batches of 131,072, constant rate 1e-4, and no
    tokens dropped but special ones."""


@dataclass(frozen=True)
class TrainConfig(TrainSettings):
    """One SAE to train, on what, and how."""

    sae: SAEConfig = field(default_factory=SAEConfig)


@dataclass(frozen=True)
class TrainArguments(TrainSettings):
    """What to train, on what, and how: the command line, which may name several SAEs."""

    sae: SAESweep = field(default_factory=SAESweep)

    @classmethod
    def defaults(cls, config: TrainConfig) -> TrainArguments:
        """The command line that gives just `config`."""
        sae = asdict(config.sae)
        for name in ("expansion", "n_latents", "k"):
            sae[name] = () if sae[name] is None else (sae[name],)
        return cls(**_settings(config), sae=SAESweep(**sae))

    def configs(self) -> list[TrainConfig]:
        """One SAE's settings each. A single SAE is in the folder `out`; each of several is in a
        folder of its own there, named for it, and trains as it would alone."""
        saes = self.sae.configs()
        configs = [TrainConfig(**_settings(self), sae=sae) for sae in saes]
        if len(configs) == 1:
            return configs
        return [
            replace(
                config,
                out=self.out / config.sae.name,
                push_to_hub=self.push_to_hub and f"{self.push_to_hub}-{config.sae.name}",
            )
            for config in configs
        ]


def _settings(config: TrainSettings) -> dict[str, Any]:
    """The settings that are not the SAE's."""
    return {f.name: getattr(config, f.name) for f in fields(TrainSettings)}


PRESETS = {
    "default": TrainConfig(),
    "paper": TrainConfig(
        data=DataConfig(drop_norm="off"),
        sae=SAEConfig(expansion=64, k=32, aux_weight=1 / 32, dead_tokens=10_000_000, init="linear"),
        tokens=1_000_000_000,
        batch_tokens=131_072,
        lr=1e-4,
        optimizer="adam",
        betas=(0.9, 0.999),
        warmup=0.0,
        decay=0.0,
        preset="paper",
    ),
}


def shared_folder(configs: Sequence[TrainConfig]) -> Path:
    """Where SAEs that train together have their checkpoint: a single one's own folder, else the
    folder that holds those of all."""
    return configs[0].out if len(configs) == 1 else configs[0].out.parent


def check_config(config: TrainConfig) -> None:
    """Raise InputError for settings that no model or data could make right."""
    positive = (
        "tokens", "batch_tokens", "eval_tokens", "micro_tokens", "log_tokens", "eval_every",
        "checkpoint_tokens", "keep_checkpoints", "shard_latents",
    )  # fmt: skip
    owners: tuple[tuple[Any, str, tuple[str, ...]], ...] = (
        (config, "--", positive),
        (config.data, "--", ("seq_len",)),
        (config.sae, "--sae.", ("expansion", "n_latents", "k", "k_aux", "dead_tokens")),
    )
    for owner, prefix, names in owners:
        for name in names:
            value = getattr(owner, name)
            if value is not None and value < 1:
                raise InputError(f"{prefix}{name} must be at least 1, got {value}")
    for name in ("lr", "max_grad_norm", "timeout"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} must be greater than 0, got {value}")
    sae = config.sae
    check_activation(sae.activation, sae.k, sae.k_max, config.shard_latents)
    check_seed(config.seed)
    check_share("train", config.data.heldout_share)
    if config.overwrite and config.resume:
        raise InputError("--overwrite and --resume exclude each other; give one of them")
    if config.moved and not config.resume:
        raise InputError("--moved is for a run that is resumed; give it with --resume only")
    for name in ("warmup", "decay"):
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(f"--{name} must be in [0, 1], got {getattr(config, name)}")


def learning_rate(
    config: TrainConfig, n_latents: int, tokens: int, first_tokens: int | None = None
) -> float:
    """The rate after `tokens` tokens: linear up over `warmup`, level, linear down over `decay`.

    The peak defaults to 2e-4 / √(M / 2¹⁴) · (10⁹ / run's tokens)^0.32: the law of Gao et al. (arXiv
    2406.04093, App. A) for the paper's 10⁹ tokens, and the growth of the best rate with a shorter
    horizon that Bjorck et al. measured (arXiv 2409.19913).

    A run that was extended began with `first_tokens` tokens to train on: its peak and its warm-up
    are those of that number, its decay that of `config.tokens`.
    """
    first_tokens = first_tokens or config.tokens
    law = 2e-4 / math.sqrt(n_latents / 2**14) * (1e9 / first_tokens) ** 0.32
    if config.optimizer == "normuon":
        law *= 2
    peak = config.lr if config.lr is not None else law
    middle = tokens + config.batch_tokens / 2  # of the step
    up = middle / first_tokens / config.warmup if config.warmup else 1.0
    down = (1 - middle / config.tokens) / config.decay if config.decay else 1.0
    return peak * max(0.0, min(1.0, up, down))
