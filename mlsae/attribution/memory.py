"""Whether a trace fits in memory, estimated before it starts.

Legend: L layers, T tokens, D width of the residual stream, M latents, K active latents per token,
V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.config import DataConfig
from ..data.residuals import ResidualReader
from ..errors import InputError
from ..memory import available, encoding
from ..model import MLSAE
from ..planning.show import size
from ..planning.transformer import size_of

_PROBES = (16, 32)  # tokens
_PER_LATENT = 88  # bytes: codes, slope, attribution, place; the columns of a node, sorted
_LOGITS = 3  # copies: the logits, their gradient, and a part of one in float32


class Needed(NamedTuple):
    """Bytes that a trace takes beside the weights."""

    activations: int
    """What the forward pass keeps for the backward pass, which holds as much again of a block."""
    residuals: int
    """The residual stream at each layer, its gradient, and its standardized form; the logits."""
    latents: int
    """The active latents, their attributions, and what encoding a layer takes."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)

    def told(self, weights: int, device: torch.device) -> str:
        """In words."""
        free = available(device)
        known = "" if free is None else f" of the {size(free)} that are free on {device}"
        parts = ", ".join(f"{name} {size(part)}" for name, part in self._asdict().items())
        return f"memory beside the weights' {size(weights)}: {size(self.total)}{known}: {parts}"


def estimate(mlsae: MLSAE, reader: ResidualReader, ids: Tensor) -> Needed:
    """What tracing ids (T,) takes.

    What a pass keeps is a sum of terms in T and in T² (attention keeps its weights, unless a fused
    kernel computes it). It is counted in passes of 16 and 32 tokens as autograd keeps it, so it is
    that of the model's own code and of the kernels that run here.
    """
    n, device = len(ids), mlsae.sae.W_dec.device
    if n <= _PROBES[1]:
        kept = _kept_bytes(reader, ids.to(device))
    else:
        s, t = _PROBES
        per_s, per_t = (_kept_bytes(reader, ids[:part].to(device)) / part for part in _PROBES)
        square = max(0.0, (per_t - per_s) / (t - s))
        kept = round(n * (per_t + square * (n - t)))
    kept += kept // len(reader.blocks)
    model: Any = reader.model
    config, vectors = mlsae.config, n * len(reader.layers)
    itemsize = model.dtype.itemsize
    vocabulary = model.config.get_text_config().vocab_size
    residuals = vectors * config.d_in * (2 * itemsize + 4) + _LOGITS * n * vocabulary * itemsize
    k = config.k_max or config.k
    latents = vectors * k * _PER_LATENT + encoding(config, n, device.type)
    return Needed(kept, residuals, latents)


def check_fits(needed: Needed, n_tokens: int, device: torch.device) -> None:
    """Raise InputError if a trace of `n_tokens` takes more than what is free on `device`."""
    free = available(device)
    if free is not None and free < needed.total:
        raise InputError(
            f"--prompt has {n_tokens} tokens, whose trace needs about {size(needed.total)} of "
            f"{device.type} memory beside the weights, and {size(free)} is free; give a shorter "
            "one, or another --device"
        )


def check_weights(mlsae: MLSAE, data: DataConfig) -> None:
    """Raise InputError if the weights of the transformer of `data` would not fit on the device of
    `mlsae`; where accelerate places them, it sees to that."""
    device = mlsae.sae.W_dec.device
    free = available(device)
    if free is None or data.model_device_map is not None:
        return
    layers = mlsae.config.layers
    weights = size_of(data, max(layers, default=0), device.type)
    whole = round(weights.bytes * max(1.0, weights.whole / weights.blocks))
    if free < whole:
        raise InputError(
            f"MODEL {data.model} has weights of about {size(whole)}, and {size(free)} is free on "
            f"{device}; give another --device, or free some memory"
        )


def weight_bytes(mlsae: MLSAE, reader: ResidualReader) -> int:
    """Bytes of the weights of both models, which are in memory."""
    parts = [*mlsae.parameters(), *reader.model.parameters()]
    return sum(part.numel() * part.element_size() for part in parts)


def _kept_bytes(reader: ResidualReader, ids: Tensor) -> int:
    """Bytes that a pass of ids (T,) keeps for the backward pass, beside the model's weights."""
    model = reader.model
    own = {part.untyped_storage().data_ptr() for part in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        graph = reader.with_graph(ids[None])
    del graph  # it has lived until here, so no address was used twice
    return sum(kept.values())
