"""JumpReLU: a latent is active where its score exceeds its own threshold, however many are.

Codes are sparse all the same: the scores are never stored, and a vector whose active latents do not
fit in its code is told, not cut.

Legend: N tokens, D inputs, M latents; "…" any leading shape.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparse_topk import SAEOutput, SparseTopKSAE, TopK, topk_encode

from .errors import InputError
from .files import write_file
from .formats import SavedSAE, own

_CHUNK = 4096  # tokens, and latents, whose scores are counted at a time: 64 MiB


class JumpReLUSAE(SparseTopKSAE):
    """A `SparseTopKSAE` whose latents are active above a `threshold` θ ≥ 0, one for each or one for
    all (Rajamanoharan et al., arXiv 2407.14435, eq. 3):

        z = (x − b_dec) W_encᵀ + b_enc,   h = z where z > θ, else 0
        x̂ = Σ h · W_dec rows + b_dec

    BatchTopK SAEs of other libraries are of this kind when they are used (Bussmann et al., arXiv
    2412.06410), and so is one with ReLU: θ = 0. Codes have the shape (…, k_max), with the values 0
    where fewer latents are active; k is how many are in the mean, if the files tell.

    z is computed as `topk_encode` does, and where θ is one per latent as (z − θ) + θ, by whose
    first part latents are selected: both within rounding of the dense formula, so a latent whose
    score is within rounding of its threshold may be active in one and not in the other.

    Differentiable as `topk_encode`, θ being fixed: h has the gradient of z where a latent is
    active, and 0 elsewhere; the straight-through estimators by which θ is learned are not here.
    """

    threshold: Tensor
    """θ, () or (M,) float32, ≥ 0: a buffer that `state_dict` leaves out."""

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        k: int,
        k_max: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(d_in, n_latents, k, bias=bias, device=device)
        self.k_max = k_max
        self.register_buffer("threshold", torch.zeros((), device=device), persistent=False)

    def encode(self, x: Tensor) -> TopK:
        """The active latents of each vector: values ≥ 0 and int64 indices, each (…, k_max).

        Waits for the device. Raises InputError if a vector has more than k_max; `encode_capped`
        tells which, and how many more.
        """
        codes, excess = self.encode_capped(x)
        if bool(excess.any()):
            most = self.k_max + int(excess.max())
            raise InputError(
                f"k_max must be at least {most}, the active latents of one of the vectors, got "
                f"{self.k_max}, which {int((excess > 0).sum())} of them exceed; set "
                f"sae.k_max = {most} (or k_max in its config.json), leave such vectors out (first "
                "tokens, mostly), or let encode_capped keep a part"
            )
        return codes

    @torch.no_grad()
    def count_active(self, x: Tensor) -> Tensor:
        """How many latents are active for each vector of x (…, D), exactly: (…) int64. In chunks,
        so that memory stays small whatever M is; takes the time of a dense encoder."""
        x = (x - self.b_dec).reshape(-1, self.d_in).to(self.W_enc.dtype)
        counts = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for rows in range(0, len(x), _CHUNK):
            part = slice(rows, rows + _CHUNK)
            for first in range(0, self.n_latents, _CHUNK):
                latents = slice(first, first + _CHUNK)
                counts[part] += (self._scores(x[part], latents) > self._threshold(latents)).sum(1)
        return counts

    def encode_capped(self, x: Tensor) -> tuple[TopK, Tensor]:
        """`encode`, which keeps those k_max latents of a vector that exceed their thresholds most,
        and how many more are active, (…) int64: 0 where the code is whole.

        Only vectors all of whose k_max latents are active are counted. Waits for the device.
        """
        codes = self._above_threshold(x)
        excess = torch.zeros_like(codes.indices[..., 0])
        full = (codes.values > 0).all(-1)
        if self.k_max < self.n_latents and bool(full.any()):
            more = self.count_active(x[full]) - self.k_max
            excess[full] = more.clamp_(min=0)  # those at a threshold may round otherwise
        return codes, excess

    def dense(self, x: Tensor) -> Tensor:
        """The activations as a dense tensor (…, M), by the formula itself: with no cap."""
        scores = self._scores((x - self.b_dec).to(self.W_enc.dtype), slice(None))
        return scores.masked_fill(scores <= self.threshold, 0)  # NaN is not low, and stays

    def reconstruct(self, x: Tensor) -> SAEOutput:
        """x̂ (…, D), and the active latents (…, k_max). Raises InputError as `encode` does."""
        codes = self.encode(x)
        x_hat = self.decode(codes)
        if not torch.is_autocast_enabled(self.W_dec.device.type):
            x_hat = x_hat.to(x.dtype)
        return SAEOutput(x_hat, *codes)

    @torch.no_grad()
    def fold_norms_(self) -> JumpReLUSAE:
        """As `SparseTopKSAE.fold_norms_`, with the thresholds: n = |W_dec[m]|, θ[m] ← n θ[m]. The
        same latents are active, so the output stays the same, up to rounding."""
        norms = torch.linalg.vector_norm(self.W_dec, dim=1, dtype=torch.float32)
        self.threshold = self.threshold * norms.where(norms != 0, 1)
        super().fold_norms_()
        return self

    def extra_repr(self) -> str:
        one = self.threshold.numel() == 1
        told = f"{self.threshold.item():g}" if one else "one per latent"
        return f"{super().extra_repr()}, k_max={self.k_max}, threshold={told}"

    def _above_threshold(self, x: Tensor) -> TopK:
        """The k_max latents that exceed their thresholds most, with the values 0 below them."""
        x, theta = x - self.b_dec, self.threshold
        if theta.ndim == 0:
            values, indices = topk_encode(x, self.W_enc, self.b_enc, self.k_max)
            low = values.to(torch.promote_types(values.dtype, torch.float32)) <= theta
            return TopK(values.masked_fill(low, 0), indices)  # NaN is not low, and stays
        bias = -theta if self.b_enc is None else self.b_enc - theta
        over, indices = topk_encode(x, self.W_enc, bias, self.k_max)
        values = (over + theta[indices]).to(over.dtype)
        return TopK(values.masked_fill(over <= 0, 0), indices)

    def _scores(self, centered: Tensor, latents: slice) -> Tensor:
        bias = None if self.b_enc is None else self.b_enc[latents]
        return torch.nn.functional.linear(centered, self.W_enc[latents], bias)

    def _threshold(self, latents: slice) -> Tensor:
        return self.threshold if self.threshold.ndim == 0 else self.threshold[latents]

    def to_saved(self) -> SavedSAE:
        """What the files are made of."""
        weights = {name: p.detach().cpu() for name, p in self.state_dict().items()}
        weights["threshold"] = self.threshold.cpu()
        return SavedSAE(weights, self.k, standardize=False, k_max=self.k_max)

    def _save_pretrained(self, save_directory: Path) -> None:
        for name, content in own.files(self.to_saved()).items():
            write_file(save_directory / name, content)
