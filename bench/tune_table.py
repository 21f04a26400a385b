"""The kernels that have something to tune: for each, the function that chooses its tile, the tiles
to try, and how to run and to compile it.

A candidate is what the function would return. It takes the function's place while it is timed, so a
kernel's launcher needs nothing for this.

Legend: N tokens, D inputs, M latents, K active latents per token, G latents per group, T keys per
group, R tokens per block. For `keep_topk`, M are the dead latents.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product as combinations
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton

from sparse_topk.triton_ops import (
    adam,
    decode,
    keep_topk,
    normuon,
    residual,
    sparse,
    standardization,
)
from sparse_topk.triton_ops.topk import encode, product, select

from . import compiled, compiled_encode, compiled_residuals
from . import tune_inputs as inputs
from .compiled_build import Build
from .shapes import ENCODES, FEW_TOKENS, ProblemShape


class Tunable(NamedTuple):
    """One kernel, or several that one function chooses for."""

    kernel: str
    """Its name in tables and after --kernel."""
    module: ModuleType
    function: str
    """The name of the function in `module` that returns its tile."""
    shapes: tuple[ProblemShape, ...]
    candidates: Callable[[ProblemShape], list[Any]]
    """What that function might return for a shape."""
    prepare: Callable[[ProblemShape, torch.device], inputs.Work]
    """Makes inputs of a shape; returns a function that launches the kernel on them."""
    builds: Callable[[ProblemShape, int], list[Build]]
    """The kernel as it would be compiled for a shape and a chip, with the tile of `function`."""


_S1, _S2, _SP, _WK, _LONG = ENCODES["cuda"]
_HALF = torch.bfloat16


def _product_tiles(s: ProblemShape) -> list[product.Tile]:
    if s.n <= 128:
        rows = max(16, triton.next_power_of_2(s.n))
        return [
            product.Tile(rows, block_m, block_d, warps, stages)
            for block_m, block_d, warps, stages in [
                (64, 64, 4, 3), (64, 64, 4, 5), (64, 128, 4, 3), (64, 128, 4, 4),
                (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 4, 3), (256, 64, 8, 3),
            ]
        ]  # fmt: skip
    return [
        product.Tile(*tile)
        for tile in [
            (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 32, 8, 4), (128, 128, 64, 8, 3),
            (128, 128, 64, 4, 4), (64, 256, 64, 8, 4), (64, 256, 64, 4, 4), (256, 128, 64, 8, 3),
        ]
    ]  # fmt: skip


def _select_tiles(s: ProblemShape) -> list[select.SelectTile]:
    """Of an opened group, `products` a warp at a time."""
    group, _ = encode.group_size(s.m, s.k)
    whole, block_k = triton.next_power_of_2(triton.cdiv(s.m, group)), max(32, s.k)
    return [
        select.SelectTile(block_j, block_k, products * warps // group, warps)
        for block_j, warps, products in combinations(
            (whole, whole // 2), (1, 2, 4, 8), (256, 512, 1024)
        )
        if 256 <= block_j // warps <= 2048
    ]


def _sparse_tiles(rows: tuple[int, ...]) -> Callable[[ProblemShape], list[tuple[int, int, int]]]:
    """Columns, rows at a time and warps."""
    widths = [(128, 1), (256, 1), (512, 1), (512, 2), (1024, 4)]
    tiles = [(width, n, warps) for (width, warps), n in combinations(widths, rows)]
    return lambda s: [tile for tile in tiles if tile[0] <= s.d]


def _row_tiles(s: ProblemShape) -> list[tuple[int, int, int, int]]:
    """R, tokens at a time, columns and warps, of a whole row."""
    block = triton.next_power_of_2(s.d)
    return [
        (tokens, rows, block, warps)
        for tokens, rows, warps in combinations((16, 32, 64), (1, 2, 4), (1, 2, 4, 8))
        if 128 <= rows * block // warps <= 1024
    ]


def _decode_tiles(s: ProblemShape) -> list[tuple[int, int, int, int]]:
    """R, rows of W at a time, columns and warps."""
    return [
        (tokens, rows, columns, warps)
        for tokens, rows, (columns, warps) in combinations(
            (8, 16, 32), (4, 8, 16), ((128, 1), (256, 1), (512, 2))
        )
        if columns <= s.d
    ]


def _keep_topk_tiles(s: ProblemShape) -> list[tuple[int, int]]:
    """Scores and warps."""
    whole = triton.next_power_of_2(s.m)
    return [
        (block, warps)
        for block, warps in combinations(sorted({whole, min(whole, 8192)}), (1, 2, 4, 8, 16))
        if 8 <= block // (32 * warps) <= 64
    ]


def _residual_tiles(s: ProblemShape) -> list[tuple[int, int]]:
    """Columns and warps."""
    tiles = combinations((256, 512, 1024, 2048), (1, 2, 4, 8))
    return [tile for tile in tiles if tile[0] <= s.d and 4 <= tile[0] // (32 * tile[1]) <= 32]


def _adam_row_tiles(s: ProblemShape) -> list[tuple[int, int]]:
    block = triton.next_power_of_2(s.d)
    return [(block, warps) for warps in (1, 2, 4, 8, 16) if 4 <= block // (32 * warps) <= 32]


def _sparse_builds(name: str) -> Callable[[ProblemShape, int], list[Build]]:
    def builds(s: ProblemShape, chip: int) -> list[Build]:
        made = compiled.sparse_builds(s.d, s.k, _HALF)
        return [b for b in made if b.kernel.fn.__name__ == f"{name}_kernel"]

    return builds


def _product_builds(s: ProblemShape, chip: int) -> list[Build]:
    return [compiled_encode.product_build(chip, s.m, s.k, _HALF, "tf32", n=s.n)]


def _select_builds(s: ProblemShape, chip: int) -> list[Build]:
    return [compiled_encode.select_build(s.m, s.k, _HALF)]


def _encode_builds(s: ProblemShape, chip: int) -> list[Build]:
    return _product_builds(s, chip) + _select_builds(s, chip)


_DEAD = (
    ProblemShape("1000 dead", 98304, 512, 1000, 256),
    ProblemShape("16384 dead", 8192, 2048, 16384, 512),
)
_ROWS = tuple(ProblemShape(f"D {d}", 0, d, 2**25 // d, 0) for d in (512, 2048))  # 134 MB each
_FEW = [s for s in FEW_TOKENS["cuda"] if s.n <= 128]
_GROUPS = [(64, 2), (64, 3), (64, 4), (32, 2), (32, 3), (32, 4)]
_SCATTERED = (_S1, _S2, _LONG)

TUNABLES = (
    Tunable(
        "group_size", encode, "group_size", (_S1, _S2, _WK, _LONG),
        lambda s: _GROUPS, inputs.encode_work, _encode_builds,
    ),
    Tunable(
        "top_keys", product, "product_tile", (_S1, _S2, *_FEW),
        _product_tiles, inputs.top_keys_work, _product_builds,
    ),
    Tunable(
        "select", select, "select_tile", (_S1, _S2, _WK, _LONG),
        _select_tiles, inputs.select_work, _select_builds,
    ),
    Tunable(
        "gather_sum", sparse, "gather_sum_tile", _SCATTERED, _sparse_tiles((4, 8, 16)),
        inputs.gather_sum_work, _sparse_builds("gather_sum"),
    ),
    Tunable(
        "gather_dot", sparse, "gather_dot_tile", (_S2, _LONG), _sparse_tiles((4, 8, 16)),
        inputs.gather_dot_work, _sparse_builds("gather_dot"),
    ),
    Tunable(
        "scatter_outer", sparse, "scatter_outer_tile", _SCATTERED, _sparse_tiles((1, 2, 4)),
        inputs.scatter_outer_work, _sparse_builds("scatter_outer"),
    ),
    Tunable(
        "sum_chunks", sparse, "sum_chunks_tile", (_S2, _LONG), _sparse_tiles((4, 8, 16)),
        inputs.scatter_outer_work, _sparse_builds("sum_chunks"),
    ),
    Tunable(
        "chunk_length", sparse, "chunk_length", (_S2, _LONG), lambda s: [64, 128, 256, 512],
        inputs.scatter_outer_work, lambda s, chip: [],
    ),
    Tunable(
        "standardize", standardization, "standardize_tile", (_S2, _LONG), _row_tiles,
        inputs.standardize_work,
        lambda s, chip: [compiled_residuals.standardize_build(s.d, _HALF, mask=True)],
    ),
    Tunable(
        "decode_error", decode, "decode_error_tile", (_S2, _LONG), _decode_tiles,
        inputs.decode_error_work,
        lambda s, chip: [compiled_residuals.decode_error_build(s.d, s.k, _HALF, mask=True)],
    ),
    Tunable(
        "keep_topk", keep_topk, "keep_topk_tile", _DEAD, _keep_topk_tiles, inputs.keep_topk_work,
        lambda s, chip: [compiled.keep_topk_build(s.m, _HALF)],
    ),
    Tunable(
        "aux_residual", residual, "aux_residual_tile", (_S2, _LONG), _residual_tiles,
        inputs.aux_residual_work, lambda s, chip: [compiled.aux_residual_build(s.d, _HALF)],
    ),
    Tunable(
        "adam_rows", adam, "row_tile", _ROWS, _adam_row_tiles,
        inputs.adam_work(unit_norm=True), lambda s, chip: [compiled.adam_build(s.d, clip=True)],
    ),
    Tunable(
        "normuon", normuon, "row_tile", _ROWS, _adam_row_tiles, inputs.normuon_work,
        lambda s, chip: compiled.normuon_builds(s.d),
    ),
    Tunable(
        "adam_flat", adam, "adam_flat_tile", _ROWS[1:],
        lambda s: list(combinations((512, 1024, 2048, 4096), (2, 4, 8))),
        inputs.adam_work(unit_norm=False), lambda s, chip: [compiled.adam_build(None, clip=True)],
    ),
)  # fmt: skip
"""All of them. Add a kernel here to have it tuned."""
