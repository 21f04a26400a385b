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

from .errors import InputError
from .files import write_file

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
    `standardize=False`, μ = 0 and the vectors are taken as they are.
    """

    def __init__(self, config: MLSAEConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        self.sae = SparseTopKSAE(config.d_in, config.n_latents, config.k, bias=False, device=device)

    def standardize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x̃ (…, D) float32, μ and σ (…, 1). A constant vector has σ = 0 and becomes 0:
        x̂ is then the constant, exactly. A vector that is not finite becomes NaN, and so stops
        training (see `trainer.Step.check`)."""
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
        (Q,) or no `error_variance`, aux is 0. Its gradient reaches W_enc and W_dec only.
        """
        standard, mean, std = self.standardize(x)
        reconstruction, codes = self.sae.reconstruct(standard)
        error = standard - reconstruction
        sq_error = (x - reconstruction * std - mean).square().sum((1, 2))  # (L,)
        loss = (sq_error / variance).mean() / n_tokens
        aux = torch.zeros((), device=x.device)
        if dead is not None and len(dead) and error_variance is not None:
            predicted, _ = topk_sae(
                (standard - self.sae.b_dec).detach(),
                self.sae.W_enc[dead],
                None,
                self.sae.W_dec[dead],
                None,
                min(k_aux, len(dead)),
            )
            missed = (error.detach() - predicted).square().sum((1, 2))
            aux = (missed / error_variance).mean() / n_tokens
        return Losses(
            loss + aux_weight * aux, aux.detach(), sq_error.detach(), error.detach(), codes
        )

    def save_pretrained(self, folder: Path | str, **extra: Any) -> None:
        """Write `config.json` (this config, and `extra`) and `model.safetensors` into `folder`:
        `W_enc` (M, D), `W_dec` (M, D), `b_dec` (D,), float32. Each file is replaced at once."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: p.detach().float().cpu() for name, p in self.sae.state_dict().items()}
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


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """argmin_c Σ_n |x_n − c| by Weiszfeld's iteration: x (N, D) → (D,).

    Stops where the centre moves by less than `tolerance` of its own norm plus 1.
    """
    centre = x.mean(0)
    for _ in range(iterations):
        weight = 1 / (x - centre).norm(dim=1).clamp_min(1e-12)
        moved = (weight @ x) / weight.sum()
        close = (moved - centre).norm() <= tolerance * (centre.norm() + 1)
        centre = moved
        if close:
            break
    return centre
