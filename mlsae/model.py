"""The multi-layer SAE: one TopK SAE on the residual stream of every layer.

Legend: L layers, N tokens, D inputs, M latents, K active latents a token; "…" any leading shape.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import safetensors.torch
import torch
from torch import Tensor, nn

from sparse_topk import SparseTopKSAE, TopK, topk_sae

from .distributed import ALONE, Group
from .errors import InputError
from .files import write_file
from .sharding import ShardedSAE

SIGMA_EPS = 1e-5
ACTIVE = 1e-3  # a latent counts as active above this (arXiv 2409.04185, App. A)


@dataclass(frozen=True)
class MLSAEConfig:
    """What an MLSAE is, apart from its weights: the keys of `config.json` that loading needs."""

    d_in: int
    """Width of the residual stream (D)."""
    n_latents: int
    """Latents of the SAE (M)."""
    k: int
    """Active latents a token and layer (K)."""
    layers: tuple[int, ...]
    """The transformer's layers it was trained on, in the order of its inputs."""
    standardize: bool = True
    """Whether each vector is standardised before encoding."""
    model: str = ""
    """The transformer's name on the hub, or its folder."""


class Losses(NamedTuple):
    """What one pass gives: the loss to differentiate, and sums for the metrics."""

    loss: Tensor
    """() mean over layers of the FVU, plus aux_weight · aux."""
    aux: Tensor
    """() the AuxK loss; exactly 0 with no dead latents."""
    sq_error: Tensor
    """(L,) Σ_n |x − x̂|² in the units of x, detached."""
    error: Tensor
    """(L, N, D) x̃ − x̃̂, standardised units, detached."""
    codes: TopK
    """(L, N, K) active latents."""


class MLSAE(nn.Module):
    """One TopK SAE for the residual vectors of all layers (Lawson et al., arXiv 2409.04185).

        μ, σ = mean and unbiased standard deviation of x over its D elements
        x̃ = (x − μ) / (σ + 1e-5)
        h = ReLU(TopK(W_enc (x̃ − b_pre)))
        x̂ = (Σ_k h · W_dec rows + b_pre) · σ + μ

    Nothing depends on the layer. b_pre is the SAE's `b_dec`; there is no latent bias. With
    `standardize=False`, μ = 0 and the vectors are taken as they are. With `shards`, a group of
    several processes, each holds a part of the latents (see `sharding`).
    """

    def __init__(
        self,
        config: MLSAEConfig,
        device: torch.device | str | None = None,
        shards: Group = ALONE.latents,
    ) -> None:
        super().__init__()
        self.config, self.shards = config, shards
        shape = (config.d_in, config.n_latents, config.k)
        self.sae: SparseTopKSAE = (
            SparseTopKSAE(*shape, bias=False, device=device)
            if shards.size == 1
            else ShardedSAE(*shape, shards, device=device)
        )

    def standardize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x̃ (…, D) float32, μ and σ (…, 1). A constant vector has σ = 0 and becomes 0."""
        x = x.float()
        if not self.config.standardize:
            return x, torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        std, mean = torch.std_mean(x, dim=-1, keepdim=True)
        return (x - mean) / (std + SIGMA_EPS), mean, std

    def encode(self, x: Tensor) -> TopK:
        """The active latents of residual vectors x (…, D): values and indices (…, K)."""
        return self.sae.encode(self.standardize(x)[0])

    def forward(self, x: Tensor) -> Tensor:
        """x̂ (…, D), in the units of x."""
        standard, mean, std = self.standardize(x)
        return self.sae(standard) * std + mean

    def losses(
        self,
        x: Tensor,
        variance: Tensor,
        n_tokens: int,
        *,
        dead: Tensor | None = None,
        k_aux: int = 0,
        error_variance: Tensor | None = None,
        aux_weight: float = 1 / 32,
    ) -> Losses:
        """The training loss of residuals x (L, N, D), a part of a step of `n_tokens` tokens.

            loss = mean_ℓ [ Σ_n |x − x̂|² / (n_tokens · variance_ℓ) ] + aux_weight · aux
            e    = x̃ − x̃̂, detached;  ê = Σ ReLU(TopK_{k_aux} among the dead) · W_dec rows
            aux  = mean_ℓ [ Σ_n |e − ê|² / (n_tokens · error_variance_ℓ) ]

        `variance` (L,) and `error_variance` (L,) are given, from the tokens seen before (see
        `metrics.Moments.variance`), and `n_tokens` is the whole step's: so the losses of the
        parts of a step add up to the loss of the whole, however it is split. With no `dead` ids
        (Q,) or no `error_variance`, aux is 0. Its gradient reaches W_enc and W_dec only. Of shards,
        `dead` are a shard's own; None where no shard has any.
        """
        standard, mean, std = self.standardize(x)
        reconstruction, codes = self.sae.reconstruct(standard)
        error = standard - reconstruction
        sq_error = (x - reconstruction * std - mean).square().sum((1, 2))  # (L,)
        loss = (sq_error / variance).mean() / n_tokens
        aux = torch.zeros((), device=x.device)
        some_dead = dead is not None and (len(dead) > 0 or self.shards.size > 1)
        if dead is not None and some_dead and error_variance is not None:
            predicted = self._among((standard - self.sae.b_dec).detach(), dead, k_aux)
            missed = (error.detach() - predicted).square().sum((1, 2))
            aux = (missed / error_variance).mean() / n_tokens
        return Losses(
            loss + aux_weight * aux, aux.detach(), sq_error.detach(), error.detach(), codes
        )

    def _among(self, x: Tensor, latents: Tensor, k: int) -> Tensor:
        """x̂ without b_pre (…, D), from the k largest among `latents` (Q,) only; all, if fewer."""
        if isinstance(self.sae, ShardedSAE):
            return self.sae.among(x, latents, k)
        W_enc, W_dec = self.sae.W_enc[latents], self.sae.W_dec[latents]
        return topk_sae(x, W_enc, None, W_dec, None, min(k, len(latents)))[0]

    def whole(self, part: Tensor) -> Tensor:
        """What all shards hold of something with a row a latent, (M, …), in the process of the
        first; the others get their own part back. All must call it."""
        return self.sae.whole(part) if isinstance(self.sae, ShardedSAE) else part

    def part(self, whole: Tensor) -> Tensor:
        """The rows (M/S, …) of something (M, …) that are of this process's latents."""
        return whole[self.sae.rows].clone() if isinstance(self.sae, ShardedSAE) else whole

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, as those of one that is not sharded: see `whole`."""
        return {
            name: self.whole(p) if p.ndim == 2 else p for name, p in self.sae.state_dict().items()
        }

    def save_pretrained(self, folder: Path | str, **extra: Any) -> None:
        """Write `config.json` (this config, and `extra`) and `model.safetensors` into `folder`:
        `W_enc` (M, D), `W_dec` (M, D), `b_dec` (D,), float32. Each file is replaced at once. Of
        shards, all must call it, and the first one writes."""
        weights = {name: p.detach().float().cpu() for name, p in self.weights().items()}
        if self.shards.rank > 0:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "model.safetensors", safetensors.torch.save(weights))
        settings = json.dumps({**asdict(self.config), **extra}, indent=2)
        write_file(folder / "config.json", settings.encode())

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: torch.device | str = "cpu") -> Self:
        """Load what `save_pretrained` wrote.

        Raises InputError where a file is missing, damaged, or of another shape than the config.
        """
        folder = Path(folder)
        try:
            settings = json.loads((folder / "config.json").read_text())
            fields = {name: settings[name] for name in MLSAEConfig.__dataclass_fields__}
            config = MLSAEConfig(**{**fields, "layers": tuple(fields["layers"])})
            mlsae = cls(config, device="meta")
            weights = safetensors.torch.load_file(folder / "model.safetensors", device=str(device))
            mlsae.sae.load_state_dict(weights, assign=True)
        except (OSError, KeyError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
            raise InputError(
                f"RUN must be the folder of a trained MLSAE (config.json and model.safetensors), "
                f"and {folder} cannot be loaded: {error}"
            ) from error
        return mlsae.requires_grad_()


def geometric_median(
    x: Tensor, iterations: int = 100, tolerance: float = 1e-6, group: Group = ALONE.data
) -> Tensor:
    """argmin_c Σ_n |x_n − c| by Weiszfeld's iteration: x (N, D) → (D,); of all vectors that the
    processes of `group` have together, and the same in each.

    Stops where the centre moves by less than `tolerance` of its own norm plus 1.
    """
    centre = group.sum_(x.sum(0)) / group.total(len(x))
    for _ in range(iterations):
        weight = 1 / (x - centre).norm(dim=1).clamp_min(1e-12)
        moved = group.sum_(weight @ x) / group.sum_(weight.sum())
        close = (moved - centre).norm() <= tolerance * (centre.norm() + 1)
        centre = moved
        if close:
            break
    return centre
