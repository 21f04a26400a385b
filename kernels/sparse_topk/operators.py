"""The verbs as torch operators, `torch.ops.sparse_topk.*`: the backend is chosen at the call, and
torch.compile takes each as one node of its graph, whatever is inside.

Each has a fake twin, which gives the shape and dtype of the result without computing it.

Legend: N tokens, D inputs, M latents, K active latents a token.
"""

# No `from __future__ import annotations` here: torch reads the operators' schemas off them.

import torch
from torch import Tensor

from .backend import ops_for
from .torch_ops import LatentOrder


@torch.library.custom_op("sparse_topk::topk_encode", mutates_args=())
def topk_encode(x: Tensor, W: Tensor, b: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """See `torch_ops.topk_encode`."""
    return ops_for(x).topk_encode(x, W, b, k)


@topk_encode.register_fake
def _(x: Tensor, W: Tensor, b: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int64)


@torch.library.custom_op("sparse_topk::gather_sum", mutates_args=())
def gather_sum(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """See `torch_ops.gather_sum`."""
    return ops_for(W).gather_sum(values, indices, W)


@gather_sum.register_fake
def _(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return W.new_empty(len(indices), W.shape[1])


@torch.library.custom_op("sparse_topk::gather_dot", mutates_args=())
def gather_dot(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """See `torch_ops.gather_dot`."""
    return ops_for(W).gather_dot(x, indices, W)


@gather_dot.register_fake
def _(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return x.new_empty(indices.shape)


@torch.library.custom_op("sparse_topk::order_by_latent", mutates_args=())
def _order_by_latent(indices: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    order, offsets = ops_for(indices).order_by_latent(indices, n_latents)
    return order, offsets


@_order_by_latent.register_fake
def _(indices: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    return indices.new_empty(indices.numel()), indices.new_empty(n_latents + 1)


@torch.library.custom_op("sparse_topk::scatter_outer", mutates_args=())
def _scatter_outer(values: Tensor, order: Tensor, offsets: Tensor, x: Tensor) -> Tensor:
    return ops_for(x).scatter_outer(values, LatentOrder(order, offsets), x)


@_scatter_outer.register_fake
def _(values: Tensor, order: Tensor, offsets: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(len(offsets) - 1, x.shape[1])


@torch.library.custom_op("sparse_topk::sum_by_latent", mutates_args=())
def _sum_by_latent(values: Tensor, indices: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    return ops_for(values).sum_by_latent(values, indices, LatentOrder(order, offsets))


@_sum_by_latent.register_fake
def _(values: Tensor, indices: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.new_empty(len(offsets) - 1, dtype=dtype)


def order_by_latent(indices: Tensor, n_latents: int) -> LatentOrder:
    """See `torch_ops.order_by_latent`."""
    return LatentOrder(*_order_by_latent(indices, n_latents))


def scatter_outer(values: Tensor, order: LatentOrder, x: Tensor) -> Tensor:
    """See `torch_ops.scatter_outer`."""
    return _scatter_outer(values, order.order, order.offsets, x)


def sum_by_latent(values: Tensor, indices: Tensor, order: LatentOrder) -> Tensor:
    """See `torch_ops.sum_by_latent`."""
    return _sum_by_latent(values, indices, order.order, order.offsets)
