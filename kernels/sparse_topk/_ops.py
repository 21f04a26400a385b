"""The namespace of the torch operators.

A build for Hugging Face's hub of kernels has another file in this place, with the same two names
and a namespace of its own, so that several versions can be loaded in one process.
"""

from __future__ import annotations

import torch

ops = torch.ops.sparse_topk


def add_op_namespace_prefix(op_name: str) -> str:
    """The qualified name of the operator `op_name`: "namespace::op_name"."""
    return f"sparse_topk::{op_name}"
