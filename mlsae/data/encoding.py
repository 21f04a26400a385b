"""Texts → token ids, as the tokenizer gives them, without the lists and masks it makes beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase, TokenizersBackend

Ids = npt.NDArray[np.integer[Any]]
"""Token ids, (n,): int32 of what was tokenized, another integer type of a dataset's own."""

Encode = Callable[[Sequence[str]], list[Ids]]


def encoder(tokenizer: Any) -> Encode:
    """What encodes texts, without special tokens at their ends, to the ids that
    `tokenizer(texts, add_special_tokens=False)` gives.

    A tokenizer that is a thin layer over the Rust library is asked there: texts in parallel (but
    for TOKENIZERS_PARALLELISM=false), without offsets, in a third less time. One that has code of
    its own for this, as slow ones, is called.
    """
    return _encode_fast(tokenizer) if is_backend(tokenizer) else _encode_slowly(tokenizer)


def is_backend(tokenizer: Any) -> bool:
    """Whether `tokenizer` only passes texts on to its `backend_tokenizer`, so that the backend's
    JSON tells all of what it does to them."""
    kind = type(tokenizer)
    return (
        isinstance(tokenizer, TokenizersBackend)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is TokenizersBackend._encode_plus
    )


def backend_of(tokenizer: Any) -> Any:
    """The Rust library's tokenizer, set as a call of `tokenizer` without options sets it."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _encode_fast(tokenizer: Any) -> Encode:
    def encode(texts: Sequence[str]) -> list[Ids]:
        encoded = backend_of(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(each.ids, np.int32) for each in encoded]

    return encode


def _encode_slowly(tokenizer: Any) -> Encode:
    def encode(texts: Sequence[str]) -> list[Ids]:
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(each, np.int32) for each in encoded]

    return encode
