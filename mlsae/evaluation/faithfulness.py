"""How faithful reconstructions are: to the residual stream, and to the model's predictions.

Legend: L layers, R rows in all, B rows at a time, T positions, D width of the residual stream,
M latents, K active latents per token, V vocabulary, P predictions, S dropped tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .. import metrics
from ..data.residuals import ResidualReader
from ..model import ACTIVE, MLSAE
from .joint import Joint, replaced_from
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
    top_share: Tensor
    """(L,) `metrics.top_share`, about the mean of the first batch."""
    fvu_all: Tensor | None
    """(L,) `metrics.fvu` with the tokens that are dropped though not special; None if none are."""
    fvu_lens: Tensor | None = None
    """(L,) `metrics.fvu` in the basis of the lens, of z and ẑ; None without a lens."""


class Predictions:
    """The P positions of rows input_ids (B, T) at which a prediction is made, row by row.

    Both tokens of a prediction are kept: `token_mask` (B, T) is True there.
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
    text, row sums, one (D, D) matrix per layer, a number per token and layer, and the residuals at
    dropped tokens, special ones among them. The SAE is not for those, so their residuals stay true
    in every substitution and ablation.
    """

    def __init__(
        self, mlsae: MLSAE, reader: ResidualReader, n_rows: int, joint: Joint = "off"
    ) -> None:
        self.mlsae, self.reader, self.joint = mlsae, reader, joint
        config, n_layers = mlsae.config, len(reader.layers)
        device = mlsae.sae.W_dec.device
        self.sums = TokenSums(n_rows, n_layers, config.d_in, device)
        self.active = torch.zeros(config.n_latents, n_layers, dtype=torch.bool, device=device)
        self.scatter = torch.zeros(
            n_layers, config.d_in, config.d_in, dtype=torch.float64, device=device
        )
        self.sq_error_lens = torch.zeros(n_layers, dtype=torch.float64, device=device)
        self.dropped: list[Tensor] = []  # residuals (L, S, D) of each batch
        self.sq_deviation: list[list[Tensor]] = [[] for _ in reader.layers]  # of kept tokens
        # Of all tokens that are not special, if some of them are dropped:
        self.moments_all = [metrics.Moments(1, config.d_in, device) for _ in reader.layers]
        self.sq_error_all = torch.zeros(n_layers, dtype=torch.float64, device=device)

    def measure(
        self, rows: slice, input_ids: Tensor, token_mask: Tensor, text_mask: Tensor | None
    ) -> None:
        """Update with input_ids (B, T), which are `rows` of the text. text_mask (B, T) is True at
        tokens that are not special, and given if some of them are dropped."""
        sums = self.sums
        residuals, logits = self.reader.with_logits(input_ids)
        predictions = Predictions(input_ids, token_mask)
        log_p = predictions.log_p(logits)
        sums.tokens[rows] = token_mask.sum(1).double()
        sums.predictions[rows] = torch.bincount(predictions.row, minlength=len(token_mask)).double()
        sums.ce_true[rows] = predictions.cross_entropy(log_p)
        del logits
        if not self.dropped:  # the first batch
            sums.origin[:] = torch.stack([x[token_mask].float().sum(0) for x in residuals])
            sums.origin /= token_mask.sum().clamp_min(1)
        self.dropped.append(torch.stack([x[~token_mask] for x in residuals]))
        for i, layer in enumerate(self.reader.layers):
            x = residuals[i]
            x_hat = self._reconstruct(rows, i, x.float(), token_mask, text_mask)
            substituted = torch.where(token_mask[..., None], x_hat.to(x.dtype), x)
            logits = substituted_logits(self.reader, input_ids, layer, substituted)
            ce, kl, top1 = predictions.scores(logits, log_p)
            sums.ce[rows, i], sums.kl[rows, i], sums.top1[rows, i] = ce, kl, top1
            if self.joint == "from" or (self.joint == "all" and i == 0):
                if i < len(residuals) - 1:  # the topmost has none above it
                    logits = replaced_from(
                        self.mlsae, self.reader, input_ids, i, substituted, residuals, token_mask
                    )
                    ce, kl, top1 = predictions.scores(logits, log_p)
                sums.ce_from[rows, i], sums.kl_from[rows, i], sums.top1_from[rows, i] = ce, kl, top1

    def ablate(self, batch: int, rows: slice, input_ids: Tensor, token_mask: Tensor) -> None:
        """Update with the cross-entropy of the `batch`-th measured rows again, with 0 and with the
        mean over all measured tokens in place of the residuals."""
        predictions, dropped = Predictions(input_ids, token_mask), self.dropped[batch]
        mean = self.sums.mean()
        for i, layer in enumerate(self.reader.layers):
            for vector, ce in (
                (torch.zeros_like(mean[i]), self.sums.ce_zero),
                (mean[i], self.sums.ce_mean),
            ):
                ablated = vector.to(dropped.dtype).repeat(*input_ids.shape, 1)  # (B, T, D)
                ablated[~token_mask] = dropped[i]
                logits = substituted_logits(self.reader, input_ids, layer, ablated)
                ce[rows, i] = predictions.cross_entropy(predictions.log_p(logits))

    def pca(self) -> Tensor:
        """See `Faithfulness.pca`."""
        return metrics.pca_explained(self._centered_scatter(), self.mlsae.config.k)

    def fvu_lens(self) -> Tensor | None:
        """See `Faithfulness.fvu_lens`: Σ|z − mean z|² = tr(A S Aᵀ), S being the scatter of x."""
        lens, layers = self.mlsae.lens, list(self.reader.layers)
        if lens is None:
            return None
        scatter = self._centered_scatter()
        half = lens.turn(scatter, layers)  # S Aᵀ: rows are vectors
        whole = lens.turn(half.transpose(1, 2), layers)
        return self.sq_error_lens / whole.diagonal(dim1=1, dim2=2).sum(1)

    def _centered_scatter(self) -> Tensor:
        """Σ_n (x_n − mean)(x_n − mean)ᵀ of each layer, (L, D, D)."""
        n = self.sums.tokens.sum()
        offset = self.sums.deviation.sum(0, dtype=torch.float64)  # (L, D)
        return self.scatter - offset[:, :, None] * offset[:, None, :] / n

    def top_share(self) -> Tensor:
        """See `Faithfulness.top_share`."""
        return metrics.top_share(torch.stack([torch.cat(parts) for parts in self.sq_deviation]))

    def fvu_all(self) -> Tensor | None:
        """See `Faithfulness.fvu_all`."""
        n_tokens = int(self.moments_all[0].n_tokens)
        variance = torch.cat([moments.variance() for moments in self.moments_all])
        return self.sq_error_all / n_tokens / variance if n_tokens else None

    def _reconstruct(
        self, rows: slice, i: int, x: Tensor, token_mask: Tensor, text_mask: Tensor | None
    ) -> Tensor:
        """x̂ of the residuals x (B, T, D) at the i-th layer; also updates the sums."""
        sums, keep = self.sums, token_mask[..., None]
        reconstruction = self.mlsae.reconstruct(x, self.reader.layers[i])
        codes = reconstruction.codes
        if text_mask is not None:
            self.moments_all[i].update(x[text_mask][None])
            self.sq_error_all[i] += reconstruction.error[text_mask].square().sum()
        error = reconstruction.error * keep
        if self.mlsae.lens is not None:
            self.sq_error_lens[i] += (reconstruction.error_in_basis * keep).square().sum()
        values = codes.values.float() * keep  # (B, T, K)
        deviation = (x - sums.origin[i]) * keep
        sums.sq_error[rows, i] = error.square().sum((1, 2), dtype=torch.float64)
        sums.l0[rows, i] = (values > 0).sum((1, 2)).double()
        sums.l1[rows, i] = values.sum((1, 2), dtype=torch.float64)
        sums.sq_deviation[rows, i] = deviation.square().sum((1, 2), dtype=torch.float64)
        sums.deviation[rows, i] = deviation.sum(1)
        self.sq_deviation[i].append(deviation.square().sum(-1)[token_mask])
        flat = deviation.flatten(0, 1)
        self.scatter[i] += flat.T @ flat
        self.active[codes.indices[values > ACTIVE], i] = True
        return reconstruction.x_hat


@torch.inference_mode()
def measure_faithfulness(
    mlsae: MLSAE,
    reader: ResidualReader,
    input_ids: Tensor,
    token_mask: Tensor,
    micro_rows: int,
    text_mask: Tensor | None = None,
    joint: Joint = "off",
) -> Faithfulness:
    """Measure `mlsae` on the layers of `reader` at rows input_ids (R, T), `micro_rows` at a time.

    `token_mask` (R, T) is True at tokens that are kept; `text_mask` (R, T), if given, at those that
    are not special, be they kept or dropped. `joint` says which layers are replaced at once, too.
    The layers may be others than the MLSAE was trained on. Raises ValueError if `token_mask` leaves
    no prediction.
    """
    if not (token_mask[:, :-1] & token_mask[:, 1:]).any():
        raise ValueError("rows must hold two neighboring tokens that are kept, got none")
    if text_mask is not None and torch.equal(text_mask, token_mask):
        text_mask = None
    device = mlsae.sae.W_dec.device
    text_pass = FaithfulnessPass(mlsae, reader, len(input_ids), joint)
    slices = [slice(i, i + micro_rows) for i in range(0, len(input_ids), micro_rows)]
    bar = tqdm(total=2 * input_ids.numel(), unit=" tokens", unit_scale=True)
    with bar:
        bar.set_description("reconstructions")
        for rows in slices:
            ids, kept = input_ids[rows].to(device), token_mask[rows].to(device)
            text = None if text_mask is None else text_mask[rows].to(device)
            text_pass.measure(rows, ids, kept, text)
            bar.update(input_ids[rows].numel())
        bar.set_description("ablations")
        for batch, rows in enumerate(slices):
            text_pass.ablate(batch, rows, input_ids[rows].to(device), token_mask[rows].to(device))
            bar.update(input_ids[rows].numel())
    return Faithfulness(
        text_pass.sums,
        text_pass.active,
        text_pass.pca(),
        text_pass.top_share(),
        text_pass.fvu_all(),
        text_pass.fvu_lens(),
    )
