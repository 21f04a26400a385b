"""How faithful reconstructions are: to the residual stream, and to the model's predictions.

Legend: L layers, R rows in all, B rows at a time, T positions, D width of the residual stream,
M latents, K active latents per token, V vocabulary, P predictions, S special tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .. import metrics
from ..data.residuals import ResidualReader
from ..model import ACTIVE, MLSAE
from .patching import substituted_logits
from .token_metrics import TokenSums

_SCORES_ELEMENTS = 2**24  # logits scored at a time: each float32 copy has 64 MB


class Faithfulness(NamedTuple):
    """The result of a pass over rows of text."""

    sums: TokenSums
    active: Tensor
    """(M, L) bool: the latents with h > `model.ACTIVE` at any token of the layer."""
    pca: Tensor
    """(L,) `metrics.pca_explained` by as many components as the SAE has active latents (k)."""


class Predictions:
    """The P positions of rows input_ids (B, T) at which a prediction is made, row by row.

    `token_mask` (B, T) is True at tokens that are not special.
    """

    def __init__(self, input_ids: Tensor, token_mask: Tensor) -> None:
        self.row, self.position = (token_mask[:, :-1] & token_mask[:, 1:]).nonzero(
            as_tuple=True
        )  # (P,)
        self.targets = input_ids[self.row, self.position + 1]
        self.n_rows = len(input_ids)

    def log_p(self, logits: Tensor) -> Tensor:
        """ln p of true logits (B, T, V) at the predictions: (P, V) float32."""
        return logits[self.row, self.position].float().log_softmax(-1)

    def scores(self, logits: Tensor, true_log_p: Tensor) -> Tensor:
        """The `metrics.token_scores` of logits (B, T, V), summed per row: (3, B) float64."""
        chunk = max(1, _SCORES_ELEMENTS // logits.shape[-1])
        scores = [
            torch.stack(metrics.token_scores(log_p, logits[row, position], targets))
            for row, position, targets, log_p in zip(
                self.row.split(chunk),
                self.position.split(chunk),
                self.targets.split(chunk),
                true_log_p.split(chunk),
                strict=True,
            )
        ]
        return self.sum_by_row(torch.cat(scores, dim=1))

    def cross_entropy(self, log_p: Tensor) -> Tensor:
        """−ln p(target), summed per row: log_p (P, V) → (B,) float64."""
        return self.sum_by_row(-log_p.gather(1, self.targets[:, None]).T)[0]

    def sum_by_row(self, values: Tensor) -> Tensor:
        """values (…, P), summed over the predictions of each row: (…, B) float64."""
        sums = values.new_zeros(*values.shape[:-1], self.n_rows, dtype=torch.float64)
        return sums.index_add(-1, self.row, values.double())


class FaithfulnessPass:
    """One pass of `mlsae` over rows of text, B at a time, and a second one with ablations.

    The true forward pass runs once per row. For a batch, memory holds the residuals of all layers,
    the predictions' true log-probabilities, and the substituted logits of one layer; for the whole
    text, row sums, one (D, D) matrix per layer, and the residuals at special tokens. The SAE does
    not see special tokens, so their residuals stay true in every substitution and ablation.
    """

    def __init__(self, mlsae: MLSAE, reader: ResidualReader, n_rows: int) -> None:
        self.mlsae, self.reader = mlsae, reader
        config, n_layers = mlsae.config, len(reader.layers)
        device = mlsae.sae.W_dec.device
        self.sums = TokenSums(n_rows, n_layers, config.d_in, device)
        self.active = torch.zeros(config.n_latents, n_layers, dtype=torch.bool, device=device)
        self.scatter = torch.zeros(
            n_layers, config.d_in, config.d_in, dtype=torch.float64, device=device
        )
        self.special: list[Tensor] = []  # residuals (L, S, D) of each batch

    def measure(self, rows: slice, input_ids: Tensor, token_mask: Tensor) -> None:
        """Update with input_ids (B, T), which are `rows` of the text."""
        sums = self.sums
        residuals, logits = self.reader.with_logits(input_ids)
        predictions = Predictions(input_ids, token_mask)
        log_p = predictions.log_p(logits)
        sums.tokens[rows] = token_mask.sum(1).double()
        sums.predictions[rows] = torch.bincount(predictions.row, minlength=len(token_mask)).double()
        sums.ce_true[rows] = predictions.cross_entropy(log_p)
        del logits
        if not self.special:  # the first batch
            sums.origin[:] = torch.stack([x[token_mask].float().sum(0) for x in residuals])
            sums.origin /= token_mask.sum().clamp_min(1)
        self.special.append(torch.stack([x[~token_mask] for x in residuals]))
        for i, layer in enumerate(self.reader.layers):
            x = residuals[i]
            x_hat = self._reconstruct(rows, i, x.float(), token_mask)
            substituted = torch.where(token_mask[..., None], x_hat.to(x.dtype), x)
            logits = substituted_logits(self.reader, input_ids, layer, substituted)
            ce, kl, top1 = predictions.scores(logits, log_p)
            sums.ce[rows, i], sums.kl[rows, i], sums.top1[rows, i] = ce, kl, top1

    def ablate(self, batch: int, rows: slice, input_ids: Tensor, token_mask: Tensor) -> None:
        """Update with the cross-entropy of the `batch`-th measured rows again, with 0 and with the
        mean over all measured tokens in place of the residuals."""
        predictions, special = Predictions(input_ids, token_mask), self.special[batch]
        mean = self.sums.mean()
        for i, layer in enumerate(self.reader.layers):
            for vector, ce in (
                (torch.zeros_like(mean[i]), self.sums.ce_zero),
                (mean[i], self.sums.ce_mean),
            ):
                ablated = vector.to(special.dtype).repeat(*input_ids.shape, 1)  # (B, T, D)
                ablated[~token_mask] = special[i]
                logits = substituted_logits(self.reader, input_ids, layer, ablated)
                ce[rows, i] = predictions.cross_entropy(predictions.log_p(logits))

    def pca(self) -> Tensor:
        """See `Faithfulness.pca`."""
        n = self.sums.tokens.sum()
        offset = self.sums.deviation.sum(0, dtype=torch.float64)  # (L, D)
        centered = self.scatter - offset[:, :, None] * offset[:, None, :] / n
        return metrics.pca_explained(centered, self.mlsae.config.k)

    def _reconstruct(self, rows: slice, i: int, x: Tensor, token_mask: Tensor) -> Tensor:
        """x̂ of the residuals x (B, T, D) at the i-th layer; also updates the sums."""
        sums, keep = self.sums, token_mask[..., None]
        reconstruction = self.mlsae.reconstruct(x)
        codes = reconstruction.codes
        error = reconstruction.error * keep
        values = codes.values.float() * keep  # (B, T, K)
        deviation = (x - sums.origin[i]) * keep
        sums.sq_error[rows, i] = error.square().sum((1, 2), dtype=torch.float64)
        sums.l0[rows, i] = (values > 0).sum((1, 2)).double()
        sums.l1[rows, i] = values.sum((1, 2), dtype=torch.float64)
        sums.sq_deviation[rows, i] = deviation.square().sum((1, 2), dtype=torch.float64)
        sums.deviation[rows, i] = deviation.sum(1)
        flat = deviation.flatten(0, 1)
        self.scatter[i] += flat.T @ flat
        self.active[codes.indices[values > ACTIVE], i] = True
        return reconstruction.x_hat


@torch.inference_mode()
def measure_faithfulness(
    mlsae: MLSAE, reader: ResidualReader, input_ids: Tensor, token_mask: Tensor, micro_rows: int
) -> Faithfulness:
    """Measure `mlsae` on the layers of `reader` at rows input_ids (R, T), `micro_rows` at a time.

    `token_mask` (R, T) is True at tokens that are not special. The layers may be others than the
    MLSAE was trained on. Raises ValueError if `token_mask` leaves no prediction.
    """
    if not (token_mask[:, :-1] & token_mask[:, 1:]).any():
        raise ValueError("rows must hold two neighboring tokens that are not special, got none")
    device = mlsae.sae.W_dec.device
    text_pass = FaithfulnessPass(mlsae, reader, len(input_ids))
    slices = [slice(i, i + micro_rows) for i in range(0, len(input_ids), micro_rows)]
    bar = tqdm(total=2 * input_ids.numel(), unit=" tokens", unit_scale=True)
    with bar:
        bar.set_description("reconstructions")
        for rows in slices:
            text_pass.measure(rows, input_ids[rows].to(device), token_mask[rows].to(device))
            bar.update(input_ids[rows].numel())
        bar.set_description("ablations")
        for batch, rows in enumerate(slices):
            text_pass.ablate(batch, rows, input_ids[rows].to(device), token_mask[rows].to(device))
            bar.update(input_ids[rows].numel())
    return Faithfulness(text_pass.sums, text_pass.active, text_pass.pca())
