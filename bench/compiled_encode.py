"""The builds of `topk_encode`'s kernels, with the constants that its launchers would give them.

Legend: N tokens, M latents, K active latents per token, G latents per group, J groups, T keys per
group.
"""

from __future__ import annotations

import torch
import triton

from sparse_topk.triton_ops.topk import encode, product, select

from .compiled_build import CHIPS, SHARED_LIMIT, Build

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_PROCESSORS = 132


def product_build(
    chip: int,
    m: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
    *,
    n: int = 8192,
    relu: bool = True,
    aligned: bool = True,
) -> Build:
    """The product on one chip: with tensor descriptors, if the chip and D allow them."""
    capability = (chip // 10, chip % 10)
    tma = product.describes(capability) and aligned
    group, n_keys = encode.group_size(m, k)
    tile = product.product_tile(capability, dtype, precision, tma, group, n, m, _PROCESSORS)
    name = _TYPES[dtype]
    described = {
        "x_desc": f"tensordesc<{name}[{tile.block_n}, {tile.block_d}]>",
        "W_desc": f"tensordesc<{name}[{tile.block_m}, {tile.block_d}]>",
    }
    sizes = {"N": "i32", "M": "i32", "D": "i32", "BAND_N": "i32"}
    kinds = f"{name} {precision} G={group} T={n_keys}{' relu' * relu}"
    fast = tile.block_n >= 64 or chip < 90  # the matrix instructions of smaller tiles are sm_80's
    return Build(
        f"top_keys{'_tma' * tma} {kinds} N={n}{'' if aligned else ' odd D'}",
        product.top_keys_tma_kernel if tma else product.top_keys_kernel,
        (described if tma else {"x_ptr": f"*{name}", "W_ptr": f"*{name}"})
        | {"bias_ptr": f"*{name}", "keys_ptr": "*i32"}
        | sizes,
        {"G": group, "T": n_keys, "RELU": relu, "PRECISION": precision}
        | {"BLOCK_N": tile.block_n, "BLOCK_M": tile.block_m, "BLOCK_D": tile.block_d},
        num_warps=tile.warps,
        num_stages=tile.stages,
        chips=(chip,),
        divisible=("N", "M", "D") if aligned else ("M",),
        needs=({"tensor_core": 1} if fast else {}) | ({"wide_loads": 2} if aligned else {}),
        allows={"int32_products": 3},  # numbers of tiles
    )


def select_build(m: int, k: int, dtype: torch.dtype, *, relu: bool = True) -> Build:
    """The selection, with a bias and D and M that are multiples of 16."""
    group, n_keys = encode.group_size(m, k)
    n_groups = triton.cdiv(m, group)
    tile = select.select_tile(n_groups, k, group)
    data, sizes = f"*{_TYPES[dtype]}", ("M", "D", "J", "P", "K")
    return Build(
        f"select {data[1:]} M={m} K={k}{' relu' * relu}",
        select.select_kernel,
        {"keys_ptr": "*i32", "scratch_ptr": "*i32", "indices_ptr": "*i64"}
        | dict.fromkeys(("x_ptr", "W_ptr", "bias_ptr", "values_ptr"), data)
        | dict.fromkeys(sizes, "i32"),
        {"G": group, "T": n_keys, "RELU": relu} | select.blocks(tile, n_groups, k),
        num_warps=tile.warps,
        divisible=sizes,
        needs={"wide_loads": 4},
    )


_BF16, _FP32 = torch.bfloat16, torch.float32

BUILDS = [
    *[product_build(chip, 2**17, 32, _BF16, "tf32") for chip in SHARED_LIMIT],
    *[product_build(chip, 2**16, 256, _BF16, "tf32", relu=False) for chip in CHIPS],
    *[product_build(chip, 2**17, 1024, _BF16, "tf32", relu=False) for chip in CHIPS],
    *[product_build(chip, 2**13, 1024, _BF16, "tf32", relu=False) for chip in CHIPS],
    *[product_build(chip, 2**17, 32, _BF16, "tf32", aligned=False) for chip in CHIPS],
    *[product_build(chip, 2**15, 32, _BF16, "tf32", n=n) for n in (1, 64, 128) for chip in CHIPS],
    *[product_build(chip, 2**15, 32, _FP32, "tf32x3") for chip in SHARED_LIMIT],
    *[product_build(chip, 2**15, 1024, _FP32, "tf32x3", relu=False) for chip in CHIPS],
    *[product_build(chip, 2**15, 32, _FP32, "tf32x3", aligned=False) for chip in CHIPS],
    *[product_build(chip, 2**15, 32, _FP32, "tf32") for chip in SHARED_LIMIT],
    *[select_build(m, k, _BF16) for m, k in [(2**15, 32), (2**17, 32), (2**16, 256)]],
    select_build(2**20, 32, _BF16),
    select_build(2**20, 1024, _FP32, relu=False),
    select_build(2**21, 1024, _BF16),
    select_build(2**15, 4096, _BF16, relu=False),
]
