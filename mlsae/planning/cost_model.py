"""How fast a training would be on a GPU that is not here: a model, from FLOPs, bytes and what one
GPU was measured to reach.

Legend: L layers, N tokens, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparse_topk import costs
from sparse_topk.costs import TrainShape

from ..config import TrainConfig, heldout_tokens
from ..data.stream import Shape
from ..model import MLSAEConfig
from ..training.needs import Needs
from ..training.optimizers import optimizers_of
from . import gpus
from .gpus import GPU, efficiency, rates_of, roofline
from .times import Span, StepTime, Times, n_validations
from .transformer import Transformer

_ACTIVATIONS = 34  # of D numbers, per token and block of a transformer: read or written in a pass


def modelled(
    configs: Sequence[TrainConfig],
    saes: Sequence[MLSAEConfig],
    shape: Shape,
    needs: Needs,
    transformer: Transformer,
    gpu: GPU,
    micro_rows: int,
) -> Times:
    """What a training of `configs` takes on `gpu`, by the model; nothing runs."""
    config, tokens = configs[0], micro_rows * shape.seq_len
    shards = config.shard_latents  # each process has a part of the latents, and reads some rows
    part = update = 0.0
    for each, sae in zip(configs, saes, strict=True):
        k, latents = sae.k_max or sae.k, sae.n_latents // shards
        of = TrainShape("", len(shape.layers), tokens, sae.d_in, latents, k)
        forward, update_of_it = _sae_seconds(each, of, gpu)
        part, update = part + forward, update + update_of_it
    model = transformer_seconds(transformer, shape.seq_len, gpu) / shards
    n_parts = needs.step_tokens / tokens
    step = StepTime(_waited(model * needs.step_tokens), _waited(n_parts * part), _waited(update))
    validation = heldout_tokens(config) * (model + part / tokens)
    text = max(0.0, config.tokens / gpus.TEXT_RATE - step.total.wall * needs.steps)
    once = {
        "validation": _waited(validation * n_validations(config, needs.steps)),
        "last checkpoint": _waited(needs.disk.checkpoint / gpus.DISK_RATE),
        "waiting for text": _waited(text),
    }
    return Times("model", step, needs.steps, needs.step_tokens, once, _rests_on(gpu, transformer))


def _sae_seconds(config: TrainConfig, shape: TrainShape, gpu: GPU) -> tuple[float, float]:
    """Seconds of a part of a batch, and of the optimizer."""
    itemsize = 4 if config.dtype == "float32" else 2
    rates, share = rates_of(gpu, itemsize), efficiency(shape.d)
    names = optimizers_of(config, config.tokens)[:2]
    part = roofline(costs.training_part(shape, itemsize), rates) / share
    updates = [roofline(costs.optimizer_step(shape, itemsize, name), rates) for name in names]
    return max(part, gpus.HOST_SECONDS), sum(updates) / len(updates) / share


def transformer_seconds(transformer: Transformer, seq_len: int, gpu: GPU) -> float:
    """Seconds of the forward pass per token: FLOPs at the share of the peak that was measured, or
    the bytes of its activations, if they take longer."""
    peak = gpu.single if transformer.dtype.itemsize == 4 else gpu.half
    products = transformer.flop(seq_len) / (gpus.TRANSFORMER_SHARE * peak)
    numbers = _ACTIVATIONS * transformer.d_in * transformer.blocks
    moved = transformer.dtype.itemsize * numbers / rates_of(gpu).bytes_per_second
    return max(products, moved)


def _waited(seconds: float) -> Span:
    """Time of a GPU, in which the processor's is not known."""
    return Span(seconds, 0.0)


def _rests_on(gpu: GPU, transformer: Transformer) -> list[str]:
    low, high = (efficiency(shape.d) for shape, _ in gpus.STEPS)
    lines = [
        "the SAE's step: FLOPs and bytes at 750 TFLOP/s and 3.0 TB/s, and of that "
        f"{low:.0%} (D 512) to {high:.0%} (D 2048), as two steps reached on one H100 (2026-11-26, "
        "commit ec756b1; the step has been written anew since, and not been timed); five other "
        "steps timed there come out 20 % too short to 48 % too long",
        f"the transformer: {gpus.TRANSFORMER_SHARE:.0%} of the peak, as Pythia-70m's sizes reached "
        "in float32 there",
        f"text at {gpus.TEXT_RATE / 1e6:.2f} M tokens/s on {gpus.TEXT_CORES} cores, checkpoints at "
        f"{gpus.DISK_RATE / 1e9:.1f} GB/s, as there",
    ]
    if transformer.dtype.itemsize < 4:
        lines.append("that it reaches this share of the peak in half precision was never measured")
    if gpu.name != gpus.MEASURED:
        lines.append(
            f"nothing was measured on {gpu.name}: extrapolated from its published peaks, "
            f"{gpu.half / 1e12:.0f} TFLOP/s in bfloat16, {gpu.single / 1e12:.0f} in float32 and "
            f"{gpu.bandwidth / 1e12:.2f} TB/s, at the H100's shares of its own"
        )
    return lines
