"""A tuned lens (Belrose et al., arXiv 2303.08112): maps trained so that the model's own final norm
and unembedding predict from each layer's z what they predict from the last layer's residual.

    loss = Σ_ℓ mean_n KL(p_n ‖ q_ℓn),   p = softmax(U(x_L)), q_ℓ = softmax(U(A_ℓ x_ℓ + b_ℓ))

U is the final norm and the unembedding, with whatever the model does beside them. The maps begin at
the affine lens (see `affine`) where the paper's begin at the identity, which saves most of the
steps, and are trained by Adam, in units in which every layer's residuals have a mean of 0 and a
variance of 1.

Legend: L layers, the last of them last; N tokens, B rows, T positions, D width of the residual
stream, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data.residuals import ResidualReader
from ..evaluation.patching import substituted_logits
from .affine import SecondMoments

_BETAS = (0.9, 0.95)
_LEVEL = 0.3  # share of the steps at the full rate, before it falls to 0


def unembedded(reader: ResidualReader, input_ids: Tensor, z: Tensor, mask: Tensor) -> Tensor:
    """ln softmax U(z), at the tokens of rows input_ids (B, T) that `mask` (B · T,) keeps: z (B · T,
    D) → (N, V), differentiable in z."""
    dtype: Any = reader.model.dtype
    residual = z.view(*input_ids.shape, -1).to(dtype)
    last = len(reader.blocks) - 1
    logits = substituted_logits(reader, input_ids, last, residual)
    return logits.flatten(0, 1)[mask].float().log_softmax(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats: log_p and log_q (N, V) → (N,)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class TunedMaps:
    """The maps of all layers but the last, in training for `steps` steps at a peak rate of `lr`."""

    def __init__(
        self, matrix: Tensor, bias: Tensor, moments: SecondMoments, lr: float, steps: int
    ) -> None:
        n = len(matrix) - 1
        mean, spread = moments.mean(), moments.covariance()[0].diagonal(dim1=1, dim2=2).mean(1)
        deviation = spread.sqrt()
        self.mean = mean[:n].float()
        self.scale = deviation[-1].item()
        self.ratio = (deviation[-1] / deviation[:n]).float()[:, None, None]
        self.matrix, self.bias = matrix[:n].float(), bias[:n].float()
        self.change = torch.zeros_like(self.matrix).requires_grad_()
        self.shift = torch.zeros_like(self.bias).requires_grad_()
        self.optimizer = torch.optim.Adam([self.change, self.shift], lr=lr, betas=_BETAS)
        self.lr, self.steps, self.done = lr, steps, 0

    def maps(self, layer: int) -> tuple[Tensor, Tensor]:
        """A (D, D) and b (D,) of a layer, by its place."""
        change = self.ratio[layer] * self.change[layer]
        shift = self.scale * self.shift[layer] - change @ self.mean[layer]
        return self.matrix[layer] + change, self.bias[layer] + shift

    def step(self, reader: ResidualReader, input_ids: Tensor, x: Tensor, mask: Tensor) -> float:
        """A step on residuals x (L, B · T, D) of rows input_ids (B, T), at the tokens of `mask`:
        the loss per layer before it."""
        with torch.no_grad():
            log_p = unembedded(reader, input_ids, x[-1], mask)
        total = 0.0
        for i in range(len(self.matrix)):  # one after another: each has logits of its own
            matrix, bias = self.maps(i)
            z = x[i].float() @ matrix.T + bias
            loss = kl(log_p, unembedded(reader, input_ids, z, mask)).mean()
            loss.backward()
            total += loss.item()
        left = (self.steps - self.done) / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, left / (1 - _LEVEL))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return total / len(self.matrix)

    @torch.no_grad()
    def finished(self) -> tuple[Tensor, Tensor]:
        """A (L − 1, D, D) and b (L − 1, D)."""
        matrices, biases = zip(*map(self.maps, range(len(self.matrix))), strict=True)
        return torch.stack(matrices), torch.stack(biases)
