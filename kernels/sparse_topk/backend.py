"""Which module computes the verbs: plain torch, or Triton on a CUDA device.

SPARSE_TOPK_BACKEND chooses: "auto" (the default) takes Triton for tensors on a CUDA device and
torch elsewhere, "torch" and "triton" take the one named. Triton is imported when it is first
needed. Where it cannot be, the import fails; nothing falls back unasked.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from . import torch_ops

_CHOICES = ("auto", "torch", "triton")


def ops_for(tensor: Tensor) -> ModuleType:
    """The module whose verbs to call for `tensor` and others on its device.

    Raises ValueError if SPARSE_TOPK_BACKEND is none of the three, and RuntimeError where it is
    "triton" for a tensor that is not on a CUDA device, unless Triton's interpreter is on.
    """
    if backend_name(tensor.device) == "torch":
        return torch_ops
    from . import triton_ops

    if tensor.device.type != "cuda":
        from triton import knobs

        if not knobs.runtime.interpret:
            raise RuntimeError(
                f"SPARSE_TOPK_BACKEND is 'triton', and the tensor is on {tensor.device}: Triton "
                "needs a CUDA device, or its interpreter, with TRITON_INTERPRET=1 from the start"
            )
    return triton_ops


def backend_name(device: torch.device | str) -> str:
    """The name of the backend for tensors on `device`: "torch" or "triton".

    Raises ValueError if SPARSE_TOPK_BACKEND is none of the three.
    """
    choice = os.environ.get("SPARSE_TOPK_BACKEND", "auto")
    if choice not in _CHOICES:
        raise ValueError(f"SPARSE_TOPK_BACKEND must be one of {_CHOICES}, got {choice!r}")
    if choice == "auto":
        return "triton" if torch.device(device).type == "cuda" else "torch"
    return choice
