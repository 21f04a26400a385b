"""The state that a training begins with, from its settings and its first batch.

Legend: B rows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..basis import Lens
from ..config import TrainConfig, learning_rate
from ..data.model_id import check_lens_model
from ..data.stream import DataStream, Shape
from ..distributed import ALONE, Group, Mesh, log_rank0
from ..errors import InputError
from ..formats import SavedSAE, read_lens, released
from ..model import MLSAE, MLSAEConfig
from .init import FirstBatch, draw_linear_, fit_scale_, init_stats
from .init_from import set_weights
from .optimizers import optimizers_of
from .state import TrainState


def new_state(
    config: TrainConfig,
    sae: MLSAEConfig,
    device: torch.device,
    mesh: Mesh,
    first_tokens: int,
    initial: SavedSAE | None = None,
    lens: Lens | None = None,
) -> TrainState:
    """The state of an SAE before its training, of `first_tokens` tokens; its weights are those of
    `initial` if given, and its basis that of `lens`."""
    torch.manual_seed(config.weights_seed)  # so that no SAE's weights depend on what else there is
    mlsae = MLSAE(sae, device, mesh.latents, lens)
    if initial:
        set_weights(mlsae, initial)
    elif config.sae.init == "linear":
        draw_linear_(mlsae.sae)
    return TrainState(
        mlsae,
        schedule=lambda tokens: learning_rate(config, sae.n_latents, tokens, first_tokens),
        dead_tokens=config.sae.dead_tokens or min(10_000_000, math.ceil(first_tokens / 10)),
        k_aux=config.sae.k_aux or 2 ** round(math.log2(max(sae.d_in / 2, 1))),
        aux_weight=config.sae.aux_weight,
        optimizers=optimizers_of(config, first_tokens),
        dtype=compute_dtype(config, device),
        data=mesh.data,
        name=str(config.out),
    )


def lens_of(config: TrainConfig, shape: Shape, initial: SavedSAE | None) -> Lens | None:
    """The lens of --lens; None without. Raises InputError if it cannot be read, is not of the
    model and its layers, or is not that of `initial`, the SAE of --init_from."""
    lens = None if config.lens is None else read_lens(config.lens)
    if lens is not None:
        check_lens_model(lens, config.data, shape.d_in)
        lens.check_layers(shape.layers)
        worst = max(lens.condition, key=lens.condition.__getitem__)
        log_rank0(
            f"lens: {lens.about.get('kind')}; condition numbers up to {lens.condition[worst]:.3g} "
            f"(layer {worst}), so much more may an error weigh on the way back"
        )
    name = config.init_from or ""
    if initial is not None and initial.lens is None and released.had_tuned_lens(initial, name):
        raise InputError(
            f"--init_from must hold its lens, and {name}, which was trained with one, does not; "
            "save it with that: MLSAE.from_pretrained(NAME, lens=FOLDER).save_pretrained(RUN), and "
            "give --init_from RUN --lens RUN"
        )
    if initial is not None and (initial.lens and initial.lens.digest) != (lens and lens.digest):
        has = "another lens" if initial.lens else "no lens"
        raise InputError(
            f"--lens must be that of --init_from {config.init_from}, which has {has}; a run's "
            "folder can be given as its lens"
        )
    return lens


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """What the SAE computes in, by `--dtype`."""
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else torch.float32


def initialize(
    configs: Sequence[TrainConfig],
    states: Sequence[TrainState],
    stream: DataStream,
    input_ids: Tensor,
) -> None:
    """Set what is dropped, and of each state what the first batch (B, T) tells."""
    mlsae, data = states[0].mlsae, stream.mesh.data
    with stream.mesh.world.raise_together():
        found = stream.resolve_drop(input_ids)
        if found:
            log_rank0(found)
        first = init_stats(mlsae, stream.residuals(input_ids), data)
    for config, state in zip(configs, states, strict=True):
        begin(config, state, first, data)


def begin(
    config: TrainConfig, state: TrainState, first: FirstBatch, data: Group = ALONE.data
) -> None:
    """Set the first variances and, unless the SAE was loaded, b_pre and the encoder's scale."""
    state.initialize(first.moments, None if config.init_from else first.center)
    if config.sae.init == "fitted" and not config.init_from:
        fit_scale_(state.mlsae.sae, first.vectors, data)
