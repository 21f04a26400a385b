"""The ops on the residual stream, `standardize` before the encoder and `decode_error` after it, as
torch operators.

As in `ops`, the device picks the backend. A training step written by hand calls them, so they have
no derivatives, and they are defined the way that costs the least time on the host.

Legend: L layers, N tokens per layer, D inputs, M latents, K active latents per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ops import backend_for
from .torch_residuals import TokenMoments

_library = torch.library.Library("sparse_topk", "FRAGMENT")
_library.define(
    "standardize(Tensor x, Tensor? center, Tensor? mask, ScalarType dtype, float? eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "decode_error(Tensor values, Tensor indices, Tensor W, Tensor? b, Tensor x, Tensor mean,"
    " Tensor std, Tensor? mask, float? eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "reconstruction_error(Tensor x_hat, Tensor x, Tensor mean, Tensor std, Tensor? mask,"
    " float? eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def standardize(
    x: Tensor, center: Tensor | None, mask: Tensor | None, dtype: torch.dtype, eps: float | None
) -> tuple[Tensor, Tensor, Tensor, TokenMoments]:
    """See `torch_residuals.standardize`."""
    centered, mean, std, *moments = _standardize(x, center, mask, dtype, eps)
    return centered, mean, std, TokenMoments(*moments)


def decode_error(
    values: Tensor,
    indices: Tensor,
    W: Tensor,
    b: Tensor | None,
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    mask: Tensor | None,
    eps: float | None,
) -> tuple[Tensor, Tensor, TokenMoments]:
    """See `torch_residuals.decode_error`."""
    error, sq_error, *moments = _decode_error(values, indices, W, b, x, mean, std, mask, eps)
    return error, sq_error, TokenMoments(*moments)


def reconstruction_error(
    x_hat: Tensor, x: Tensor, mean: Tensor, std: Tensor, mask: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor, TokenMoments]:
    """See `torch_residuals.reconstruction_error`."""
    error, sq_error, *moments = _reconstruction_error(x_hat, x, mean, std, mask, eps)
    return error, sq_error, TokenMoments(*moments)


def _run(name: str, x_at: int) -> Callable[..., tuple[Tensor, ...]]:
    """The op `name` of the backend of its argument x, with its moments among the results."""

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        *results, moments = getattr(backend_for(arguments[x_at]), name)(*arguments)
        return *results, *moments

    return run


def _fake_standardize(
    x: Tensor, center: Tensor | None, mask: Tensor | None, dtype: torch.dtype, eps: float | None
) -> tuple[Tensor, ...]:
    n_layers, n, d = x.shape
    centered = x.new_empty(n_layers * n, d, dtype=dtype)
    mean = x.new_empty(n_layers * n, dtype=torch.promote_types(x.dtype, torch.float32))
    return centered, mean, torch.empty_like(mean), *_fake_moments(x)


def _fake_error(like: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    n_layers, n, d = x.shape
    error = like.new_empty(n_layers * n, d)
    return error, x.new_empty(n_layers, dtype=torch.float64), *_fake_moments(x)


def _fake_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(len(x), x.shape[2], dtype=torch.float64)
    return x.new_empty((), dtype=torch.float64), mean, torch.empty_like(mean)


for _name, _x_at, _fake in (
    ("standardize", 0, _fake_standardize),
    ("decode_error", 4, lambda values, indices, W, b, x, *more: _fake_error(W, x)),
    ("reconstruction_error", 1, lambda x_hat, x, *more: _fake_error(x_hat, x)),
):
    _library.impl(_name, _run(_name, _x_at), "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_topk::{_name}", _fake, lib=_library)
_standardize = torch.ops.sparse_topk.standardize.default
_decode_error = torch.ops.sparse_topk.decode_error.default
_reconstruction_error = torch.ops.sparse_topk.reconstruction_error.default
