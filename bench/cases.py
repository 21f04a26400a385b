"""What the benchmarks vary (implementation, shape, dtype) and the random tensors that they use, for
both test files.

Legend: N tokens, D inputs, M latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import pytest
import torch
from torch import Tensor

from .impls import IMPLS
from .shapes import SHAPES, ProblemShape

KIND = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float32)

each_impl = pytest.mark.parametrize("impl", IMPLS, ids=lambda impl: impl.name)
each_shape = pytest.mark.parametrize("shape", SHAPES[KIND], ids=lambda shape: shape.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def tokens(shape: ProblemShape, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Random x (N, D), four of them in turn, so that no round finds its input in the cache."""
    return cycle([torch.randn(shape.n, shape.d, device=device, dtype=dtype) for _ in range(4)])


def weight(shape: ProblemShape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random rows of norm 1, (M, D)."""
    rows = torch.randn(shape.m, shape.d, device=device, dtype=dtype)
    return torch.nn.functional.normalize(rows, dim=1)
