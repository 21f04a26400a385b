"""Measure trained SAEs, whoever trained them, by one and the same code.

Legend: L layers, N tokens, B rows, T positions, D width of the residual stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlsae.evaluation.faithfulness import FaithfulnessPass
from mlsae.evaluation.token_metrics import compute_token_metrics
from mlsae.model import MLSAE
from mlsae.training.validation import Validation, validate

from .harvest import drop_rule, heldout_rows, open_stream
from .vectors import SLICES, Vectors

PREDICTED_TOKENS = 8192
"""Of the report slice, to put reconstructions into the model at: six passes of it for each SAE."""


def fit_figures(mlsae: MLSAE, vectors: Vectors) -> dict[str, Any]:
    """How well it reconstructs the held-out residuals: FVU of both slices, the share of latents
    that are active in neither, and L0."""
    return figures_of(*(_validate(mlsae, vectors, name) for name in SLICES))


def figures_of(choose: Validation, report: Validation) -> dict[str, Any]:
    """What is told of two slices."""
    never = (choose.counts + report.counts).sum(1) == 0
    return {
        "fvu_choose": round(choose.fvu.mean().item(), 5),
        "fvu": round(report.fvu.mean().item(), 5),
        "fvu_layers": [round(value, 4) for value in report.fvu.tolist()],
        "never_active": round(never.double().mean().item(), 5),
        "l0": round(report.l0.mean().item(), 3),
    }


def _validate(mlsae: MLSAE, vectors: Vectors, name: str) -> Validation:
    pairs = ((x, x[:, :0]) for x in vectors.heldout(name))
    return validate([mlsae], pairs)[0]


class InModel:
    """The transformer, and rows (B, T) of the report slice, to put reconstructions into."""

    def __init__(self, vectors: Vectors) -> None:
        self.stream = open_stream(vectors.about.layers, whole=True)
        self.stream.drop = drop_rule(vectors.about)
        rows = heldout_rows(self.stream, vectors.about.slice_tokens)["report"]
        self.rows = rows[: max(1, PREDICTED_TOKENS // self.stream.seq_len)]
        self.kept = self.stream.token_mask(self.rows)
        self.ablated: tuple[Tensor, Tensor] | None = None
        """(B, L) each: cross-entropy with zero and with the mean in place of the residuals. No SAE
        changes it, so the first one's pass is the only one that measures it."""

    @torch.inference_mode()
    def figures(self, mlsae: MLSAE) -> dict[str, Any]:
        """What the model's predictions lose, with the reconstruction in place of the residual of
        one layer at a time: ΔCE (nats per token), and the share of the cross-entropy that ablating
        by the mean, or by zero, would cost and the reconstruction does not."""
        text = FaithfulnessPass(mlsae, self.stream.reader, len(self.rows))
        micro = self.stream.micro_rows
        slices = [slice(i, i + micro) for i in range(0, len(self.rows), micro)]
        for part in slices:
            text.measure(part, self.rows[part], self.kept[part], None)
        if self.ablated is None:
            for i, part in enumerate(slices):
                text.ablate(i, part, self.rows[part], self.kept[part])
            self.ablated = (text.sums.ce_zero, text.sums.ce_mean)
        text.sums.ce_zero, text.sums.ce_mean = self.ablated
        once = torch.ones(1, len(self.rows), dtype=torch.float64)
        metrics = compute_token_metrics(text.sums, once)
        return {
            "delta_ce": round(metrics.delta_ce.mean().item(), 5),
            "delta_ce_layers": [round(value, 4) for value in metrics.delta_ce[0].tolist()],
            "recovered_mean": round(metrics.recovered_mean.mean().item(), 5),
            "recovered_zero": round(metrics.recovered_zero.mean().item(), 5),
        }
