"""The settings of an SAE, and of several that train side by side.

Legend: D width of the residual stream, M latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Annotated, Literal

import tyro

from .errors import InputError

Ints = Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")]


@dataclass(frozen=True)
class SAEOptions:
    """The settings of an SAE that a sweep does not vary."""

    standardize: bool = True
    """Whether each vector is standardized before encoding."""
    aux_weight: float = 1 / 32
    """Weight of the AuxK loss, which revives dead latents. 0: it is not computed."""
    k_aux: int | None = None
    """Dead latents that AuxK activates per token. None: the power of two nearest to d_model / 2."""
    dead_tokens: int | None = None
    """A latent is dead once inactive for this many tokens. None: 10 million, or a tenth of the
    run if that is less."""
    init: Literal["fitted", "unit", "linear"] = "fitted"
    """The first encoder. unit: equal to the decoder, whose rows are random, of norm 1. fitted:
    that, scaled to reconstruct the first batch best. linear: as torch.nn.Linear draws it, and the
    decoder with it, its rows then of norm 1; the paper's."""
    activation: Literal["topk", "batchtopk"] = "topk"
    """topk: the k largest of each vector. batchtopk: the k · n largest of the n vectors of a part
    of a batch (see --micro_tokens), all layers and tokens together; k is then the mean."""
    k_max: int | None = None
    """The most latents that batchtopk activates per token and layer. None: 4 · k."""


@dataclass(frozen=True)
class SAEConfig(SAEOptions):
    """The sparse autoencoder."""

    expansion: int = 16
    """Latents per dimension of the residual stream (R): n_latents = expansion · d_model."""
    n_latents: int | None = None
    """Latents, instead of an expansion."""
    k: int = 32
    """Active latents per token and layer."""
    seed: int | None = None
    """Seed of the initial weights. None: the run's `--seed`."""

    @property
    def name(self) -> str:
        """What tells it from those that train beside it: "x16-k32", "n4096-k32", "x16-k32-s1"."""
        size = f"x{self.expansion}" if self.n_latents is None else f"n{self.n_latents}"
        return f"{size}-k{self.k}" + ("" if self.seed is None else f"-s{self.seed}")


@dataclass(frozen=True)
class SAESweep(SAEOptions):
    """The sparse autoencoder. With several expansions (or numbers of latents) or several ks, every
    combination is an SAE that trains beside the others, in a folder in OUT: x16-k32, …"""

    expansion: Ints = (16,)
    """Latents per dimension of the residual stream (R): n_latents = expansion · d_model."""
    n_latents: Ints = ()
    """Latents, instead of an expansion."""
    k: Ints = (32,)
    """Active latents per token and layer."""

    def configs(self) -> list[SAEConfig]:
        """Every combination. Raises InputError if a setting has no value, or one value twice."""
        for name in ("expansion", "n_latents", "k"):
            values = getattr(self, name)
            check_different(f"--sae.{name}", values)
            if not values and name != "n_latents":
                raise InputError(f"--sae.{name} must have one value or several, got none")
        if self.n_latents and len(self.expansion) > 1:
            raise InputError(
                "--sae.n_latents is instead of --sae.expansion, which has the values "
                f"{' '.join(map(str, self.expansion))}; give one of them"
            )
        options = {f.name: getattr(self, f.name) for f in fields(SAEOptions)}
        return [
            SAEConfig(expansion=expansion, n_latents=n_latents, k=k, **options)
            for expansion, n_latents, k in product(
                self.expansion, self.n_latents or (None,), self.k
            )
        ]


def check_different(flag: str, values: Sequence[int]) -> None:
    """Raise InputError if one of the values of `flag` is given twice."""
    if len(set(values)) < len(values):
        raise InputError(
            f"{flag} must have one value or several different ones, got "
            f"{' '.join(map(str, values))}"
        )


def check_activation(activation: str, k: int, k_max: int | None, shard_latents: int) -> None:
    """Raise InputError for settings of the activation that no number of latents could make
    right."""
    if activation == "topk" and k_max is not None:
        raise InputError(
            f"--sae.k_max is for --sae.activation batchtopk, got {k_max} with topk; leave it out"
        )
    if k_max is not None and k_max < k:
        raise InputError(
            f"--sae.k_max must be at least {k} (--sae.k, the mean that it bounds), got {k_max}"
        )
    if activation == "batchtopk" and shard_latents > 1:
        raise InputError(
            "--shard_latents must be 1 with --sae.activation batchtopk, whose selection is within "
            f"a process, got {shard_latents}; shard the tokens only, or use topk"
        )
