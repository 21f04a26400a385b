"""The dtypes that kernels add in, and the precision that they multiply with. It is apart from the
kernels because both follow rules of torch, not of any one kernel."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor


def sum_type(*tensors: Tensor) -> tl.dtype:
    """The dtype of sums over `tensors`: float64 if one of them has it, else float32."""
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies `dtype`: "tf32" or "tf32x3".

    In float32, "tf32" is one TF32 product, used if torch's own switch allows it; "tf32x3" is three,
    which keep about 22 bits of each factor. Half-precision products are exact either way.
    """
    if dtype != torch.float32:
        return "tf32"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9: the old switch raises once this one is used
        allowed = matmul.fp32_precision == "tf32"
    else:
        allowed = matmul.allow_tf32
    return "tf32" if allowed else "tf32x3"
