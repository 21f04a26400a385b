"""What a reconstruction keeps: of the residual stream, and of the model's predictions.

Legend: L layers, R rows in all, B rows at a time, T positions, D width of the residual stream,
M latents, K active latents a token, V vocabulary, P predictions, S special tokens.
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
from .token_metrics import RowSums

_SCORES_ELEMENTS = 2**24  # logits that are scored at a time: 64 MB of each float32 copy


class Measured(NamedTuple):
    """What a pass over rows of text found."""

    rows: RowSums
    active: Tensor
    """(M, L) bool: latents with h > `model.ACTIVE` at some token of the layer."""
    pca: Tensor
    """(L,) `metrics.pca_explained` by as many components as the SAE has active latents (k)."""


class Predictions:
    """Where the rows input_ids (B, T) make predictions: at P positions, in the order of the rows.

    `token_mask` (B, T) says which tokens are not special.
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
        """Sums over each row's predictions, (3, B) float64, of the `metrics.token_scores`."""
        at_a_time = max(1, _SCORES_ELEMENTS // logits.shape[-1])
        parts = zip(
            *(indices.split(at_a_time) for indices in (self.row, self.position, self.targets)),
            true_log_p.split(at_a_time),
            strict=True,
        )
        return self.by_row(
            torch.cat(
                [
                    torch.stack(metrics.token_scores(log_p, logits[row, position], targets))
                    for row, position, targets, log_p in parts
                ],
                dim=1,
            )
        )

    def cross_entropy(self, log_p: Tensor) -> Tensor:
        """Sums over each row's predictions of −ln p(target), (B,) float64: log_p (P, V)."""
        return self.by_row(-log_p.gather(1, self.targets[:, None]).T)[0]

    def by_row(self, values: Tensor) -> Tensor:
        """values (…, P), summed over each row's predictions: (…, B) float64."""
        sums = values.new_zeros(*values.shape[:-1], self.n_rows, dtype=torch.float64)
        return sums.index_add(-1, self.row, values.double())


class Pass:
    """One pass of `mlsae` over rows of text, B at a time, and the ablations after it.

    The true forward runs once for each row. Of a batch, memory holds the residuals of the layers,
    the predictions' true log-probabilities and one layer's substituted logits; of the text, row
    sums, one (D, D) matrix a layer, and the residuals at special tokens: those are no input of
    the SAE, so they stay true in every substitution and every ablation.
    """

    def __init__(self, mlsae: MLSAE, reader: ResidualReader, n_rows: int) -> None:
        self.mlsae, self.reader = mlsae, reader
        config, n_layers = mlsae.config, len(reader.layers)
        device = mlsae.sae.W_dec.device
        self.rows = RowSums(n_rows, n_layers, config.d_in, device)
        self.active = torch.zeros(config.n_latents, n_layers, dtype=torch.bool, device=device)
        self.scatter = torch.zeros(
            n_layers, config.d_in, config.d_in, dtype=torch.float64, device=device
        )
        self.special: list[Tensor] = []  # of each batch, (L, S, D)

    def measure(self, at: slice, input_ids: Tensor, token_mask: Tensor) -> None:
        """Take in the rows input_ids (B, T), rows `at` of all; `token_mask` (B, T): not special."""
        rows = self.rows
        residuals, logits = self.reader.with_logits(input_ids)
        predictions = Predictions(input_ids, token_mask)
        log_p = predictions.log_p(logits)
        rows.tokens[at] = token_mask.sum(1).double()
        rows.predictions[at] = torch.bincount(predictions.row, minlength=len(token_mask)).double()
        rows.ce_true[at] = predictions.cross_entropy(log_p)
        del logits
        if not self.special:
            rows.origin[:] = torch.stack([x[token_mask].float().sum(0) for x in residuals])
            rows.origin /= token_mask.sum().clamp_min(1)
        self.special.append(torch.stack([x[~token_mask] for x in residuals]))
        for i, layer in enumerate(self.reader.layers):
            x = residuals[i]
            x_hat = self._reconstruct(at, i, x.float(), token_mask)
            substituted = torch.where(token_mask[..., None], x_hat.to(x.dtype), x)
            logits = substituted_logits(self.reader, input_ids, layer, substituted)
            rows.ce[at, i], rows.kl[at, i], rows.top1[at, i] = predictions.scores(logits, log_p)

    def ablate(self, batch: int, at: slice, input_ids: Tensor, token_mask: Tensor) -> None:
        """The cross-entropy of the same rows, the `batch`-th measured, with 0 and with the mean
        over all measured tokens in place of the residuals."""
        predictions, special = Predictions(input_ids, token_mask), self.special[batch]
        mean = self.rows.mean()
        for i, layer in enumerate(self.reader.layers):
            for vector, sums in (
                (torch.zeros_like(mean[i]), self.rows.ce_zero),
                (mean[i], self.rows.ce_mean),
            ):
                ablated = vector.to(special.dtype).repeat(*input_ids.shape, 1)  # (B, T, D)
                ablated[~token_mask] = special[i]
                logits = substituted_logits(self.reader, input_ids, layer, ablated)
                sums[at, i] = predictions.cross_entropy(predictions.log_p(logits))

    def pca(self) -> Tensor:
        """See `Measured.pca`."""
        n = self.rows.tokens.sum()
        offset = self.rows.deviation.sum(0, dtype=torch.float64)  # (L, D)
        centered = self.scatter - offset[:, :, None] * offset[:, None, :] / n
        return metrics.pca_explained(centered, self.mlsae.config.k)

    def _reconstruct(self, at: slice, i: int, x: Tensor, token_mask: Tensor) -> Tensor:
        """x̂ of the i-th layer's residuals x (B, T, D), its sums taken in."""
        rows, keep = self.rows, token_mask[..., None]
        standard, mean, std = self.mlsae.standardize(x)
        out = self.mlsae.sae.reconstruct(standard)
        reconstruction, codes = out.x_hat, out.codes
        error = (x - reconstruction * std - mean) * keep
        values = codes.values.float() * keep  # (B, T, K)
        deviation = (x - rows.origin[i]) * keep
        rows.sq_error[at, i] = error.square().sum((1, 2), dtype=torch.float64)
        rows.l0[at, i] = (values > 0).sum((1, 2)).double()
        rows.l1[at, i] = values.sum((1, 2), dtype=torch.float64)
        rows.sq_deviation[at, i] = deviation.square().sum((1, 2), dtype=torch.float64)
        rows.deviation[at, i] = deviation.sum(1)
        flat = deviation.flatten(0, 1)
        self.scatter[i] += flat.T @ flat
        self.active[codes.indices[values > ACTIVE], i] = True
        return reconstruction * std + mean


@torch.inference_mode()
def measure_faithfulness(
    mlsae: MLSAE, reader: ResidualReader, input_ids: Tensor, token_mask: Tensor, micro_rows: int
) -> Measured:
    """Measure `mlsae` on the layers of `reader` at rows input_ids (R, T), `micro_rows` at a time.

    `token_mask` (R, T) says which tokens are not special. The layers need not be those that the
    MLSAE was trained on. Nothing else changes. Raises ValueError if `token_mask` leaves no
    prediction.
    """
    if not (token_mask[:, :-1] & token_mask[:, 1:]).any():
        raise ValueError("rows must hold two tokens in a row that are not special, got none")
    device = mlsae.sae.W_dec.device
    one_pass = Pass(mlsae, reader, len(input_ids))
    slices = [slice(i, i + micro_rows) for i in range(0, len(input_ids), micro_rows)]
    bar = tqdm(total=2 * input_ids.numel(), unit=" tokens", unit_scale=True)
    with bar:
        bar.set_description("reconstructions")
        for at in slices:
            one_pass.measure(at, input_ids[at].to(device), token_mask[at].to(device))
            bar.update(input_ids[at].numel())
        bar.set_description("ablations")
        for batch, at in enumerate(slices):
            one_pass.ablate(batch, at, input_ids[at].to(device), token_mask[at].to(device))
            bar.update(input_ids[at].numel())
    return Measured(one_pass.rows, one_pass.active, one_pass.pca())
