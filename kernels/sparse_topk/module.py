"""A TopK sparse autoencoder as a module. `hub` has the one that also loads and saves itself.

Legend: D inputs, M latents, K active latents per token, Q latents of a subset; "…" any leading
shape.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from .codes import SAEOutput, TopK
from .functional import check_k, sparse_decode, topk_encode, topk_sae


class SparseTopKSAE(nn.Module):
    """A TopK sparse autoencoder that never stores the dense activations.

        encode(x)      = ReLU(TopK((x − b_dec) W_encᵀ + b_enc))    (…, D) → values, indices (…, K)
        decode(codes)  = Σ_k values · W_dec[indices] + b_dec       (…, K) → (…, D)
        forward(x)     = decode(encode(x))                         (…, D) → (…, D)
        reconstruct(x) = forward(x) and encode(x) in one pass      (…, D) → x_hat, values, indices

    Parameters: `W_enc` (M, D), `W_dec` (M, D), `b_dec` (D,) and, with `bias`, `b_enc` (M,). Both
    weights have one row per latent. Initially W_enc = W_dec, with rows of norm 1, and the biases
    are 0. `UnitNormAdam` keeps W_dec's rows at norm 1 (Gao et al., arXiv 2406.04093, §2).

    Computes in the parameters' dtype, or in autocast's, which is the dtype of the activations too.
    x̂ has x's dtype, or autocast's if that is on. Raises ValueError if k is not in [1, M].
    """

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        k: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_in < 1:
            raise ValueError(f"d_in must be at least 1, got {d_in}")
        check_k(k, n_latents)
        self.d_in, self.n_latents, self.k = d_in, n_latents, k
        rows = nn.functional.normalize(torch.randn(n_latents, d_in, device=device), dim=1)
        self.W_enc = nn.Parameter(rows.to(dtype or torch.get_default_dtype()))
        self.W_dec = nn.Parameter(self.W_enc.detach().clone())
        self.b_dec = nn.Parameter(torch.zeros_like(self.W_dec[0]))
        self.b_enc = nn.Parameter(torch.zeros_like(self.W_enc[:, 0])) if bias else None

    def encode(self, x: Tensor) -> TopK:
        """The active latents of each token: values ≥ 0 and int64 indices, each (…, K)."""
        return topk_encode(x - self.b_dec, self.W_enc, self.b_enc, self.k)

    def decode(self, codes: TopK) -> Tensor:
        """The reconstruction from active latents, (…, K) → (…, D), for any K."""
        return sparse_decode(codes, self.W_dec, self.b_dec)

    def reconstruct(self, x: Tensor) -> SAEOutput:
        """Output, activations and indices of one differentiable pass:

            x_hat, values, indices = sae.reconstruct(x)

        This is what calling a `SparseCoder` of sparsify returns as `sae_out, latent_acts,
        latent_indices`. The same codes as one argument for `decode` are `reconstruct(x).codes`.
        """
        return topk_sae(x, self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.k)

    def forward(self, x: Tensor) -> Tensor:
        """x̂ (…, D)."""
        return self.reconstruct(x).x_hat

    def dense(self, x: Tensor) -> Tensor:
        """The activations as a dense tensor (…, M), 0 where a latent is not active; differentiable.
        For tools that expect one: it is M / K times the size of `encode(x)`."""
        values, indices = self.encode(x)
        zeros = values.new_zeros(*values.shape[:-1], self.n_latents)
        return zeros.scatter(-1, indices, values)

    # An SAE whose latents are split among processes overrides these, so that callers need not ask
    # which of the two they have.

    def gather_rows(self, part: Tensor) -> Tensor:
        """All latents' rows (M, …) of a tensor with one row per latent; `part` is this process's.
        Here it holds all of them."""
        return part

    def own_rows(self, whole: Tensor) -> Tensor:
        """This process's rows of `whole` (M, …), a tensor with one row per latent; here, all."""
        return whole

    def sum_over_rows(self, partial: Tensor) -> Tensor:
        """Add up, in place, what has been summed over this process's rows, as `NorMuon` asks for
        it; here they are all."""
        return partial

    def total_norm(self, grads: list[Tensor]) -> Tensor:
        """The norm of the gradients of all parameters together, as `UnitNormAdam` asks for it."""
        return get_total_norm(grads)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameter groups for `UnitNormAdam`: W_dec with its rows at norm 1, and the rest."""
        rest = [p for p in self.parameters() if p is not self.W_dec]
        return [{"params": rest}, {"params": [self.W_dec], "unit_norm": True}]

    @torch.no_grad()
    def fold_norms_(self) -> Self:
        """Give W_dec's rows norm 1, so that `UnitNormAdam` takes them, and move the norms into the
        encoder: for each latent m with n = |W_dec[m]| > 0,

            W_dec[m] ← W_dec[m] / n,   W_enc[m] ← n W_enc[m],   b_enc[m] ← n b_enc[m]

        Activations become n times as large, and what a latent adds to the output stays the same.
        But the K largest are then chosen by n · score instead of by score. The output stays the
        same, up to rounding, for each token whose K-th score is at most 0, or exceeds the next by
        more than the ratio of the largest norm to the smallest; so for every token, if all norms
        are equal or K = M. For others another latent may be chosen: compare `sae(x)` before and
        after on data of yours. Rows of zeros stay, with their encoder. Returns the SAE.
        """
        wide = torch.promote_types(self.W_dec.dtype, torch.float32)
        norms = torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True, dtype=wide)
        norms = norms.where(norms != 0, 1)
        self.W_dec.div_(norms)
        self.W_enc.mul_(norms)
        if self.b_enc is not None:
            self.b_enc.mul_(norms[:, 0])
        return self

    @torch.no_grad()
    def fit_scale_(self, x: Tensor) -> Self:
        """Scale the encoder for the first batch of data x (…, D), before training: with x̂ = forward
        and centered c = x − b_dec, ĉ = x̂ − b_dec,

            s = ⟨ĉ, c⟩ / ⟨ĉ, ĉ⟩,   W_enc ← s W_enc,   b_enc ← s b_enc

        which of all factors reconstructs x best, since the same latents stay active. Without it,
        rows of norm 1 give an x̂ that is far too large: the K largest of many scores are large by
        chance too. Returns the SAE; it stays as it is where ĉ is 0. Set b_dec before.

        Raises ValueError if x or x̂ is not finite.
        """
        return self.scale_encoder_(self.scale_sums(x))

    @torch.no_grad()
    def scale_sums(self, x: Tensor, x_hat: Tensor | None = None) -> Tensor:
        """⟨ĉ, c⟩ and ⟨ĉ, ĉ⟩ of `fit_scale_`, (2,) float64: sums over the tokens of x (…, D), whose
        reconstruction is x̂ (…, D), that of the SAE if None."""
        x_hat = self(x) if x_hat is None else x_hat
        centered, fitted = (x - self.b_dec).double(), (x_hat - self.b_dec).double()
        return torch.stack([(fitted * centered).sum(), fitted.square().sum()])

    @torch.no_grad()
    def scale_encoder_(self, sums: Tensor) -> Self:
        """Scale the encoder by ⟨ĉ, c⟩ / ⟨ĉ, ĉ⟩, given both; see `fit_scale_`."""
        dot, sq = sums.tolist()
        if not (math.isfinite(dot) and math.isfinite(sq)):
            raise ValueError(f"x and its reconstruction must be finite, got the sums {dot}, {sq}")
        scale = dot / sq if sq > 0 and dot > 0 else 1.0
        self.W_enc.mul_(scale)
        if self.b_enc is not None:
            self.b_enc.mul_(scale)
        return self

    def extra_repr(self) -> str:
        bias = self.b_enc is not None
        return f"d_in={self.d_in}, n_latents={self.n_latents}, k={self.k}, bias={bias}"
