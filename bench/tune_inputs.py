"""Inputs for the kernels of `tune_table`, and functions that launch the kernels on them.

Legend: N tokens, D inputs, M latents, K active latents per token. For `keep_topk`, M are the dead
latents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_topk import triton_ops
from sparse_topk.triton_ops import (
    adam,
    decode,
    keep_topk,
    normuon,
    residual,
    sparse,
    standardization,
)
from sparse_topk.triton_ops.topk import encode, product, select

from .shapes import ProblemShape

Work = Callable[[], object]
_HALF = torch.bfloat16


def _dtype(device: torch.device) -> torch.dtype:
    return _HALF if device.type == "cuda" else torch.float32  # the interpreter misreads bfloat16


def _random(*size: int, device: torch.device) -> Tensor:
    return torch.randn(*size, device=device, dtype=_dtype(device))


def _codes(s: ProblemShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """values and indices (N, K), each latent as likely as another."""
    starts = torch.randint(s.m // s.k, (s.n, s.k), device=device)
    return _random(s.n, s.k, device=device), starts + torch.arange(s.k, device=device) * (
        s.m // s.k
    )


def encode_work(s: ProblemShape, device: torch.device) -> Work:
    x, W = _random(s.n, s.d, device=device), _random(s.m, s.d, device=device)
    return lambda: triton_ops.topk_encode(x, W, None, s.k, relu=True)


def top_keys_work(s: ProblemShape, device: torch.device) -> Work:
    x, W = _random(s.n, s.d, device=device), _random(s.m, s.d, device=device)
    group, n_keys = encode.group_size(s.m, s.k)
    return lambda: product.top_keys(x, W, None, n_keys, group, True)


def select_work(s: ProblemShape, device: torch.device) -> Work:
    x, W = _random(s.n, s.d, device=device), _random(s.m, s.d, device=device)
    group, n_keys = encode.group_size(s.m, s.k)
    keys = product.top_keys(x, W, None, n_keys, group, True)
    values = x.new_empty(s.n, s.k)
    indices = torch.empty(s.n, s.k, device=device, dtype=torch.int64)
    return lambda: select.select(keys, x, W, None, group, True, values, indices)


def gather_sum_work(s: ProblemShape, device: torch.device) -> Work:
    (values, indices), W = _codes(s, device), _random(s.m, s.d, device=device)
    return lambda: sparse.gather_sum(values, indices, W)


def gather_dot_work(s: ProblemShape, device: torch.device) -> Work:
    (_, indices), W = _codes(s, device), _random(s.m, s.d, device=device)
    x = _random(s.n, s.d, device=device)
    return lambda: sparse.gather_dot(x, indices, W)


def scatter_outer_work(s: ProblemShape, device: torch.device) -> Work:
    (values, indices), x = _codes(s, device), _random(s.n, s.d, device=device)
    csc = sparse.csc_by_latent(indices, s.m)
    out = torch.zeros(s.m, s.d, device=device)
    return lambda: sparse.scatter_outer(values, csc, x, out)


def standardize_work(s: ProblemShape, device: torch.device) -> Work:
    x, center = _random(1, s.n, s.d, device=device), torch.zeros(s.d, device=device)
    mask = torch.ones(s.n, device=device, dtype=torch.bool)
    return lambda: standardization.standardize(x, center, mask, x.dtype, 1e-5)


def decode_error_work(s: ProblemShape, device: torch.device) -> Work:
    (values, indices), W = _codes(s, device), _random(s.m, s.d, device=device)
    x, b = _random(1, s.n, s.d, device=device), torch.zeros(s.d, device=device)
    mask = torch.ones(s.n, device=device, dtype=torch.bool)
    _, mean, std, _ = standardization.standardize(x, b, mask, x.dtype, 1e-5)
    return lambda: decode.decode_error(values, indices, W, b, x, mean, std, mask, 1e-5)


def keep_topk_work(s: ProblemShape, device: torch.device) -> Work:
    """In place, so each call begins with a copy of the scores, whose time counts for all tiles."""
    scores = _random(s.n, s.m, device=device)
    z = torch.empty_like(scores)
    return lambda: keep_topk.keep_topk_(z.copy_(scores), s.k)


def aux_residual_work(s: ProblemShape, device: torch.device) -> Work:
    e_hat, error = torch.randn(s.n, s.d, device=device), _random(s.n, s.d, device=device)
    weight, scale = torch.rand(s.n, device=device), torch.ones((), device=device)
    return lambda: residual.aux_residual(e_hat, error, weight, scale)


def adam_work(unit_norm: bool) -> Callable[[ProblemShape, torch.device], Work]:
    def prepare(s: ProblemShape, device: torch.device) -> Work:
        weight, grad, m, v = (torch.rand(s.m, s.d, device=device) for _ in range(4))
        shadow = torch.empty(s.m, s.d, device=device, dtype=_dtype(device))
        return lambda: adam.adam_unit_norm_(
            weight, grad, m, v, 1000,
            lr=1e-4, betas=(0.9, 0.999), eps=1e-8, unit_norm=unit_norm, shadow=shadow,
        )  # fmt: skip

    return prepare


def normuon_work(s: ProblemShape, device: torch.device) -> Work:
    """Both passes, without the products between them."""
    weight, grad, m = (torch.rand(s.m, s.d, device=device) for _ in range(3))
    row_sq, update = torch.ones(s.m, 1, device=device), _random(s.m, s.d, device=device)

    def work() -> None:
        normuon.tangent_momentum_(weight, grad, m, beta=0.5, unit_norm=True, dtype=_dtype(device))
        normuon.apply_rows_(
            weight, update, row_sq,
            lr=1e-4, beta=0.95, bias_correction=1.0, eps=1e-8, unit_norm=True,
        )  # fmt: skip

    return work
