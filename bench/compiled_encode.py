"""The builds of `topk_encode`'s kernels, with the constants that its launchers would give them.

Legend: N tokens, D inputs, M latents, K active latents per token, G latents per group,
J groups.
"""

from __future__ import annotations

import torch
import triton

from sparse_topk.triton_ops.topk import chunked, product, rescore, select

from .compiled_build import CHIPS, SHARED_LIMIT, Build

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def product_build(
    chip: int, m: int, k: int, dtype: torch.dtype, precision: str, *, aligned: bool = True
) -> Build:
    """The fused product on one chip: with tensor descriptors, if the chip and D allow them."""
    capability = (chip // 10, chip % 10)
    tma = product.describes(capability) and aligned
    tile = product.fused_tile(capability, dtype, precision, tma)
    name, group = _TYPES[dtype], product.fused_group(m, k)
    described = {
        "x_desc": f"tensordesc<{name}[{tile.block_n}, {tile.block_d}]>",
        "W_desc": f"tensordesc<{name}[{tile.block_m}, {tile.block_d}]>",
    }
    results = {"bias_ptr": f"*{name}", "best_ptr": "*i32", "second_ptr": "*i32"}
    sizes = {"N": "i32", "M": "i32", "D": "i32", "BAND_N": "i32"}
    return Build(
        f"best_two{'_tma' * tma} {name} {precision} G={group}{'' if aligned else ' odd D'}",
        product.best_two_tma_kernel if tma else product.best_two_kernel,
        (described if tma else {"x_ptr": f"*{name}", "W_ptr": f"*{name}"}) | results | sizes,
        {"G": group, "BLOCK_N": tile.block_n, "BLOCK_M": tile.block_m}
        | {"BLOCK_D": tile.block_d, "PRECISION": precision},
        num_warps=tile.warps,
        num_stages=tile.stages,
        chips=(chip,),
        divisible=("N", "M", "D") if aligned else ("M",),
        needs={"tensor_core": 1} | ({"wide_loads": 2} if aligned else {}),
        allows={"int32_products": 3},  # numbers of tiles
    )


def producer_builds(m: int, k: int, dtype: torch.dtype) -> list[Build]:
    """The kernels that read or compute scores outside the product."""
    data, group = f"*{_TYPES[dtype]}", product.fused_group(m, k)
    wide = chunked.chunked_group(m, k)
    return [
        Build(
            f"group_best M={m} K={k}",
            chunked.group_best_kernel,
            {"scores_ptr": "*fp32", "bias_ptr": data, "best_ptr": "*i32", "M": "i32", "J": "i32"},
            {"G": wide, "BLOCK_J": chunked.group_best_block(wide)},
            num_warps=4,
            divisible=("M",),
            needs={"wide_loads": 8},
        ),
        Build(
            f"rescore {data[1:]} M={m} K={k}",
            rescore.rescore_kernel,
            {
                "x_ptr": data,
                "W_ptr": data,
                "bias_ptr": data,
                "picks_ptr": "*i32",
                "scores_ptr": "*fp32",
            }
            | {"D": "i32", "M": "i32", "P": "i32"},
            {"G": group, "BLOCK_P": triton.next_power_of_2(k)}
            | {"BLOCK_D": rescore.rescore_width(group)},
            num_warps=4,
            divisible=("D", "M"),
            needs={"wide_loads": 2},
        ),
    ]


def selection_builds(m: int, k: int, dtype: torch.dtype, *, two: bool) -> list[Build]:
    """The selection from fused keys (`two`) or from stored scores."""
    group = product.fused_group(m, k) if two else chunked.chunked_group(m, k)
    n_groups = triton.cdiv(m, group)
    slots = min(k, n_groups)
    keys, pick_warps = select.keys_tile(n_groups)
    candidates, rank_warps = select.keys_tile(slots * group)
    name = f"{'fused' if two else 'chunked'} M={m} K={k}"
    data = f"*{_TYPES[dtype]}"
    return [
        Build(
            f"pick_groups {name}",
            select.pick_groups_kernel,
            {"best_ptr": "*i32", "picks_ptr": "*i32", "J": "i32", "P": "i32", "K": "i32"}
            | ({"second_ptr": "*i32"} if two else {}),
            {"STEP": group if two else 1, "BLOCK_J": keys}
            | {"BLOCK_P": triton.next_power_of_2(slots)}
            | ({} if two else {"second_ptr": None}),
            num_warps=pick_warps,
            divisible=("J",),
            needs={"wide_loads": 4},
        ),
        Build(
            f"rank {name}",
            select.rank_kernel,
            {"scores_ptr": "*fp32", "best_ptr": "*i32", "picks_ptr": "*i32", "values_ptr": data}
            | {"indices_ptr": "*i64", "M": "i32", "P": "i32", "K": "i32"}
            | ({} if two else {"bias_ptr": data}),
            {"G": group, "TWO": two, "BLOCK_C": candidates} | ({"bias_ptr": None} if two else {}),
            num_warps=rank_warps,
            divisible=("M",),
            needs={"wide_loads": 4},
        ),
    ]


_BF16, _FP32 = torch.bfloat16, torch.float32

BUILDS = [
    *[product_build(chip, 2**17, 32, _BF16, "tf32") for chip in SHARED_LIMIT],
    *[product_build(chip, 2**17, 1024, _BF16, "tf32") for chip in CHIPS],
    *[product_build(chip, 2**17, 32, _BF16, "tf32", aligned=False) for chip in CHIPS],
    *[product_build(chip, 2**15, 32, _FP32, "tf32x3") for chip in SHARED_LIMIT],
    *[product_build(chip, 2**15, 32, _FP32, "tf32x3", aligned=False) for chip in CHIPS],
    *[product_build(chip, 2**15, 32, _FP32, "tf32") for chip in SHARED_LIMIT],
    *producer_builds(2**17, 32, _BF16),
    *producer_builds(2**20, 1024, _FP32),
    *selection_builds(2**17, 32, _BF16, two=True),
    *selection_builds(2**17, 32, _BF16, two=False),
    *selection_builds(2**17, 1024, _FP32, two=True),
    *selection_builds(2**20, 1024, _FP32, two=False),
]
