"""A plan: what a training takes, and what would make it smaller.

Legend: D width of the residual stream, M latents.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .. import memory
from ..config import TrainConfig, check_config, optimizer_of, peak_rate
from ..data.stream import Shape, read_shape
from ..distributed import ALONE, choose_device
from ..model import MLSAEConfig
from ..training.init import mlsae_config
from ..training.init_from import check_fits, has_bias, load_initial
from ..training.needs import Needs, check_shards, needs_of
from ..training.run import rows_of
from .cost_model import modelled
from .gpus import GPU, gpu_named
from .probe import check_text, probe
from .times import Times
from .transformer import Transformer, size_of

_TEXT = 210e6  # bytes of what reads and tokenizes text: measured on the built-in corpus, 2026-11-27
_TEXT_ROWS = 4096  # rows that wait to be shuffled
_REPORT = 14e6  # bytes of what draws the report: measured, 2026-11-27


class Setting(NamedTuple):
    """What a command line asks for, and the sizes that follow."""

    configs: Sequence[TrainConfig]
    saes: Sequence[MLSAEConfig]
    shape: Shape
    micro_rows: int
    """Rows of a part of a batch."""
    transformer: Transformer
    needs: Needs


@dataclass(frozen=True)
class Plan:
    """What a training takes."""

    setting: Setting
    device: str
    """The device here, or the GPU that `--gpu` names."""
    memory: dict[str, int]
    """Bytes at the peak, by part."""
    dead: int
    """Bytes that AuxK takes beside, if all latents die."""
    free: int | None
    """Bytes free now; of a GPU that is not here, all of its memory."""
    times: Times | None
    """None if nothing was measured: it does not fit, or takes several processes."""

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is free; what this process holds already is not counted twice."""
        return self.free is None or self.peak - self.memory.get("Python and torch", 0) <= self.free

    @property
    def optimizers(self) -> list[str]:
        """The optimizer of each SAE's encoder."""
        return [optimizer_of(config, config.tokens) for config in self.setting.configs]

    @property
    def peak_rates(self) -> list[float]:
        """The peak learning rate of each SAE."""
        pairs = zip(self.setting.configs, self.setting.saes, strict=True)
        return [peak_rate(config, sae.n_latents, config.tokens) for config, sae in pairs]


def make_plan(configs: Sequence[TrainConfig], gpu: str | None, seconds: float) -> Plan:
    """Plan the training of `configs`: by the model on the GPU named, or by a probe of so many
    `seconds` here. Raises InputError for what training would refuse of its settings, model and
    text, and for an unknown GPU."""
    importlib.import_module("transformers.modeling_utils")  # as loading the model does
    base = memory.resident()
    named = gpu_named(gpu) if gpu else None
    for each in configs:
        check_config(each)
    # Nothing is written, so tokens are not kept either.
    configs = [replace(each, data=replace(each.data, no_token_cache=True)) for each in configs]
    device = torch.device("cuda") if named else choose_device(configs[0].device)
    free = int(named.memory) if named else memory.available(device)
    setting = setting_of(configs, device, free)
    plan = plan_of(setting, named.name if named else device.type, device, base, None)
    check_text(configs[0].data, setting.shape.seq_len)
    return plan_of(setting, plan.device, device, base, _times(plan, device, named, seconds))


def setting_of(configs: Sequence[TrainConfig], device: torch.device, free: int | None) -> Setting:
    """The sizes of a training. Raises InputError for what training would refuse."""
    config = configs[0]
    initial = load_initial(configs)
    shape = read_shape(config.data)
    _, micro_rows = rows_of(config, shape.seq_len, ALONE)
    saes = []
    for each in configs:
        sae = mlsae_config(each, shape)
        if initial:
            check_fits(initial, each, sae)
            sae = replace(sae, bias=has_bias(initial))
        saes.append(sae)
    check_shards(saes, config.shard_latents)
    transformer = size_of(config.data, shape.layers[-1], device.type)
    needs = needs_of(
        configs, saes, shape, device, micro_tokens=micro_rows * shape.seq_len,
        processes=config.shard_latents, transformer=transformer.bytes,
        model_dtype=transformer.dtype, free=free,
    )  # fmt: skip
    return Setting(configs, saes, shape, micro_rows, transformer, needs)


def plan_of(
    setting: Setting, name: str, device: torch.device, base: int, times: Times | None
) -> Plan:
    """The plan of a setting on a device, in a process that holds `base` bytes of main memory before
    it begins."""
    needs = setting.needs
    parts = needs.memory._asdict()
    dead = parts.pop("dead")
    taken = {"transformer": needs.transformer, **parts}
    if device.type == "cpu":
        text = round(_TEXT + _REPORT + 8 * _TEXT_ROWS * setting.shape.seq_len)
        taken = {"Python and torch": base, "text and report": text, **taken}
    return Plan(setting, name, taken, dead, needs.free, times)


def _times(plan: Plan, device: torch.device, gpu: GPU | None, seconds: float) -> Times | None:
    configs, saes, shape, micro_rows, transformer, needs = plan.setting
    if gpu:
        return modelled(configs, saes, shape, needs, transformer, gpu, micro_rows)
    if not plan.fits or configs[0].shard_latents > 1:
        return None
    return probe(configs, saes, shape, needs, device, micro_rows, seconds)
