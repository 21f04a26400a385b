"""The training text of the built-in model: its documents, its tokenizer, and the order of its rows.

Legend: R rows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from . import SKIPPED_DIRS, corpus, read_text
from .scoring import Tokens, tokenize

EOS = "<|endoftext|>"
VOCAB_SIZE = 4096
DEPENDENCIES = (
    "torch",
    "numpy",
    "pandas",
    "sympy",
    "networkx",
    "datasets",
    "huggingface_hub",
    "fsspec",
    "Jinja2",
    "rich",
    "Pygments",
    "setuptools",
)
"""Installed distributions whose Python sources are further training text."""


def dependency_sources() -> Iterator[str]:
    """Yield the Python source files of `DEPENDENCIES`."""
    for name in DEPENDENCIES:
        for file in sorted(distribution(name).files or []):
            is_source = file.suffix == ".py" and SKIPPED_DIRS.isdisjoint(file.parts)
            if is_source and (text := read_text(Path(str(file.locate())))):
                yield text


def train_tokenizer(documents: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of `VOCAB_SIZE` tokens, the first of which is EOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=EOS, eos_token=EOS)


def load_tokens(folder: Path) -> tuple[Tokens, ...]:
    """The tokens of the library's training files, of the dependencies, and of the held-out files.

    They are kept in `folder`, with the tokenizer; if they are not there yet, they are made.
    """
    paths = [folder / f"tokens-{name}.npy" for name in ("train", "extra", "heldout")]
    if not all(path.exists() for path in paths):
        print("training the tokenizer", flush=True)
        tokenizer = train_tokenizer(corpus("train"))
        tokenizer.save_pretrained(folder)
        texts = (corpus("train"), dependency_sources(), corpus("heldout"))
        for path, documents in zip(paths, texts, strict=True):
            np.save(path, tokenize(tokenizer, documents, path.stem))
    return tuple(np.load(path) for path in paths)


def split_rows(tokens: Tokens, seq_len: int) -> Tokens:
    """Consecutive rows (R, T) of `tokens`; an incomplete last row is dropped."""
    return tokens[: len(tokens) // seq_len * seq_len].reshape(-1, seq_len)


def row_order(
    seed: int, n_rows: int, n_train: int, n_extra: int, epochs: int
) -> np.ndarray[Any, Any]:
    """The index into [train; extra] of each of the run's `n_rows` rows, which depends on the seed
    alone: `epochs` passes over train, and as much of extra as fills the rest, shuffled together."""
    generator = np.random.default_rng(seed)
    train = np.tile(np.arange(n_train), epochs)[:n_rows]
    n_rest = n_rows - len(train)
    passes = math.ceil(n_rest / max(n_extra, 1))
    extra = np.concatenate([generator.permutation(n_extra) for _ in range(passes)] or [train[:0]])
    return generator.permutation(np.concatenate([train, n_train + extra[:n_rest]]))
