"""What a training will need, told before it runs: memory by part, steps, files on the disk.

Legend: L layers, T positions, D width of the residual stream, M latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from ..config import TrainConfig
from ..data.stream import Shape
from ..errors import InputError
from ..memory import Memory, parts
from ..model import MLSAEConfig
from .optimizers import optimizers_of
from .start import compute_dtype

_HEADER = 2**13  # of a file of tensors: its names, and what is no tensor
_REPORT = 12 * 2**20  # bytes of report, log and card, at most
_BUFFER_ROWS, _REST = 4096, 2**17  # of text in a checkpoint: rows to shuffle, tokens in no row yet


class Disk(NamedTuple):
    """Bytes of the files of a run."""

    checkpoint: int
    """One of them; it holds all SAEs that train together."""
    kept: int
    """How many stay. While one is being written, there is one more."""
    models: int
    """model.safetensors of all SAEs."""
    rest: int
    """latents.safetensors, and room for report, log and card."""

    @property
    def most(self) -> int:
        """While the run lasts."""
        return (self.kept + 1) * self.checkpoint + self.models + self.rest

    @property
    def left(self) -> int:
        """After it."""
        return self.kept * self.checkpoint + self.models + self.rest


class Needs(NamedTuple):
    """What a training needs."""

    memory: Memory
    """Of one process, beside the transformer."""
    transformer: int
    """Bytes of the transformer's weights that are loaded."""
    free: int | None
    """Bytes of memory free on the device; None if the system does not tell."""
    steps: int
    step_tokens: int
    """Tokens of a step: whole rows."""
    checkpoints: str
    """When they are written, in words."""
    disk: Disk

    def lines(self, device_type: str) -> tuple[str, str]:
        """Two lines to print: memory, then steps and files."""
        state, residuals, activations, validation, checkpoint, dead = self.memory
        free = "" if self.free is None else f" of the {_size(self.free)} that are free"
        most = f", {_size(self.memory.total)} if all latents die" if dead else ""
        disk = self.disk
        copy = f", checkpoint {_size(checkpoint)}" if checkpoint else ""
        return (
            f"memory beside the model's {_size(self.transformer)}: "
            f"{_size(self.memory.expected)}{free} on {device_type}{most}: weights and optimizer "
            f"{_size(state)}, residuals {_size(residuals)}, activations {_size(activations)}, "
            f"validation {_size(validation)}{copy}",
            f"{self.steps:,} steps of {self.step_tokens:,} tokens; a checkpoint of "
            f"{_size(disk.checkpoint)} {self.checkpoints}, of which {disk.kept} stay: at most "
            f"{_size(disk.most)} on the disk",
        )


def needs_of(
    configs: Sequence[TrainConfig],
    saes: Sequence[MLSAEConfig],
    shape: Shape,
    device: torch.device,
    *,
    micro_tokens: int,
    first_tokens: int | None = None,
    processes: int = 1,
    transformer: int = 0,
    model_dtype: torch.dtype = torch.float32,
    free: int | None = None,
) -> Needs:
    """What training all of `saes` needs in one of `processes` processes, each with parts of
    `micro_tokens` tokens, in a run that began with `first_tokens` tokens to train on; the others
    are fields of `Needs`."""
    config = configs[0]
    optimizers = optimizers_of(config, first_tokens or config.tokens)[:2]
    step_tokens = config.batch_tokens // shape.seq_len * shape.seq_len
    memory = parts(
        saes, micro_tokens, compute_dtype(config, device), config.shard_latents, optimizers,
        device_type=device.type, batch_tokens=step_tokens // (processes // config.shard_latents),
        model_dtype=model_dtype,
    )  # fmt: skip
    if config.lens is not None:  # maps and inverses; z, while it is put together
        n, d_in = len(shape.layers), shape.d_in
        memory = memory._replace(
            state=memory.state + 8 * n * d_in**2,
            residuals=memory.residuals + 8 * n * micro_tokens * d_in,
        )
    steps = n_steps(config.tokens, step_tokens)
    disk = disk_of(configs, saes, shape.seq_len)
    return Needs(memory, transformer, free, steps, step_tokens, _when(config), disk)


def check_shards(saes: Iterable[MLSAEConfig], shards: int) -> None:
    """Raise InputError if an SAE has fewer latents than `shards`."""
    fewest = min(sae.n_latents for sae in saes)
    if fewest < shards:
        raise InputError(
            f"--shard_latents must be at most {fewest} (the number of latents), got {shards}"
        )


def n_steps(tokens: int, step_tokens: int) -> int:
    """Optimizer steps of a run; a few more where many tokens are left out, since those do not count
    among `tokens`."""
    return math.ceil(tokens / step_tokens)


def _when(config: TrainConfig) -> str:
    """When checkpoints are written."""
    if config.checkpoint_tokens is not None:
        return f"every {config.checkpoint_tokens:,} tokens and at the end"
    return f"every {config.checkpoint_minutes:g} minutes and at the end"


def disk_of(configs: Sequence[TrainConfig], saes: Iterable[MLSAEConfig], seq_len: int) -> Disk:
    """The files of a run on rows of `seq_len` tokens.

    For each SAE: both weights and the bias, and the counts of latents; and in each checkpoint the
    weights, the moments of their optimizers, what AuxK counts and the sums of the log. A checkpoint
    also holds rows of text that were read and not trained on yet."""
    config = configs[0]
    text = 4 * (seq_len * _BUFFER_ROWS + config.batch_tokens + _REST)
    checkpoint, models, rest = text + _HEADER, 0, 0
    for each, sae in zip(configs, saes, strict=True):
        matrix, vectors = sae.n_latents * sae.d_in, sae.d_in + sae.bias * sae.n_latents
        moments = 2 * vectors
        for name in optimizers_of(each, each.tokens)[:2]:
            moments += matrix + (sae.n_latents if name == "normuon" else matrix)
        sums = 8 * sae.n_latents + 32 * len(sae.layers) * sae.d_in
        maps = 0 if config.lens is None else len(sae.layers) * sae.d_in**2
        models += 4 * (2 * matrix + vectors + maps)
        checkpoint += 4 * (2 * matrix + vectors + moments) + sums
        rest += 12 * sae.n_latents * len(sae.layers) + _REPORT
    return Disk(checkpoint, config.keep_checkpoints, models, rest)


def _size(n_bytes: float) -> str:
    """Bytes to read: "1.23 GB", "45 MB"."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
