"""AuxK: the loss that trains dead latents, with its gradients, and without autograd.

    z = x W_encᵀ + b_enc            codes = ReLU of the k largest of each row of z, else 0
    r = codes W_dec − error         loss = Σ_n weight_n |r_n|²

While dead latents are few against k, this takes five dense products with all of them: less than
gathering k rows per token, and no selection is sorted by latent. The (N, Q) matrices are made a
piece of the tokens at a time. With many dead latents it is the sparse ops of any other step.

Legend: N tokens, D inputs, Q dead latents, k active ones per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .codes import Shards
from .matmul import add_product_, product, segments

_PIECE_BYTES = 2**30  # of what is stored of a piece of the tokens


class AuxK(NamedTuple):
    """What AuxK gives: its errors and gradients, in float32, or float64 if the weights are."""

    sq_error: Tensor
    """(N,) |r_n|²; 0 where the weight is."""
    W_enc: Tensor
    """(Q, D) d loss / d W_enc."""
    b_enc: Tensor | None
    """(Q,) d loss / d b_enc; None without one."""
    W_dec: Tensor
    """(Q, D) d loss / d W_dec."""


class _Inputs(NamedTuple):
    centered: Tensor  # (N, D)
    error: Tensor  # (N, D)
    weight: Tensor  # (N,)
    scale: Tensor  # () the largest weight
    W_enc: Tensor  # (Q, D)
    b_enc: Tensor | None  # (Q,)
    W_dec: Tensor  # (Q, D)
    k: int
    shards: Shards | None


@torch.no_grad()
def auxk(
    centered: Tensor,
    error: Tensor,
    weight: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    W_dec: Tensor,
    k: int,
    *,
    shards: Shards | None = None,
    max_latents: int | None = None,
) -> AuxK:
    """The errors of AuxK, and the gradients of Σ_n weight_n |r_n|² with respect to the weights.

    centered and error (N, D), weight (N,) ≥ 0, W_enc and W_dec (Q, D) and b_enc (Q,) of the dead
    latents, all but `weight` in one dtype. All Q may be active if they are at most k. A token of
    weight 0 has no part in anything, whatever its rows hold; NaN anywhere else reaches the result.

    With `shards`, the latents are one shard's, of which there may be none, and `max_latents` is the
    most that any shard may have, so that all go the same way. Collective then.

    Raises ValueError if k is below 1.
    """
    q = len(W_enc)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    wide = torch.promote_types(W_enc.dtype, torch.float32)
    weight = weight.to(wide)
    # Weights may be too small for half precision: the largest is taken out until the end.
    scale = weight.amax() if len(weight) else weight.new_ones(())
    inputs = _Inputs(
        centered,
        error,
        weight,
        scale,
        _pad(W_enc),
        None if b_enc is None else _pad(b_enc),
        _pad(W_dec),
        k,
        shards,
    )
    most = _padded(max(q, max_latents or 0))
    few = latents_are_few(most, k, W_enc)
    sums = _by_dense_products(inputs, most) if few else _by_sparse_ops(inputs)
    twice = 2 * scale
    return AuxK(
        sums.sq_error,
        sums.W_enc[:q].mul_(twice),
        None if sums.b_enc is None else sums.b_enc[:q].mul_(twice),
        sums.W_dec[:q].mul_(twice),
    )


def latents_are_few(n_latents: int, k: int, like: Tensor) -> bool:
    """Whether products with all latents take less time than k rows gathered per token.

    On a GPU in half precision, gathering takes k D numbers through the L2 cache, at 5 TB/s, and a
    product 2 Q D flop at 790 TF/s and 2 Q numbers through memory at 4.3 TB/s: published rates, not
    timed here. In float32, without TF32, a product is 12 times as long. The CPU's is timed.
    """
    if like.device.type == "cpu":
        return n_latents <= 16 * k
    return n_latents <= (130 if like.element_size() == 2 else 20) * k


def _by_dense_products(inputs: _Inputs, max_latents: int) -> AuxK:
    sums = _zeros(inputs)
    (n, d), e = inputs.centered.shape, inputs.centered.element_size()
    row_bytes = 2 * max_latents * e + (sums.W_dec.element_size() + 2 * e) * d
    for rows in segments(n, row_bytes, _PIECE_BYTES):
        _add_piece_(sums, inputs, rows)
    return sums


def _add_piece_(sums: AuxK, inputs: _Inputs, rows: slice) -> None:
    """Add the tokens `rows` to the sums."""
    W_enc, b_enc, W_dec, k, shards = inputs[4:]
    error, weight = inputs.error[rows], inputs.weight[rows]
    x = inputs.centered[rows].masked_fill((weight == 0)[:, None], 0)
    codes = x @ W_enc.T if b_enc is None else torch.addmm(b_enc, x, W_enc.T)
    ops.keep_topk_(codes, k)
    if shards is not None:
        _keep_of_all_(codes, k, shards)
    e_hat = product(codes, W_dec)
    if shards is not None:
        e_hat = shards.sum(e_hat)
    sums.sq_error[rows], d_e_hat = ops.aux_residual(e_hat, error, weight, inputs.scale)
    del e_hat
    d_codes = _relu_backward_(d_e_hat @ W_dec.T, codes)
    add_product_(sums.W_dec, codes.T, d_e_hat)
    del codes
    add_product_(sums.W_enc, d_codes.T, x)
    if sums.b_enc is not None:
        sums.b_enc.add_(d_codes.sum(0, dtype=sums.b_enc.dtype))


def _keep_of_all_(codes: Tensor, k: int, shards: Shards) -> None:
    """Zero those codes (N, Q), at most k of a row above 0, that are not the k largest of all
    shards."""
    # Ascending by latent, as equal candidates rank; those that are 0 change nothing.
    indices = codes.topk(min(k, codes.shape[1]), dim=1, sorted=False).indices.sort(1).values
    offered = shards.keep(codes.gather(1, indices))
    codes.zero_().scatter_(1, indices, offered)


def _by_sparse_ops(inputs: _Inputs) -> AuxK:
    _, error, weight, scale, W_enc, b_enc, W_dec, k, shards = inputs
    sums, x = _zeros(inputs), inputs.centered.masked_fill((weight == 0)[:, None], 0)
    values, indices = ops.topk_encode(x, W_enc, b_enc, min(k, len(W_enc)), relu=True)
    values = values if shards is None else shards.keep(values)
    e_hat = ops.gather_sum(values, indices, W_dec)
    if shards is not None:
        e_hat = shards.sum(e_hat)
    sq_error, d_e_hat = ops.aux_residual(e_hat, error, weight, scale)
    d_scores = _relu_backward_(ops.gather_dot(d_e_hat, indices, W_dec), values)
    csc = ops.csc_by_latent(indices, len(W_enc))
    ops.scatter_outer(values, csc, d_e_hat, sums.W_dec)
    ops.scatter_outer(d_scores, csc, x, sums.W_enc)
    by_latent = None if b_enc is None else ops.sum_by_latent(d_scores, indices, csc)
    return sums._replace(sq_error=sq_error, b_enc=by_latent)


def _relu_backward_(d_values: Tensor, values: Tensor) -> Tensor:
    """0 where values <= 0, a test that passes NaN on; in place."""
    backward = torch.ops.aten.threshold_backward.grad_input
    return backward(d_values, values, 0, grad_input=d_values)


def _zeros(inputs: _Inputs) -> AuxK:
    new_zeros, (q, d) = inputs.weight.new_zeros, inputs.W_enc.shape
    b_enc = None if inputs.b_enc is None else new_zeros(q)
    return AuxK(new_zeros(len(inputs.weight)), new_zeros(q, d), b_enc, new_zeros(q, d))


def _padded(n_latents: int) -> int:
    """A multiple of 8, since the tensor cores want rows of 16 bytes; 8 at least, so that there is
    always a latent."""
    return max(8, -(-n_latents // 8) * 8)


def _pad(rows: Tensor) -> Tensor:
    """With rows of zeros at the end, which are latents that are never active."""
    missing = _padded(len(rows)) - len(rows)
    return F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing)) if missing else rows
