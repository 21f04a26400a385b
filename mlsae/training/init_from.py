"""Start a training from the weights of a trained SAE (`--init_from`).

Legend: D width of the residual stream, M latents.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from .. import formats
from ..config import TrainConfig
from ..distributed import log_rank0
from ..errors import InputError
from ..formats import SavedSAE
from ..formats.places import check_residual
from ..model import MLSAE, MLSAEConfig

_NORM_TOLERANCE = 1e-2  # what `UnitNormAdam` takes


def load_initial(config: TrainConfig, sae: MLSAEConfig) -> tuple[MLSAEConfig, SavedSAE | None]:
    """The SAE to train, with a latent bias if the one to start from has one, and the latter; None
    without `--init_from`.

    Raises InputError if it cannot be loaded, or is of another size than `sae`.
    """
    if config.init_from is None:
        return sae, None
    path = Path(os.path.expanduser(config.init_from))
    if path.exists():
        saved = formats.read(path)
    else:
        saved = MLSAE.from_pretrained(config.init_from).to_saved()
    check_residual(saved.about, f"--init_from {config.init_from}")
    if saved.d_in != sae.d_in:
        raise InputError(
            f"--init_from must have inputs of width {sae.d_in}, that of MODEL's residual stream, "
            f"and {config.init_from} has {saved.d_in}; give an SAE of this model"
        )
    for flag, theirs, ours in (
        ("--sae.n_latents", saved.n_latents, sae.n_latents),
        ("--sae.k", saved.k, sae.k),
        ("--sae.standardize", saved.standardize, sae.standardize),
    ):
        if theirs != ours:
            raise InputError(
                f"{flag} must be {theirs}, as in --init_from {config.init_from}, got {ours}; give "
                f"--sae.n_latents {saved.n_latents} --sae.k {saved.k}"
                + ("" if saved.standardize else " --sae.no_standardize")
            )
    bias = "b_enc" in saved.weights and bool(saved.weights["b_enc"].any())
    if bias and config.shard_latents > 1:
        raise InputError(
            f"--init_from {config.init_from} has a latent bias, which --shard_latents cannot "
            "split; train it without --shard_latents"
        )
    return replace(sae, bias=bias), saved


@torch.no_grad()
def set_weights(mlsae: MLSAE, saved: SavedSAE) -> None:
    """Give `mlsae` the weights of `saved`, cast to its dtype; with W_dec's rows at norm 1, as
    training keeps them: other norms are moved into the encoder (see `SparseTopKSAE.fold_norms_`),
    and a line says so. When sharded, each process takes its own rows."""
    sae = mlsae.sae
    for name, p in sae.named_parameters():
        weight = saved.weights[name]
        p.copy_(sae.own_rows(weight) if weight.ndim == 2 else weight)
    norms = sae.W_dec.norm(dim=1)
    norms = norms[norms > 0]
    if len(norms) and ((norms - 1).abs() > _NORM_TOLERANCE).any():
        sae.fold_norms_()
        log_rank0(
            f"the decoder rows of --init_from have norms from {norms.min():.3g} to "
            f"{norms.max():.3g}: they are moved into the encoder, which may choose other latents "
            "for some tokens"
        )
