"""The settings of what an SAE trains on: the transformer, the text, and how both are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
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
    .json, .csv (all also as .gz or .zst), .parquet or .arrow, also as left by save_to_disk."""
    dataset_config: str | None = None
    """Configuration of a dataset on the hub, such as en of allenai/c4. None: its default."""
    dataset_split: str = "train"
    """Split of the dataset to read, on the hub or in a folder that save_to_disk left of several."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a dataset on the hub. None: the newest."""
    revision: str | None = None
    """The model's branch, tag or commit on the hub, such as a step of its training (step3000).
    None: the newest."""
    trust_remote_code: bool = False
    """Whether to run Python code from the model's repository, which some models need. It can do
    anything that you can, so read it before."""
    eos_token: str | None = None
    """A token of the model's tokenizer that joins documents. None: the tokenizer's EOS. Its
    residuals are dropped, as those of other special tokens."""
    layers: tuple[int, ...] | None = None
    """Layers to read, the first being 0. None: all."""
    seq_len: int | None = None
    """Tokens per row. None: the model's context, 2048 at most."""
    column: str = "text"
    """The dataset's column: of text; of token ids of this model, a list per document; or of chats,
    lists of {role, content}, which the tokenizer's chat template turns into text."""
    heldout_share: float = 0.05
    """Share of the text that is held out: chosen by a hash of the text, in segments of at most
    8,192 characters or 2,048 token ids (of a chat, by one of its messages, whole), so it is the
    same for every model and row length. The built-in corpus holds out a tenth of its files
    instead."""
    max_bad_records: float = 0.01
    """Share of the dataset's records that may be bad (null, not text, not readable). They are
    skipped and counted; more of them end the run."""
    token_cache: Path | None = None
    """Folder that keeps the text's tokens, packed into rows, so that the next run with the same
    text, tokenizer and --seq_len reads them from the disk. It may have 34 GB; what was not used for
    longest is removed. None: mlsae/tokens in your folder for caches ($XDG_CACHE_HOME, ~/.cache),
    or $MLSAE_TOKEN_CACHE."""
    no_token_cache: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read the text and tokenize it, whatever the cache has, and keep nothing."""
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the transformer computes in. auto: on CUDA, as its configuration says, but bfloat16 if
    that is float32 or says nothing; elsewhere float32, but in training bfloat16 where CUDA would
    have it and the CPU has matrix units for it (Intel's AMX)."""
    model_device_map: str | None = None
    """Where the transformer is, if not whole on the SAE's device: a device (cuda:1), or one of
    accelerate's ways to spread it (accelerate must be installed). auto: over all GPUs, leaving
    room for the SAE on its own; what does not fit goes to the CPU's memory, then to the disk."""
    model_quantize: Literal["8bit", "4bit"] | None = None
    """Load the transformer quantized by bitsandbytes, which must be installed."""
    drop_positions: tuple[int, ...] = ()
    """Positions in a row to leave out of training and metrics, the first being 0: beside special
    tokens, as all that is dropped."""
    drop_tokens: tuple[str, ...] = ()
    """Tokens to leave out, by id or text; a number is an id."""
    drop_norm: float | Literal["auto", "off"] = "auto"
    """Leave out tokens whose norm exceeds so many times the median of a layer, at any layer; the
    medians are those of the first batch. They train nothing, but count among --tokens. auto: 10
    if the first batch has such tokens, else off."""


def check_seed(seed: int | None, flag: str = "--seed") -> None:
    """Raise InputError if torch's generators do not take this seed, which `flag` gives."""
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise InputError(f"{flag} must be in [-2^63, 2^63), got {seed}")


def check_share(split: builtin.Split, share: float) -> None:
    """Raise InputError if, with this `--heldout_share`, the side `split` is empty: it must be in
    (0, 1), and may be 1 where nothing is trained on."""
    if 0 < share < 1 or (share == 1 and split == "heldout"):
        return
    most = "at most 1" if split == "heldout" else "less than 1, since the rest is trained on"
    raise InputError(f"--heldout_share must be greater than 0 and {most}, got {share:g}")
