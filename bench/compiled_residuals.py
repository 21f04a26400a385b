"""The builds that `bench.compiled` compiles of a training step's ops beside its sparse products.

Legend: D inputs, K active latents per token, R tokens per block.
"""

from __future__ import annotations

from typing import Any

import torch

from sparse_topk.triton_ops import (
    backward,
    bookkeeping,
    decode,
    moments,
    precision,
    sparse,
    standardization,
)

from .compiled_build import Build

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
TOKENS = 2**17  # L · N: large enough for the largest blocks


def standardize_build(d: int, dtype: torch.dtype, mask: bool, eps: float | None = 1e-5) -> Build:
    """Residuals in `dtype`, centered in bfloat16 if they are not float32."""
    data = TYPES[dtype]
    tokens, rows, block, warps = standardization.standardize_tile(TOKENS, d)
    arguments = {"x_ptr": data, "center_ptr": "*fp32", "centered_ptr": data}
    arguments |= dict.fromkeys(("mean_ptr", "std_ptr", "block_sq_dev_ptr"), "*fp32")
    arguments |= {"block_mean_ptr": "*fp64", "N": "i32"}
    constants: dict[str, Any] = {"D": d, "EPS": eps, "R": tokens, "ROWS": rows, "BLOCK_D": block}
    aligned = d % 16 == 0
    vectors = rows * block * dtype.itemsize // (16 * 32 * warps)
    return Build(
        f"standardize {data[1:]} D={d}" + (" masked" if mask else ""),
        standardization.standardize_kernel,
        arguments | ({"mask_ptr": "*i1"} if mask else {}),
        constants
        | {"ACC_DTYPE": precision.sum_type(torch.empty(0, dtype=dtype))}
        | ({} if mask else {"mask_ptr": None}),
        num_warps=warps,
        needs={"wide_loads": vectors, "wide_stores": vectors} if aligned else {},
    )


def decode_error_build(d: int, k: int, dtype: torch.dtype, mask: bool) -> Build:
    """W and x in `dtype`."""
    data = TYPES[dtype]
    tokens, rows, columns, warps = decode.decode_error_tile(TOKENS, d, k, dtype.itemsize)
    arguments = dict.fromkeys(("values_ptr", "W_ptr", "x_ptr", "error_ptr"), data)
    arguments |= dict.fromkeys(("b_ptr", "mean_ptr", "std_ptr"), "*fp32")
    arguments |= dict.fromkeys(("block_sq_dev_ptr", "block_sq_error_ptr"), "*fp32")
    arguments |= {"indices_ptr": "*i64", "block_mean_ptr": "*fp64"}
    arguments |= dict.fromkeys(("N", "D", "K"), "i32")
    aligned = ("D",) if d % 16 == 0 else ()
    return Build(
        f"decode_error {data[1:]} D={d} K={k}" + (" masked" if mask else ""),
        decode.decode_error_kernel,
        arguments | ({"mask_ptr": "*i1"} if mask else {}),
        {"EPS": 1e-5, "R": tokens, "ROWS": rows, "BLOCK_D": columns}
        | {"ACC_DTYPE": precision.sum_type(torch.empty(0, dtype=dtype))}
        | ({} if mask else {"mask_ptr": None}),
        num_warps=warps,
        divisible=aligned + (("K",) if k % 16 == 0 else ()),
        needs={"wide_loads": rows + 1, "wide_stores": 1} if aligned else {},
    )


def given_build(d: int, dtype: torch.dtype) -> Build:
    """The same kernel with the decoded vectors given, as for sharded latents."""
    full = decode_error_build(d, 1, dtype, mask=True)
    left_out = ("values_ptr", "indices_ptr", "b_ptr")
    return Build(
        f"reconstruction_error {TYPES[dtype][1:]} D={d}",
        full.kernel,
        {name: type_ for name, type_ in full.signature.items() if name not in (*left_out, "K")},
        {**full.constexprs, **dict.fromkeys(left_out), "K": 1},
        num_warps=full.num_warps,
        divisible=full.divisible,
        needs={"wide_loads": 2, "wide_stores": 1},
    )


def merge_build(mask: bool, sq_errors: bool) -> Build:
    """The moments of all tokens, after `decode_error` if with squared errors."""
    rows, columns, warps = moments.merge_blocks_tile()
    arguments = dict.fromkeys(("n_tokens_ptr", "mean_ptr", "sq_dev_ptr"), "*fp64")
    arguments |= {"block_mean_ptr": "*fp64", "block_sq_dev_ptr": "*fp32"}
    arguments |= dict.fromkeys(("N", "D", "BC"), "i32")
    optional = {"mask_ptr": "*i1"} if mask else {}
    if sq_errors:
        optional |= {"block_sq_error_ptr": "*fp32", "sq_error_ptr": "*fp64"}
    missing = {"mask_ptr", "block_sq_error_ptr", "sq_error_ptr"} - set(optional)
    return Build(
        "merge_blocks" + (" masked" if mask else "") + (" squares" if sq_errors else ""),
        moments.merge_blocks_kernel,
        arguments | optional,
        {"R": 32, "BLOCK_B": rows, "BLOCK_D": columns} | dict.fromkeys(missing),
        num_warps=warps,
        divisible=("D",),
    )


def decode_backward_build(d: int, k: int, dtype: torch.dtype) -> Build:
    """Everything as wide as `gather_dot` has it."""
    data = TYPES[dtype]
    block, rows, warps = sparse.gather_dot_tile(dtype.itemsize)
    arguments = dict.fromkeys(("error_ptr", "W_ptr", "values_ptr"), data)
    arguments |= dict.fromkeys(("d_scores_ptr", "scaled_ptr", "scale_ptr"), data)
    arguments |= {"indices_ptr": "*i64", "std_ptr": "*fp32", "factor_ptr": "*fp64"}
    arguments |= dict.fromkeys(("N", "D", "K"), "i32")
    return Build(
        f"decode_backward {data[1:]} D={d} K={k}",
        backward.decode_backward_kernel,
        arguments,
        {"EPS": 1e-5, "BLOCK_D": block, "ROWS": rows}
        | {"ACC_DTYPE": precision.sum_type(torch.empty(0, dtype=dtype))},
        num_warps=warps,
        divisible=("D",) if d % 16 == 0 else (),
        needs={"wide_loads": rows + 1} if d % 16 == 0 else {},
    )


def note_active_build(dtype: torch.dtype) -> Build:
    """With a mask."""
    block, warps = bookkeeping.note_active_tile()
    arguments = {"last_active_ptr": "*i64", "values_ptr": TYPES[dtype], "indices_ptr": "*i64"}
    arguments |= {"mask_ptr": "*i1", "threshold": "fp32", "now": "i64"}
    arguments |= dict.fromkeys(("size", "N", "K"), "i32")
    kernel = bookkeeping.note_active_kernel
    return Build("note_active", kernel, arguments, {"BLOCK": block}, num_warps=warps)


def merge_moments_build() -> Build:
    """Of two moments."""
    block, warps = bookkeeping.merge_moments_tile()
    names = [f"{n}_{of}_ptr" for of in "ab" for n in ("n", "mean", "sq_dev")]
    arguments = dict.fromkeys((*names, "n_ptr", "mean_ptr", "sq_dev_ptr"), "*fp64")
    kernel = bookkeeping.merge_moments_kernel
    arguments |= {"size": "i32"}
    return Build("merge_moments", kernel, arguments, {"BLOCK": block}, num_warps=warps)


BUILDS = [
    *(standardize_build(d, torch.bfloat16, mask=True) for d in (512, 2048, 4096, 8192, 770)),
    standardize_build(512, torch.float32, mask=False),
    standardize_build(2048, torch.float32, mask=True, eps=None),
    *(decode_error_build(d, 32, torch.bfloat16, mask=True) for d in (512, 2048, 4096)),
    decode_error_build(770, 3, torch.bfloat16, mask=False),
    decode_error_build(512, 32, torch.float32, mask=False),
    given_build(2048, torch.bfloat16),
    merge_build(mask=True, sq_errors=True),
    merge_build(mask=False, sq_errors=False),
    *(decode_backward_build(d, 32, torch.bfloat16) for d in (512, 2048, 770)),
    decode_backward_build(512, 32, torch.float32),
    note_active_build(torch.bfloat16),
    merge_moments_build(),
]
