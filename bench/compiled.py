"""What the compiler makes of every Triton kernel, for three chips, on a machine without a GPU.

    python -m bench.compiled        prints the table, then each fault; ends with 1 if there is one

It shows no time: a kernel that compiles well may still be slow.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparse_topk.triton_ops import sparse

from .compiled_build import Build, Compiled, compile_for, violations

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def sparse_builds(d: int, k: int, dtype: torch.dtype) -> list[Build]:
    """The kernels of `triton_ops.sparse` at one width, K and dtype of all arguments."""
    name = f"{str(dtype).removeprefix('torch.')} D={d} K={k}"
    some = torch.empty(0, dtype=dtype)
    data, ids = TYPES[dtype], "*i64"
    sums = sparse.sum_type(some)
    aligned = ("D",) if d % 16 == 0 else ()

    def build(
        verb: str, kernel: Any, arguments: dict[str, str], tile: tuple[int, int, int], **more: int
    ) -> Build:
        block, rows, warps = tile
        return Build(
            f"{verb} {name}",
            kernel,
            arguments | {"D": "i32"},
            {"K": k, "BLOCK_D": block, "ROWS": rows, "SUM": sums, **more},
            num_warps=warps,
            divisible=aligned,
            needs={"wide_loads": rows} if aligned else {},
        )

    return [
        build(
            "gather_sum",
            sparse.gather_sum_kernel,
            {"values": data, "indices": ids, "W": data, "out": data},
            sparse.gather_sum_tile(d, k, some.element_size()),
        ),
        build(
            "gather_dot",
            sparse.gather_dot_kernel,
            {"x": data, "indices": ids, "W": data, "out": data},
            sparse.gather_dot_tile(some.element_size()),
        ),
        build(
            "sum_chunks",
            sparse.sum_chunks_kernel,
            {"values": data, "order": ids, "offsets": ids, "owners": ids}
            | {"x": data, "partials": "*fp32"},
            sparse.sum_chunks_tile(d, some.element_size()),
            CHUNK=sparse.CHUNK,
        ),
        build(
            "scatter_outer",
            sparse.scatter_outer_kernel,
            {"values": data, "order": ids, "offsets": ids}
            | {"x": data, "partials": "*fp32", "out": data},
            sparse.scatter_outer_tile(d, some.element_size()),
            CHUNK=sparse.CHUNK,
        ),
    ]


BUILDS = [
    build
    for d, k, dtype in [
        (512, 32, torch.bfloat16),
        (2048, 32, torch.bfloat16),
        (512, 32, torch.float32),
        (770, 3, torch.bfloat16),
    ]
    for build in sparse_builds(d, k, dtype)
]


def builds() -> list[Build]:
    """Every kernel of the package, at the shapes and dtypes that matter."""
    if not (Path(__file__).parent / "compiled_encode.py").exists():
        return BUILDS
    from .compiled_encode import BUILDS as ENCODE

    return ENCODE + BUILDS


def compile_all() -> Iterator[tuple[Build, int, Compiled]]:
    """Compile every build for every chip of its own."""
    for build in builds():
        for chip in build.chips:
            yield build, chip, compile_for(build, chip)


def check() -> list[str]:
    """What is wrong with the kernels, one sentence a fault; empty where nothing is."""
    return [fault for made in compile_all() for fault in violations(*made)]


def main() -> int:
    line = "{:<44} {:>6} {:>5} {:>6} {:>7} {:>6} {:>6} {:>6} {:>5} {:>6}"
    print(line.format(*"kernel chip regs spills shared instr tensor 16B-ld ld 16B-st".split()))
    faults = []
    for build, chip, made in compile_all():
        sizes = (made.registers, made.spills, made.shared, made.instructions)
        kinds = (made.tensor_core, made.wide_loads, made.loads, made.wide_stores)
        print(line.format(build.name, f"sm_{chip}", *sizes, *kinds))
        faults += violations(build, chip, made)
    print(*faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
