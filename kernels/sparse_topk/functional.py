"""Functions with argument checks and gradients: `topk_encode`, `sparse_decode`, `topk_sae`.

Every function here is differentiable in its float arguments; each line of a backward is an op. The
transforms of torch.func and forward mode take another way, which composes the ops of `derivatives`
at the latents chosen: slower, as it sorts once per weight, but it has all derivatives. A second
derivative by autograd alone (`create_graph=True`) is refused.

Legend: N tokens, D inputs, M latents, K active latents per token; "…" any leading shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .codes import SAEOutput, Shards, TopK
from .derivatives import gather_dot, gather_sum, once_differentiable, transformed


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int) -> TopK:
    """ReLU of the K largest of x W_encᵀ + b_enc; the (N, M) scores are never stored whole.

    x (…, D), W_enc (M, D), b_enc (M,) or None → values and indices (…, K). Computed in W_enc's
    dtype, or in autocast's if that is on. Ties go to the smaller index, except that which latents
    have the values 0 is left open; NaN is kept.

    A value clipped by ReLU has the gradient 0. The selection has none: it is piecewise constant.

    Raises ValueError if a shape does not fit or k is not in [1, M].
    """
    _check_weights(x, W_enc, b_enc, None)
    check_k(k, len(W_enc))
    flat, dtype = x.reshape(-1, x.shape[-1]), _dtype(W_enc)
    if transformed():
        values, indices = _compose_encode(flat, W_enc, b_enc, k, dtype)
    else:
        values, indices = _Encode.apply(flat, W_enc, b_enc, k, dtype)
    return TopK(values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k))


def sparse_decode(codes: TopK, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """Σ_k values · W_dec[indices] + b_dec: (…, K) → (…, D), equal to (dense codes) @ W_dec + b_dec.

    Raises ValueError if a shape does not fit. An index outside [0, M) raises on a CPU; on a GPU,
    where a check would wait for the device, it is undefined as in torch's own indexing.
    """
    values, indices = codes
    if values.shape != indices.shape:
        raise ValueError(
            "values and indices must have the same shape, "
            f"got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    k = values.shape[-1]
    decode = _compose_decode if transformed() else _Decode.apply
    out = decode(values.reshape(-1, k), indices.reshape(-1, k), W_dec, b_dec, _dtype(W_dec))
    return out.view(*values.shape[:-1], W_dec.shape[1])


def topk_sae(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    k: int,
    shards: Shards | None = None,
) -> SAEOutput:
    """x̂ = sparse_decode(topk_encode(x − b_dec)), and its codes. One autograd Function does both, so
    its backward sorts the selections once for both weights.

    x (…, D), W_enc and W_dec (M, D), b_enc (M,), b_dec (D,) → x̂ (…, D), values, indices (…, K).
    Computed as `topk_encode` is, in whose dtype the values are; x̂ has x's, so that it can take its
    place, or autocast's if that is on, as the output of torch's own layers.

    With `shards`, the weights are one shard's, and k is how many candidates it offers: x̂ and the
    gradients of x and b_dec are those of all shards together; the codes are this shard's own.

    Raises ValueError as `topk_encode` does.
    """
    _check_weights(x, W_enc, b_enc, b_dec)
    if W_dec.shape != W_enc.shape:
        raise ValueError(
            "W_dec must have W_enc's shape (n_latents, d_in), both row-major; "
            f"got {tuple(W_dec.shape)} and {tuple(W_enc.shape)}"
        )
    check_k(k, len(W_enc))
    flat, dtype = x.reshape(-1, x.shape[-1]), _dtype(W_enc)
    if not transformed():
        out, values, indices = _TopKSAE.apply(flat, W_enc, b_enc, W_dec, b_dec, k, dtype, shards)
    elif shards is None:
        centered = flat if b_dec is None else flat - b_dec
        values, indices = _compose_encode(centered, W_enc, b_enc, k, dtype)
        out = _compose_decode(values, indices, W_dec, b_dec, dtype)
    else:
        raise RuntimeError(
            "an SAE whose latents are split among processes has no torch.func transforms and no "
            "forward mode; use the whole SAE in one process"
        )
    shape = x.shape[:-1]
    if not torch.is_autocast_enabled(W_enc.device.type):
        out = out.to(x.dtype)
    return SAEOutput(out.view(x.shape), values.view(*shape, k), indices.view(*shape, k))


def _check_weights(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None) -> None:
    if W_enc.ndim != 2:
        raise ValueError(f"W_enc must have the shape (n_latents, d_in), got {tuple(W_enc.shape)}")
    n_latents, d_in = W_enc.shape
    if x.ndim == 0 or x.shape[-1] != d_in:
        raise ValueError(
            f"x's last dimension must be {d_in} (d_in, the columns of W_enc), "
            f"got x of shape {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating-point dtype, got {x.dtype}")
    if b_enc is not None and b_enc.shape != (n_latents,):
        raise ValueError(
            f"b_enc must have the shape ({n_latents},) (n_latents), got {tuple(b_enc.shape)}"
        )
    if b_dec is not None and b_dec.shape != (d_in,):
        raise ValueError(f"b_dec must have the shape ({d_in},) (d_in), got {tuple(b_dec.shape)}")


def check_k(k: int, n_latents: int) -> None:
    """Raise ValueError unless 1 ≤ k ≤ n_latents."""
    if not 1 <= k <= n_latents:
        raise ValueError(f"k must be in [1, {n_latents}] (the number of latents), got {k}")


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, k: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        cast_x, cast_W = x.to(dtype), W.to(dtype)
        cast_b = None if b is None else b.to(dtype)
        values, indices = ops.topk_encode(cast_x, cast_W, cast_b, k, relu=True)
        ctx.save_for_backward(cast_x, cast_W, values, indices)
        ctx.dtypes = (x.dtype, W.dtype, None if b is None else b.dtype)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, W, values, indices = ctx.saved_tensors
        x_dtype, W_dtype, b_dtype = ctx.dtypes
        d_scores = _relu_backward(d_values, values)
        dx = dW = db = None
        if ctx.needs_input_grad[0]:
            dx = ops.gather_sum(d_scores, indices, W).to(x_dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            csc = ops.csc_by_latent(indices, len(W))
            if ctx.needs_input_grad[1]:
                dW = ops.scatter_outer(d_scores, csc, x).to(W_dtype)
            if ctx.needs_input_grad[2]:
                db = ops.sum_by_latent(d_scores, indices, csc).to(b_dtype)
        return dx, dW, db, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, indices: Tensor, W: Tensor, b: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        cast_values, cast_W = values.to(dtype), W.to(dtype)
        out = ops.gather_sum(cast_values, indices, cast_W)
        ctx.save_for_backward(cast_values, indices, cast_W)
        ctx.dtypes = (values.dtype, W.dtype, None if b is None else b.dtype)
        return out if b is None else out + b.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, W = ctx.saved_tensors
        values_dtype, W_dtype, b_dtype = ctx.dtypes
        d_values = dW = db = None
        if ctx.needs_input_grad[0]:
            d_values = ops.gather_dot(d_out, indices, W).to(values_dtype)
        if ctx.needs_input_grad[2]:
            csc = ops.csc_by_latent(indices, len(W))
            dW = ops.scatter_outer(values, csc, d_out).to(W_dtype)
        if ctx.needs_input_grad[3]:
            db = d_out.sum(0).to(b_dtype)
        return d_values, None, dW, db, None


class _TopKSAE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor | None,
        W_dec: Tensor,
        b_dec: Tensor | None,
        k: int,
        dtype: torch.dtype,
        shards: Shards | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        centered = (x if b_dec is None else x - b_dec).to(dtype)
        cast_enc, cast_dec = W_enc.to(dtype), W_dec.to(dtype)
        cast_b = None if b_enc is None else b_enc.to(dtype)
        values, indices = ops.topk_encode(centered, cast_enc, cast_b, k, relu=True)
        if shards is not None:
            values = shards.keep(values)
        out = ops.gather_sum(values, indices, cast_dec)
        if shards is not None:
            out = shards.sum(out)
        if b_dec is not None:
            out += b_dec
        ctx.save_for_backward(centered, cast_enc, cast_dec, values, indices)
        ctx.shards = shards
        ctx.dtypes = [None if t is None else t.dtype for t in (x, W_enc, b_enc, W_dec, b_dec)]
        ctx.mark_non_differentiable(indices)
        return out, values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_codes: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        centered, W_enc, W_dec, values, indices = ctx.saved_tensors
        x_dtype, enc_dtype, b_enc_dtype, dec_dtype, b_dec_dtype = ctx.dtypes
        need_x, need_enc, need_b_enc, need_dec, need_b_dec, *_rest = ctx.needs_input_grad
        d_values = ops.gather_dot(d_out, indices, W_dec) + d_codes
        d_scores = _relu_backward(d_values, values)
        dx = d_enc = d_b_enc = d_dec = d_b_dec = None
        if need_enc or need_dec or need_b_enc or need_b_dec:
            csc = ops.csc_by_latent(indices, len(W_enc))
            if need_enc:
                d_enc = ops.scatter_outer(d_scores, csc, centered).to(enc_dtype)
            if need_dec:
                d_dec = ops.scatter_outer(values, csc, d_out).to(dec_dtype)
        sum_shards = (lambda partial: partial) if ctx.shards is None else ctx.shards.sum
        if need_x:
            dx = sum_shards(ops.gather_sum(d_scores, indices, W_enc)).to(x_dtype)
        if need_b_enc or need_b_dec:
            by_latent = ops.sum_by_latent(d_scores, indices, csc)
            if need_b_enc:
                d_b_enc = by_latent.to(b_enc_dtype)
            if need_b_dec:
                # Σ_n dx[n] = by_latent @ W_enc: one matrix-vector product, no dx needed.
                sum_dx = sum_shards(by_latent.to(W_enc.dtype) @ W_enc)
                d_b_dec = (d_out.sum(0) - sum_dx).to(b_dec_dtype)
        return dx, d_enc, d_b_enc, d_dec, d_b_dec, None, None, None


def _compose_encode(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`_Encode` from ops with all derivatives: the selection has none, so it is made first."""
    x, W, b = x.to(dtype), W.to(dtype), None if b is None else b.to(dtype)
    fixed_b = None if b is None else b.detach()
    indices = ops.topk_encode(x.detach(), W.detach(), fixed_b, k, relu=True)[1]
    scores = gather_dot(x, indices, W)
    return (scores if b is None else scores + b[indices]).relu(), indices


def _compose_decode(
    values: Tensor, indices: Tensor, W: Tensor, b: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`_Decode` from ops with all derivatives."""
    out = gather_sum(values.to(dtype), indices, W.to(dtype))
    return out if b is None else out + b.to(dtype)


def _relu_backward(d_values: Tensor, values: Tensor) -> Tensor:
    """0 where ReLU clipped. The test is `values <= 0`, and not its opposite, to pass NaN on."""
    return torch.where(values <= 0, torch.zeros_like(d_values), d_values)


def _dtype(weight: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's if it is on, else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
