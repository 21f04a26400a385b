"""Compile every Triton kernel for three chips, without a GPU, and check registers, spills, shared
memory and instructions.

    python -m bench.compiled        prints a table and the faults; exits with 1 if there is a fault

It measures no time: a kernel that compiles well may still be slow.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import triton

from sparse_topk.triton_ops import adam, keep_topk, normuon, precision, residual, sparse

from . import compiled_encode, compiled_residuals
from .compiled_build import Build, Compiled, compile_for, violations

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def sparse_builds(d: int, k: int, dtype: torch.dtype) -> list[Build]:
    """The kernels of `triton_ops.sparse` for one D, K and dtype."""
    name = f"{str(dtype).removeprefix('torch.')} D={d} K={k}"
    some = torch.empty(0, dtype=dtype)
    data, ids = TYPES[dtype], "*i64"
    acc_dtype = precision.sum_type(some)
    aligned = ("D",) if d % 16 == 0 else ()
    divisible = aligned + (("K",) if k % 16 == 0 else ())

    def build(
        op: str, kernel: Any, arguments: dict[str, str], tile: tuple[int, int, int], **more: Any
    ) -> Build:
        block, rows, warps = tile
        return Build(
            f"{op} {name}",
            kernel,
            {"D": "i32", "K": "i32"} | arguments,
            {"BLOCK_D": block, "ROWS": rows, "ACC_DTYPE": acc_dtype, **more},
            num_warps=warps,
            divisible=divisible,
            needs={"wide_loads": rows} if aligned else {},
            allows={"narrow_loads": 2 * rows + 8} if aligned else {},  # of indices and values
        )

    return [
        build(
            "gather_sum",
            sparse.gather_sum_kernel,
            {"values_ptr": data, "indices_ptr": ids, "W_ptr": data, "out_ptr": data},
            sparse.gather_sum_tile(d, k, some.element_size()),
        ),
        build(
            "gather_dot",
            sparse.gather_dot_kernel,
            {"x_ptr": data, "indices_ptr": ids, "W_ptr": data, "out_ptr": data},
            sparse.gather_dot_tile(some.element_size()),
        ),
        build(
            "sum_chunks",
            sparse.sum_chunks_kernel,
            {"values_ptr": data, "perm_ptr": ids, "indptr_ptr": ids, "M": "i32"}
            | {"x_ptr": data, "partials_ptr": "*fp32"},
            sparse.sum_chunks_tile(d, some.element_size()),
            CHUNK=sparse.CHUNK,
        ),
        build(
            "scatter_outer",
            sparse.scatter_outer_kernel,
            {"values_ptr": data, "perm_ptr": ids, "indptr_ptr": ids}
            | {"x_ptr": data, "partials_ptr": "*fp32", "out_ptr": data},
            sparse.scatter_outer_tile(d, some.element_size()),
            CHUNK=sparse.CHUNK,
            ADD=False,
        ),
        build(
            "scatter_outer add",
            sparse.scatter_outer_kernel,
            {"values_ptr": data, "perm_ptr": ids, "indptr_ptr": ids}
            | {"x_ptr": data, "partials_ptr": "*fp32", "out_ptr": "*fp32"},
            sparse.scatter_outer_tile(d, some.element_size()),
            CHUNK=sparse.CHUNK,
            ADD=True,
        ),
    ]


def keep_topk_build(q: int, dtype: torch.dtype) -> Build:
    """ReLU of the k largest, in rows of q scores."""
    block, warps = keep_topk.keep_topk_tile(q)
    bits = {2: triton.language.int16, 4: triton.language.int32}[dtype.itemsize]
    constants = {"BLOCK": block, "WHOLE": q <= block, "BITS": bits, "KEY": triton.language.int32}
    vectors = block * dtype.itemsize // (warps * 32 * 16) if q % 16 == 0 else 0
    return Build(
        f"keep_topk {TYPES[dtype][1:]} Q={q}",
        keep_topk.keep_topk_kernel,
        {"z_ptr": TYPES[dtype], "Q": "i32", "k": "i32"},
        constants | {"NAN_KEY": 2 ** (8 * dtype.itemsize - 1) - 1},
        num_warps=warps,
        divisible=("Q", "k") if q % 16 == 0 else ("k",),
        needs={"wide_loads": vectors, "wide_stores": vectors},
    )


def aux_residual_build(d: int, dtype: torch.dtype) -> Build:
    """AuxK's residual, from a float32 product."""
    block, warps = residual.aux_residual_tile(d)
    wide = block // (warps * 32 * 4) + block * dtype.itemsize // (warps * 32 * 16)
    return Build(
        f"aux_residual {TYPES[dtype][1:]} D={d}",
        residual.aux_residual_kernel,
        {"e_hat_ptr": "*fp32", "error_ptr": TYPES[dtype], "d_ptr": TYPES[dtype], "D": "i32"}
        | dict.fromkeys(("weight_ptr", "scale_ptr", "sq_error_ptr"), "*fp32"),
        {"BLOCK_D": block, "ACC_DTYPE": precision.sum_type()},
        num_warps=warps,
        divisible=("D",),
        needs={"wide_loads": wide, "wide_stores": 1},
        allows={"narrow_loads": 2},
    )


def normuon_builds(d: int) -> list[Build]:
    """Both passes of NorMuon on rows of D float32 weights of norm 1, with clipping and shadow."""
    block, warps = normuon.row_tile(d)
    vectors = block // (warps * 32 * 4)  # of 16 bytes per thread
    constants = {"BLOCK_D": block, "ACC_DTYPE": precision.sum_type(), "UNIT_NORM": True}
    passes: list[tuple[Any, dict[str, str], int, int]] = [
        (
            normuon.tangent_momentum_kernel,
            {"grad_ptr": "*fp32", "exp_avg_ptr": "*fp32", "direction_ptr": "*bf16"}
            | {"grad_scale_ptr": "*fp32", "beta": "fp32", "rest": "fp32"},
            3 * vectors,
            vectors,
        ),
        (
            normuon.apply_rows_kernel,
            {"update_ptr": "*bf16", "row_sq_ptr": "*fp32", "shadow_ptr": "*bf16"}
            | dict.fromkeys(("lr", "rest", "bias_correction", "eps"), "fp32"),
            vectors,
            vectors,
        ),
    ]
    return [
        Build(
            f"{kernel.fn.__name__.removesuffix('_kernel')} D={d}",
            kernel,
            {"weight_ptr": "*fp32", "D": "i32"} | arguments,
            constants,
            num_warps=warps,
            divisible=("D",),
            needs={"wide_loads": loads, "wide_stores": stores},
            allows={"narrow_loads": 1},
        )
        for kernel, arguments, loads, stores in passes
    ]


def adam_build(d: int | None, clip: bool) -> Build:
    """Adam on rows of D float32 weights, or without the unit norm if D is None. With `clip`, the
    gradient is scaled by a factor, and a bfloat16 shadow is written."""
    arguments = dict.fromkeys(("weight_ptr", "grad_ptr", "exp_avg_ptr", "exp_avg_sq_ptr"), "*fp32")
    arguments |= {"step_size": "fp32", "eps": "fp32", "c1": "fp32", "c2": "fp32"}
    constants: dict[str, Any] = {"ACC_DTYPE": precision.sum_type()}
    if clip:
        arguments |= {"shadow_ptr": "*bf16", "grad_scale_ptr": "*fp32"}
    else:
        constants |= {"shadow_ptr": None, "grad_scale_ptr": None}
    block, warps = adam.adam_flat_tile() if d is None else adam.row_tile(d)
    size, width = ("size", "BLOCK") if d is None else ("D", "BLOCK_D")
    vectors = block // (warps * 32 * 4)  # of 16 bytes per thread
    return Build(
        "adam" + ("" if d is None else f" unit_norm D={d}") + (" clip shadow" if clip else ""),
        adam.adam_flat_kernel if d is None else adam.adam_rows_kernel,
        arguments | {size: "i32"},
        constants | {width: block},
        num_warps=warps,
        divisible=(size,),
        needs={"wide_loads": 4 * vectors, "wide_stores": 3 * vectors},
        allows={"narrow_loads": int(clip)},
    )


BUILDS = [
    build
    for d, k, dtype in [
        (2048, 32, torch.bfloat16),
        (512, 32, torch.float32),
        (770, 3, torch.bfloat16),
    ]
    for build in sparse_builds(d, k, dtype)
]
BUILDS += [
    *(keep_topk_build(q, torch.bfloat16) for q in (1008, 1001, 4096, 16384, 65536)),
    *(keep_topk_build(q, torch.float32) for q in (1008, 16384)),
    aux_residual_build(512, torch.bfloat16),
    aux_residual_build(2048, torch.float32),
    adam_build(None, clip=True),
    adam_build(2048, clip=False),
    adam_build(2048, clip=True),
    adam_build(8192, clip=True),
    *normuon_builds(512),
    *normuon_builds(2048),
    *normuon_builds(8192),
]


def builds() -> list[Build]:
    """Every kernel of the package, at the shapes and dtypes that matter."""
    return compiled_encode.BUILDS + BUILDS + compiled_residuals.BUILDS


def compile_all() -> Iterator[tuple[Build, int, Compiled]]:
    """Compile every build for each of its chips, on all cores."""
    all_builds = builds()
    tasks = [(i, chip) for i, build in enumerate(all_builds) for chip in build.chips]
    with ProcessPoolExecutor() as pool:
        for (i, chip), compiled in zip(tasks, pool.map(_compile, tasks), strict=True):
            yield all_builds[i], chip, compiled


def _compile(task: tuple[int, int]) -> Compiled:
    i, chip = task
    return compile_for(builds()[i], chip)


def check() -> list[str]:
    """The faults of all kernels, one sentence each."""
    return [fault for result in compile_all() for fault in violations(*result)]


def main() -> int:
    """The program; returns its exit code."""
    line = "{:<44} {:>6} {:>5} {:>6} {:>7} {:>6} {:>6} {:>6} {:>7} {:>6}"
    print(line.format(*"kernel chip regs spills shared instr tensor 16B-ld <16B-ld 16B-st".split()))
    faults = []
    for build, chip, compiled in compile_all():
        sizes = (compiled.registers, compiled.spills, compiled.shared, compiled.instructions)
        loads = (compiled.wide_loads, compiled.narrow_loads)
        kinds = (compiled.tensor_core, *loads, compiled.wide_stores)
        print(line.format(build.name, f"sm_{chip}", *sizes, *kinds))
        faults += violations(build, chip, compiled)
    print(*faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
