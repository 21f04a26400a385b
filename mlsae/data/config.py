"""The settings of what an SAE trains on: the transformer, the text, and how both are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from .. import builtin
from ..errors import InputError


@dataclass(frozen=True)
class DataConfig:
    """The transformer, the text, and how both are read."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = builtin.NAME
    """A causal language model: "builtin", a name on the Hugging Face hub, or a local folder."""
    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[DATASET]")] = builtin.NAME
    """Text: "builtin", a dataset on the hub (streamed), or a local file or folder of .txt, .jsonl,
    .jsonl.zst or .parquet."""
    layers: tuple[int, ...] | None = None
    """Layers to read, the first being 0. None: all."""
    seq_len: int | None = None
    """Tokens per row. None: the model's context, 2048 at most."""
    column: str = "text"
    """The dataset's column of text."""
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the transformer computes in. auto: as it was saved on CUDA, else float32."""
    model_device_map: str | None = None
    """Where the transformer is, if not whole on the SAE's device: a device (cuda:1), or one of
    accelerate's ways to spread it (accelerate must be installed). auto: over all GPUs, leaving
    room for the SAE on its own; what does not fit goes to the CPU's memory, then to the disk."""
    model_quantize: Literal["8bit", "4bit"] | None = None
    """Load the transformer quantized by bitsandbytes, which must be installed."""


def check_seed(seed: int | None) -> None:
    """Raise InputError if torch's generators do not take this `--seed`."""
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise InputError(f"--seed must be in [-2^63, 2^63), got {seed}")
