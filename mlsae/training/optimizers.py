"""Which optimizer trains which weight."""

from __future__ import annotations

from typing import Any, NamedTuple

from sparse_topk import NorMuon, SparseTopKSAE, UnitNormAdam
from sparse_topk.shadows import Shadows

from ..config import TrainConfig, optimizer_of

BETAS = {"adam": (0.7, 0.95), "normuon": (0.5, 0.95)}
"""The best for short runs: see docs/choosing.md."""


class Optimizers(NamedTuple):
    """The optimizer of each weight, by the names of `--optimizer`; biases have Adam."""

    encoder: str = "adam"
    decoder: str = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = None

    def of(self, sae: SparseTopKSAE, shadows: Shadows) -> UnitNormAdam:
        """The optimizer of an SAE. It also writes `shadows`, and NorMuon multiplies in their
        dtype."""
        rest, decoder = sae.parameter_groups()
        common: dict[str, Any] = {
            "betas": self.betas,
            "max_grad_norm": self.max_grad_norm,
            "total_norm": sae.total_norm,
            "shadows": shadows,
        }
        if "normuon" not in (self.encoder, self.decoder):
            return UnitNormAdam([rest, decoder], **common)
        rest["orthogonal"] = self.encoder == "normuon"
        decoder["orthogonal"] = self.decoder == "normuon"
        common |= {"sum_rows": sae.sum_over_rows, "dtype": shadows.dtype}
        return NorMuon([rest, decoder], **common)


ADAM = Optimizers()
"""Adam for all of them."""


def optimizers_of(config: TrainConfig, first_tokens: int) -> Optimizers:
    """Those of a run that began with `first_tokens` tokens to train on."""
    encoder = optimizer_of(config, first_tokens)
    decoder, betas = config.decoder_optimizer or encoder, config.betas or BETAS[encoder]
    return Optimizers(encoder, decoder, betas, config.max_grad_norm)
