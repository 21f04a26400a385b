"""The verbs in Triton, with the names, arguments and results of `torch_ops`."""

from .adam import adam_unit_norm_
from .encode import topk_encode
from .sparse import (
    LatentOrder,
    gather_dot,
    gather_sum,
    order_by_latent,
    scatter_outer,
    sum_by_latent,
)

__all__ = [
    "LatentOrder",
    "adam_unit_norm_",
    "gather_dot",
    "gather_sum",
    "order_by_latent",
    "scatter_outer",
    "sum_by_latent",
    "topk_encode",
]
