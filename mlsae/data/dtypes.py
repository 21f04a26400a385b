"""What a transformer computes in."""

from __future__ import annotations

from typing import Any

import torch

from .config import DataConfig


def dtype_of(config: DataConfig, model_config: Any, device_type: str, whole: bool) -> torch.dtype:
    """What the transformer of `model_config` computes in on a device of this type: `model_dtype`,
    if it names one.

    On a GPU, it is what the checkpoint is saved in, but bfloat16 if that is float32 or not said:
    float32 would take most of a run's time, and a checkpoint of float32 was mostly trained in less.
    On a CPU it is float32; but bfloat16 where residuals are all that is read (not `whole`) of a
    model that a GPU would run in bfloat16, if the CPU has matrix units for it.
    """
    if config.model_dtype != "auto":
        named: torch.dtype = getattr(torch, config.model_dtype)
        return named
    saved = getattr(model_config.get_text_config(), "dtype", None)
    if isinstance(saved, str):
        saved = getattr(torch, saved)
    on_gpu: torch.dtype = torch.bfloat16 if saved in (None, torch.float32) else saved
    if device_type == "cuda":
        return on_gpu
    fast = on_gpu == torch.bfloat16 and device_type == "cpu" and multiplies_bfloat16()
    return torch.bfloat16 if fast and not whole else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether this CPU has matrix units for bfloat16, as AMX. Vector instructions alone gain
    nothing (bench/NOTES.md, 2026-11-23). False where torch does not tell, as older ones."""
    tell: Any = getattr(torch.cpu, "get_capabilities", dict)
    return bool(tell().get("amx_bf16", False))
