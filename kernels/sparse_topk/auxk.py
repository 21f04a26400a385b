"""AuxK: the loss that trains dead latents, with its gradients, by dense products.

    z = x W_encᵀ + b_enc            codes = ReLU of the k largest of each row of z, else 0
    r = codes W_dec − error         loss = Σ_n weight_n |r_n|²

Dead latents are few against their k, so five products with all of them cost less than gathering k
rows per token, and no selection is sorted by latent. The (N, Q) matrices are made a piece of the
tokens at a time.

Legend: N tokens, D inputs, Q dead latents, k active ones per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .functional import Shards
from .matmul import add_product_, product, segments

_BYTES = {"cuda": 256 * 2**20, "cpu": 8 * 2**20}  # of a piece of an (N, Q) matrix


class AuxK(NamedTuple):
    """What AuxK gives: its errors and gradients, in float32, or float64 if the weights are."""

    sq_error: Tensor
    """(N,) |r_n|²; 0 where the weight is."""
    W_enc: Tensor
    """(Q, D) d loss / d W_enc."""
    b_enc: Tensor
    """(Q,) d loss / d b_enc."""
    W_dec: Tensor
    """(Q, D) d loss / d W_dec."""


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

    centered and error (N, D), weight (N,), W_enc and W_dec (Q, D) and b_enc (Q,) of the dead
    latents, all but `weight` in one dtype. All Q are active if they are fewer than k. A token of
    weight 0 has no part in anything, whatever its rows hold; NaN anywhere else reaches the result.

    With `shards`, the latents are one shard's, of which there may be none, and `max_latents` is the
    most that any shard may have, so that all cut the same pieces. Collective then.
    """
    wide = torch.promote_types(W_enc.dtype, torch.float32)
    weight = weight.to(wide)
    kept = (weight != 0)[:, None]  # (N, 1); NaN is kept
    # Weights may be too small for half precision: gradients are computed for weights up to 1.
    scale = weight.abs().amax() if len(weight) else weight.new_ones(())
    relative = torch.where(kept, weight[:, None] / scale, 0)
    grads = AuxK(
        centered.new_empty(len(centered), dtype=wide),
        torch.zeros_like(W_enc, dtype=wide),
        W_enc.new_zeros(len(W_enc), dtype=wide),
        torch.zeros_like(W_dec, dtype=wide),
    )
    row_bytes = max(1, max_latents or len(W_enc)) * W_enc.element_size()
    for rows in segments(len(centered), row_bytes, _BYTES.get(W_enc.device.type, _BYTES["cuda"])):
        x = torch.where(kept[rows], centered[rows], 0)
        codes = _codes(x, W_enc, b_enc, k, shards)
        e_hat = product(codes, W_dec)
        if shards is not None:
            e_hat = shards.sum(e_hat)
        r = torch.where(kept[rows], e_hat - error[rows], 0)
        grads.sq_error[rows] = r.square().sum(1)
        d_e_hat = (r * relative[rows]).to(W_dec.dtype)
        # ReLU's backward: 0 where codes <= 0, a test that passes NaN on.
        d_codes = torch.ops.aten.threshold_backward(d_e_hat @ W_dec.T, codes, 0)
        add_product_(grads.W_dec, codes.T, d_e_hat)
        add_product_(grads.W_enc, d_codes.T, x)
        grads.b_enc.add_(d_codes.sum(0, dtype=wide))
    for grad in grads[1:]:
        grad.mul_(2 * scale)
    return grads


def _codes(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, shards: Shards | None) -> Tensor:
    """(N, Q): ReLU of the k largest scores of each token, of all shards; else 0."""
    codes = x @ W_enc.T if b_enc is None else torch.addmm(b_enc, x, W_enc.T)
    ops.keep_topk_(codes, k)
    if shards is not None:
        # By latent, as equal candidates rank; those that are 0 change nothing.
        indices = codes.topk(min(k, len(W_enc)), dim=1, sorted=False).indices.sort(1).values
        offered = shards.keep(codes.gather(1, indices))
        codes.zero_().scatter_(1, indices, offered)
    return codes
