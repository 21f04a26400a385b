"""Products by torch.mm (cuBLAS), a segment of their rows at a time so that memory stays bounded. It
is apart from its users, `auxk` and `triton_ops`, because neither imports the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def segments(length: int, row_bytes: int, max_bytes: int) -> Iterator[slice]:
    """Slices that cover `length` rows. Each takes at most `max_bytes`, but at least one row, and
    starts at a multiple of 128 rows if 128 rows fit."""
    step = max(1, max_bytes // row_bytes)
    step = step // 128 * 128 or step
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as float32, or float64 if they are: (I, J), (J, L) → (I, L)."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if not a.is_cuda:  # torch has the mixed product on CUDA only
        return torch.mm(a.float(), b.float())
    return torch.mm(a, b, out_dtype=torch.float32)


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, where out (I, L) is as `product` returns it."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(product(a, b))
