"""How fast a training would be on a GPU that is not here: a model, from FLOPs, bytes and what one
GPU was measured to reach.

Legend: L layers, N tokens, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparse_topk import costs
from sparse_topk.costs import TrainShape

from ..config import TrainConfig
from ..data.stream import Shape
from ..model import MLSAEConfig
from ..training.needs import Needs
from ..training.optimizers import optimizers_of
from . import gpus
from .gpus import GPU, efficiency, rates_of, roofline
from .times import Span, StepTime, Times
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
    config, rates = configs[0], rates_of(gpu)
    n_parts = needs.step_tokens / (micro_rows * shape.seq_len)
    itemsize = 4 if config.dtype == "float32" else 2
    share = efficiency(shape.d_in)
    part = optimizer = 0.0
    for each, sae in zip(configs, saes, strict=True):
        tokens = micro_rows * shape.seq_len
        k = sae.k_max or sae.k
        of = TrainShape("", len(shape.layers), tokens, sae.d_in, sae.n_latents, k)
        name = optimizers_of(each, each.tokens).encoder
        of_part = roofline(costs.training_part(of, itemsize), rates) / share
        part += max(of_part, gpus.HOST_SECONDS)
        optimizer += roofline(costs.optimizer_step(of, itemsize, name), rates) / share
    per_token = transformer_seconds(transformer, shape.seq_len, gpu)
    model = per_token * needs.step_tokens
    step = StepTime(_waited(model), _waited(n_parts * part), _waited(optimizer))
    encode = part / 3
    validation = config.eval_tokens * per_token + config.eval_tokens / tokens * encode
    times = 1 + (
        min(needs.steps - 1, (config.tokens - 1) // config.eval_every) if config.eval_every else 0
    )
    text = max(0.0, config.tokens / gpus.TEXT_RATE - step.total.wall * needs.steps)
    once = {
        "validation": _waited(validation * times),
        "checkpoints": _waited(needs.checkpoints * needs.disk.checkpoint / gpus.DISK_RATE),
        "waiting for text": _waited(text),
    }
    return Times("model", step, needs.steps, needs.step_tokens, once, _rests_on(gpu, transformer))


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
        "commit ec756b1; the step has been written anew since, and not been timed)",
        f"the transformer: {gpus.TRANSFORMER_SHARE:.0%} of the peak, as Pythia-70m's sizes reached "
        "in float32 there",
        f"text at {gpus.TEXT_RATE / 1e6:.2f} M tokens/s on {gpus.TEXT_CORES} cores, checkpoints at "
        f"{gpus.DISK_RATE / 1e9:.1f} GB/s, as there",
    ]
    if transformer.dtype.itemsize < 4:
        lines.append(
            f"that it reaches this share in {transformer.dtype} was never measured".replace(
                "torch.", ""
            )
        )
    if gpu.name != gpus.MEASURED:
        lines.append(
            f"nothing was measured on {gpu.name}: extrapolated from its published peaks, "
            f"{gpu.half / 1e12:.0f} TFLOP/s in bfloat16, {gpu.single / 1e12:.0f} in float32 and "
            f"{gpu.bandwidth / 1e12:.2f} TB/s, at the H100's shares of its own"
        )
    return lines
