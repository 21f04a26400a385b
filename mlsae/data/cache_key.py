"""What decides the packed rows of a text, and where the cache keeps them.

The content of the text, of the tokenizer and of the settings that rows depend on are hashed to the
name of an entry: SHA-256 of them all as JSON. If any of them cannot be told, nothing is kept: of a
tokenizer that is a Python program of its own, and of a dataset on the hub without its commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers

from .. import builtin
from .config import DataConfig
from .documents import is_local
from .encoding import backend_of, is_backend
from .fingerprint import fingerprint
from .heldout_split import Split
from .local_files import LocalFiles, expand_user
from .token_cache import Entry

_FORMAT = 1  # of entries, and of how text becomes rows: another one when either changes
_COMMIT = re.compile(r"[0-9a-f]{40}")


def root_of(config: DataConfig) -> Path | None:
    """The folder of the cache; None if it is off, or the user has no home.

    It is `token_cache`, or the environment's MLSAE_TOKEN_CACHE, or mlsae/tokens in the user's
    folder for caches, XDG_CACHE_HOME or ~/.cache.
    """
    if config.no_token_cache:
        return None
    try:
        given = config.token_cache or os.environ.get("MLSAE_TOKEN_CACHE")
        if given:
            return Path(given).expanduser()
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(caches) / "mlsae" / "tokens"


def pinned(config: DataConfig) -> DataConfig:
    """`config` with the commit of a dataset on the hub, if the cache needs it and the hub tells."""
    revision = config.dataset_revision
    if root_of(config) is None or is_local(config) or _COMMIT.fullmatch(revision or ""):
        return config
    commit = _commit(config.dataset, revision)
    return config if commit is None else replace(config, dataset_revision=commit)


def open_entry(config: DataConfig, tokenizer: Any, seq_len: int, split: Split) -> Entry | None:
    """The entry of the rows that `config`, which is `pinned`, makes; None if there can be none."""
    root = root_of(config)
    if root is None or not is_backend(tokenizer):
        return None
    dataset = _dataset(config, split)
    if dataset is None:
        return None
    about: dict[str, Any] = {
        "format": _FORMAT,
        "dataset": dataset,
        "split": split,
        "heldout_share": None if config.dataset == builtin.NAME else config.heldout_share,
        "column": config.column,
        "max_bad_records": config.max_bad_records,
        "seq_len": seq_len,
        "tokenizer": _tokenizer(tokenizer),
    }
    canonical = json.dumps(about, sort_keys=True)
    vocabulary = tokenizer.get_vocab()
    largest_id = max(len(tokenizer), *vocabulary.values())
    about["dataset"]["name"] = config.dataset  # for people: a copy elsewhere has the same rows
    name = hashlib.sha256(canonical.encode()).hexdigest()[:32]
    return Entry(root, name, seq_len, largest_id, about)


def _dataset(config: DataConfig, split: Split) -> dict[str, Any] | None:
    """What decides the records of a dataset. Raises InputError as the reader of files does."""
    if config.dataset == builtin.NAME:
        return {"content": _builtin_digest(split)}
    if not is_local(config):
        if not _COMMIT.fullmatch(config.dataset_revision or ""):
            return None
        names = ("dataset", "dataset_config", "dataset_split", "dataset_revision")
        return {name: getattr(config, name) for name in names}
    path = expand_user(config.dataset)
    try:
        return {
            "dataset_split": config.dataset_split,
            "files": LocalFiles(path, config.column, config.dataset_split).stats(),
            "fingerprint": fingerprint(path),
        }
    except OSError:  # which the reader tells
        return None


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What decides the tokens of a text."""
    json_of_all = backend_of(tokenizer).to_str()
    return {
        "content": hashlib.sha256(json_of_all.encode()).hexdigest(),
        "tokenizers": tokenizers.__version__,
        "split_special_tokens": tokenizer.split_special_tokens,
        "special_tokens": {name: str(each) for name, each in tokenizer.special_tokens_map.items()},
        "eos": tokenizer.eos_token_id,
        "bos": tokenizer.bos_token_id,
        "chat_template": tokenizer.chat_template,
    }


@cache
def _commit(dataset: str, revision: str | None) -> str | None:
    """The commit of a dataset on the hub; None if the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(dataset, revision=revision, timeout=10).sha
    except Exception:  # of many kinds; reading the dataset tells the user
        return None


@cache
def _builtin_digest(split: Split) -> str:
    digest = hashlib.sha256()
    for text in builtin.corpus(split):
        digest.update(f"{len(text)}\0".encode() + text.encode())
    return digest.hexdigest()
