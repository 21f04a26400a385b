"""The ops of a training step beside its sparse products, as torch operators.

As in `ops`, the device picks the backend. A training step written by hand calls them, so they have
no derivatives, and they are defined the way that costs the least time on the host.

Legend: L layers, N tokens per layer, D inputs, M latents, K active latents per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .ops import backend_for
from .torch_residuals import TokenMoments

_namespace = add_op_namespace_prefix("").removesuffix("::")
_library = torch.library.Library(_namespace, "FRAGMENT")
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
_library.define(
    "decode_backward(Tensor error, Tensor indices, Tensor W, Tensor values, Tensor std,"
    " Tensor factor, float? eps) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "note_active_(Tensor(a!) last_active, Tensor values, Tensor indices, Tensor? mask,"
    " float threshold, int now) -> ()"
)
_library.define(
    "merge_moments(Tensor n, Tensor mean, Tensor sq_dev, Tensor other_n, Tensor other_mean,"
    " Tensor other_sq_dev) -> (Tensor, Tensor, Tensor)"
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


def decode_backward(
    error: Tensor,
    indices: Tensor,
    W: Tensor,
    values: Tensor,
    std: Tensor,
    factor: Tensor,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `torch_residuals.decode_backward`."""
    return _decode_backward(error, indices, W, values, std, factor, eps)


def note_active_(
    last_active: Tensor,
    values: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    threshold: float,
    now: int,
) -> None:
    """See `torch_residuals.note_active_`."""
    _note_active_(last_active, values, indices, mask, threshold, now)


def merge_moments(a: TokenMoments, b: TokenMoments) -> TokenMoments:
    """See `torch_residuals.merge_moments`."""
    return TokenMoments(*_merge_moments(*a, *b))


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


def _run_plain(name: str) -> Callable[..., Any]:
    """The op `name` of the backend of its first argument."""

    def run(*arguments: Any) -> Any:
        return getattr(backend_for(arguments[0]), name)(*arguments)

    return run


def _run_merge(*arguments: Tensor) -> tuple[Tensor, ...]:
    moments = TokenMoments(*arguments[:3]), TokenMoments(*arguments[3:])
    return tuple(backend_for(arguments[1]).merge_moments(*moments))


def _fake_backward(
    error: Tensor, indices: Tensor, W: Tensor, values: Tensor, *more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(values), torch.empty_like(values), error.new_empty(len(error))


for _name, _code, _fake in (
    ("decode_backward", _run_plain("decode_backward"), _fake_backward),
    ("note_active_", _run_plain("note_active_"), lambda *arguments: None),
    ("merge_moments", _run_merge, lambda *a: tuple(map(torch.empty_like, a[:3]))),
):
    _library.impl(_name, _code, "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(_name), _fake, lib=_library)
for _name, _x_at, _fake in (
    ("standardize", 0, _fake_standardize),
    ("decode_error", 4, lambda values, indices, W, b, x, *more: _fake_error(W, x)),
    ("reconstruction_error", 1, lambda x_hat, x, *more: _fake_error(x_hat, x)),
):
    _library.impl(_name, _run(_name, _x_at), "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(_name), _fake, lib=_library)
_decode_backward = ops.decode_backward.default
_note_active_ = ops.note_active_.default
_merge_moments = ops.merge_moments.default
_standardize = ops.standardize.default
_decode_error = ops.decode_error.default
_reconstruction_error = ops.reconstruction_error.default
