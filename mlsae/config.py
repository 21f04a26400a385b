"""The settings of a training run: what `python -m mlsae.train --help` explains.

Legend: D width of the residual stream, M latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from .data.config import DataConfig, check_seed, check_share
from .errors import InputError
from .sae_config import Ints, SAEConfig, SAESweep, check_activation, check_different

__all__ = ["SAEConfig", "SAESweep", "TrainArguments", "TrainConfig"]


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
    """Peak learning rate. None: 2e-4 / √(n_latents / 2¹⁴), times (10⁹ / tokens)^0.32; with
    normuon four times that, and for fewer than 10⁵ tokens as for 10⁵."""
    optimizer: Literal["auto", "adam", "normuon"] = "auto"
    """What trains both weights. adam: Adam. normuon: its updates are orthogonalized and have one
    size for every latent; it needs one moment instead of two. auto: normuon for runs of at most
    4000 steps, adam for longer ones. Biases always have Adam."""
    decoder_optimizer: Literal["adam", "normuon"] | None = None
    """What trains the decoder, if it is another. None: `--optimizer`."""
    betas: tuple[float, float] | None = None
    """Decay per step of the running averages of gradients and of their squares. None: 0.7 and 0.95;
    with normuon, 0.5 and 0.95."""
    warmup: float = 0.01
    """Share of the tokens over which the learning rate rises from 0."""
    decay: float = 0.3
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
    eval_tokens: int | None = None
    """Held-out tokens that the validation metrics are measured on. None: a fiftieth of the run's
    tokens, but 4,096 at least and 65,536 at most."""
    eval_every: int | None = None
    """Tokens between two validations. None: only at the end."""
    log_tokens: int | None = None
    """Tokens between two lines of metrics.jsonl. None: a hundredth of the run."""
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also log to TensorBoard (OUT/tensorboard), Weights & Biases or trackio, or to several; they
    must be installed."""
    checkpoint_minutes: float = 10.0
    """Minutes between two checkpoints, which are written while training goes on; the last one is
    of the end."""
    checkpoint_tokens: int | None = None
    """Tokens between two checkpoints, instead of minutes."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, the newest ones."""
    init_from: str | None = None
    """Start from the weights of a trained SAE: a run's folder, a name on the Hugging Face hub, or a
    file or folder of another library's format. Latents, k, standardization and batchtopk are then
    its own. None: random weights."""
    lens: Path | None = None
    """Train in the basis of the last layer, into which a lens carries each layer's residuals: a
    lens.safetensors or its folder (see `python -m mlsae.lens`), or one of the tuned-lens package.
    None: in each layer's own."""
    seed: int = 0
    """Seed of the order of rows, and of the initial weights unless --seeds are given."""
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

    @property
    def weights_seed(self) -> int:
        """The seed of the initial weights."""
        return self.seed if self.sae.seed is None else self.sae.seed


@dataclass(frozen=True)
class TrainArguments(TrainSettings):
    """What to train, on what, and how: the command line, which may name several SAEs."""

    sae: SAESweep = field(default_factory=SAESweep)
    seeds: Ints = ()
    """Seeds of the initial weights. Each is an SAE that trains beside the others on the same rows,
    in a folder in OUT: x16-k32-s0, x16-k32-s1, …"""

    @classmethod
    def defaults(cls, config: TrainConfig) -> TrainArguments:
        """The command line that gives just `config`."""
        sae = asdict(config.sae)
        for name in ("expansion", "n_latents", "k", "seed"):
            sae[name] = () if sae[name] is None else (sae[name],)
        seeds = sae.pop("seed")
        return cls(**_settings(config), sae=SAESweep(**sae), seeds=seeds)

    def configs(self) -> list[TrainConfig]:
        """One SAE's settings each. A single SAE is in the folder `out`; each of several is in a
        folder of its own there, named for it, and trains as it would alone.

        Raises InputError if a setting has one value twice, or --seeds contradict another one."""
        check_different("--seeds", self.seeds)
        if self.seeds and min(self.seeds) < 0:
            raise InputError(f"--seeds must be at least 0, got {min(self.seeds)}")
        if self.seeds and self.init_from is not None:
            raise InputError(
                f"--seeds are of random initial weights, and --init_from {self.init_from} gives "
                "all SAEs the same ones; leave one of them out"
            )
        saes = [
            replace(sae, seed=seed) for sae in self.sae.configs() for seed in self.seeds or (None,)
        ]
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


NORMUON_STEPS = 4000  # of a run, at most


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
    for name in ("lr", "max_grad_norm", "timeout", "checkpoint_minutes"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} must be greater than 0, got {value}")
    sae = config.sae
    check_activation(sae.activation, sae.k, sae.k_max, config.shard_latents)
    check_seed(config.seed)
    check_seed(config.sae.seed, "--seeds")
    check_share("train", config.data.heldout_share)
    if config.overwrite and config.resume:
        raise InputError("--overwrite and --resume exclude each other; give one of them")
    if config.moved and not config.resume:
        raise InputError("--moved is for a run that is resumed; give it with --resume only")
    if config.betas is not None and not all(0 <= beta < 1 for beta in config.betas):
        given = " ".join(map(str, config.betas))
        raise InputError(f"--betas must be in [0, 1), got {given}")
    for name in ("warmup", "decay"):
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(f"--{name} must be in [0, 1], got {getattr(config, name)}")


def optimizer_of(config: TrainConfig, first_tokens: int) -> Literal["adam", "normuon"]:
    """The optimizer of a run that began with `first_tokens` tokens to train on. "auto" is NorMuon
    as long as it wins: by 15 % of FVU after 200 steps, by nothing after 5000 (docs/choosing.md)."""
    if config.optimizer != "auto":
        return config.optimizer
    return "normuon" if first_tokens <= NORMUON_STEPS * config.batch_tokens else "adam"


def heldout_tokens(config: TrainConfig) -> int:
    """Held-out tokens to validate on: few in a short run, of which they would take most."""
    if config.eval_tokens is not None:
        return config.eval_tokens
    return min(65_536, max(4096, config.tokens // 50))


def law_of_rates(n_latents: int, tokens: float) -> float:
    """2e-4 / √(M / 2¹⁴) · (10⁹ / tokens)^0.32, in whose units peak rates are told."""
    return 2e-4 / math.sqrt(n_latents / 2**14) * (1e9 / tokens) ** 0.32


def peak_rate(config: TrainConfig, n_latents: int, tokens: int) -> float:
    """The peak learning rate of a run of `tokens` tokens: `--lr`, or by default

        2e-4 / √(M / 2¹⁴) · (10⁹ / tokens)^0.32                      Adam
        4 · 2e-4 / √(M / 2¹⁴) · (10⁹ / max(tokens, 10⁵))^0.32        NorMuon

    The law of Gao et al. (arXiv 2406.04093, App. A) for the paper's 10⁹ tokens, and the growth of
    the best rate with a shorter horizon that Bjorck et al. measured (arXiv 2409.19913). The factor
    is measured, and so are the limits of the law: docs/choosing.md.
    """
    if config.lr is not None:
        return config.lr
    if optimizer_of(config, tokens) == "normuon":
        return 4 * law_of_rates(n_latents, max(tokens, 1e5))
    return law_of_rates(n_latents, tokens)


def learning_rate(
    config: TrainConfig, n_latents: int, tokens: int, first_tokens: int | None = None
) -> float:
    """The rate after `tokens` tokens: linear up over `warmup` to `peak_rate`, level, linear down
    over `decay`.

    A run that was extended began with `first_tokens` tokens to train on: its peak and its warm-up
    are those of that number, its decay that of `config.tokens`.
    """
    first_tokens = first_tokens or config.tokens
    middle = tokens + config.batch_tokens / 2  # of the step
    up = middle / first_tokens / config.warmup if config.warmup else 1.0
    down = (1 - middle / config.tokens) / config.decay if config.decay else 1.0
    return peak_rate(config, n_latents, first_tokens) * max(0.0, min(1.0, up, down))
