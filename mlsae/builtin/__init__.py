"""The built-in language model and corpus, so that everything runs without a network.

The corpus is the source code of the running Python's standard library: real text that every
machine has. The model is a small GPT-NeoX with a byte-level BPE tokenizer, trained on that text by
`python -m mlsae.builtin`; its model card is `model/README.md`.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

NAME = "builtin"
"""The name of both the model and the corpus on the command line."""

MODEL_DIR = Path(__file__).parent / "model"
"""A Hugging Face model folder like any other: `AutoModelForCausalLM.from_pretrained(MODEL_DIR)`."""

Split = Literal["train", "heldout"]

SKIPPED_DIRS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"}


def corpus(split: Split) -> Iterator[str]:
    """Yield the standard library's source files, one document per file, sorted by path.

    A file is held out if the CRC-32 of its path relative to the library is 0 modulo 10. The rule
    depends only on the name, so a file is in the same split in every version of Python.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _sources(root):
        heldout = zlib.crc32(path.relative_to(root).as_posix().encode()) % 10 == 0
        if heldout == (split == "heldout") and (text := read_text(path)):
            yield text


def _sources(root: Path) -> list[Path]:
    """The source files in a folder, sorted. Skipped folders, which may have tens of thousands, are
    not entered."""
    found: list[Path] = []
    for folder, names, files in os.walk(root):
        names[:] = set(names) - SKIPPED_DIRS
        found += [Path(folder, file) for file in files if file.endswith(".py")]
    return sorted(found)


def read_text(path: Path) -> str:
    """The file's text; empty if it is not UTF-8, like one or two files of the library."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
