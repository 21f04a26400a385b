"""Start a training from the weights of a trained SAE (`--init_from`).

Legend: D width of the residual stream, M latents.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import formats
from ..config import TrainConfig, shared_folder
from ..distributed import log_rank0
from ..errors import InputError
from ..formats import SavedSAE
from ..formats.places import check_residual
from ..model import MLSAE, MLSAEConfig

_NORM_TOLERANCE = 1e-2  # what `UnitNormAdam` takes


def load_initial(configs: Sequence[TrainConfig]) -> SavedSAE | None:
    """The SAE to start from; None without `--init_from`.

    Raises InputError if it cannot be loaded, is not of the residual stream, or is in the folder
    that the new run replaces.
    """
    name, out = configs[0].init_from, shared_folder(configs)
    if name is None:
        return None
    path = Path(os.path.expanduser(name))
    if path.exists() and path.resolve().is_relative_to(out.resolve()):
        raise InputError(
            f"--init_from must be elsewhere than --out, which the new run replaces, got {name} and "
            f"{out}; choose another --out"
        )
    saved = read_initial(name)
    check_residual(saved.about, f"--init_from {name}")
    if saved.activation == "jumprelu":
        raise InputError(
            f"--init_from must be an SAE of topk or batchtopk, which are what is trained here, and "
            f"{name} has a threshold per latent (jumprelu); load_sae uses it as it is"
        )
    return saved


def read_initial(name: str) -> SavedSAE:
    """The SAE that `--init_from` names: a file or folder, else a name on the hub. Raises InputError
    if it cannot be read."""
    path = Path(os.path.expanduser(name))
    return formats.read(path) if path.exists() else MLSAE.from_pretrained(name).to_saved()


def check_fits(saved: SavedSAE, config: TrainConfig, sae: MLSAEConfig) -> None:
    """Raise InputError unless `saved`, which `--init_from` names, can become `sae`."""
    name = config.init_from
    if saved.d_in != sae.d_in:
        raise InputError(
            f"--init_from must have inputs of width {sae.d_in}, that of MODEL's residual stream, "
            f"and {name} has {saved.d_in}; give an SAE of this model"
        )
    for flag, theirs, ours in (
        ("--sae.n_latents (or --sae.expansion · d_model)", saved.n_latents, sae.n_latents),
        ("--sae.k", saved.k, sae.k),
        ("--sae.standardize", saved.standardize, sae.standardize),
    ):
        if theirs != ours:
            raise InputError(
                f"{flag} must be {theirs}, as in --init_from {name}, got {ours}; on the command "
                "line, leave it out to take it from there"
            )
    if saved.k_max is not None and sae.k_max is None:
        raise InputError(
            f"--sae.activation must be batchtopk, as in --init_from {name}, got topk; on the "
            "command line, leave it out to take it from there"
        )
    if has_bias(saved) and config.shard_latents > 1:
        raise InputError(
            f"--init_from {name} has a latent bias, which --shard_latents cannot split; train it "
            "without --shard_latents"
        )


def has_bias(saved: SavedSAE) -> bool:
    """Whether `saved` has a latent bias that is not zero, so that the SAE to train needs one."""
    return bool(saved.b_enc().any())


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
