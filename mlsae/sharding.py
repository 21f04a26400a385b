"""A TopK SAE whose latents are split among processes.

Each of S processes holds a contiguous part of the rows of W_enc and W_dec, with their gradients
and optimizer state, and sees all tokens. Per token, each process communicates, whatever M is:

    K values sent and received, to find the K largest of all shards
    1 count received: how many of its own candidates are among them
    D values summed over the processes, for the reconstruction (and D more for AuxK's)

Legend: N tokens, D inputs, M latents, K active latents per token, S shards; "…" any leading shape.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from sparse_topk import SAEOutput, SparseTopKSAE, TopK, topk_encode, topk_sae

from .distributed import Group, splits


class Selection:
    """The `sparse_topk.Shards` of a group of processes: the k largest of all their candidates.

    The order is that of an unsharded SAE: by value, NaN first, and equal values by the latent's id,
    since the shards are in the order of the ids. Candidates that are 0 contribute nothing, so
    which of them are taken is left open.
    """

    def __init__(self, group: Group, k: int) -> None:
        self.group, self.k = group, k

    def keep(self, values: Tensor) -> Tensor:
        """This shard's candidates (N, K_s), 0 ≤ values or NaN, K_s ≤ k, with 0 for those that are
        not among the k largest of all shards.

        The work is split by tokens: a process receives the candidates of all shards for N / S of
        the tokens, in order of value, and tells each shard how many of its first ones are taken.
        """
        n, n_candidates = values.shape
        size, k = self.group.size, self.k
        if n == 0:
            return values
        ranked, order = values.sort(dim=1, descending=True, stable=True)
        n_part = math.ceil(n / size)  # tokens that one process decides on
        offers = F.pad(ranked, (0, k - n_candidates, 0, n_part * size - n)).view(size, n_part, k)
        candidates = self.group.all_to_all(offers).transpose(0, 1).flatten(1)  # (N/S, S·K)
        best = candidates.sort(dim=1, descending=True, stable=True).indices[:, :k]
        shards = torch.arange(size, device=values.device)
        taken = (best[:, :, None] // k == shards).sum(1, dtype=torch.int32)  # (N/S, S)
        n_kept = self.group.all_to_all(taken.T.contiguous()).flatten()[:n]  # (N,)
        kept = torch.arange(n_candidates, device=values.device) < n_kept[:, None]
        return torch.zeros_like(values).scatter(1, order, ranked.where(kept, 0))

    def sum(self, partial: Tensor) -> Tensor:
        """Σ over the shards, summed in float32 at least."""
        dtype = torch.promote_types(partial.dtype, torch.float32)
        return self.group.sum_(partial.to(dtype)).to(partial.dtype)


class ShardedSAE(SparseTopKSAE):
    """A `SparseTopKSAE` of `n_latents` latents, of which this process holds a part:

        sae = ShardedSAE(d_in, n_latents, k, group)
        out = sae.reconstruct(x)  # the same x in every process, and so the same out.x_hat

    W_enc and W_dec (M/S, D) are rows `sae.rows` of those that a `SparseTopKSAE` draws from the
    same seed; b_dec (D,) is the same in all processes. The codes are this shard's own: indices
    count its rows, and the value is 0 if other shards' were larger. Gradients are complete.
    """

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        k: int,
        group: Group,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(d_in, n_latents, k, bias=False, device="meta")
        self.group = group
        self.rows = splits(n_latents, group.size)[group.rank]
        # Drawn whole, so that the weights do not depend on the number of shards.
        drawn = torch.randn(n_latents, d_in, device=device)[self.rows]
        self.W_enc = nn.Parameter(F.normalize(drawn, dim=1))
        self.W_dec = nn.Parameter(self.W_enc.detach().clone())
        self.b_dec = nn.Parameter(torch.zeros_like(self.W_dec[0]))

    def encode(self, x: Tensor) -> TopK:
        """This shard's candidates, (…, min(K, M/S)); no other shard is asked."""
        return topk_encode(x - self.b_dec, self.W_enc, None, min(self.k, len(self.W_enc)))

    def reconstruct(self, x: Tensor) -> SAEOutput:
        """x̂ (…, D), and this shard's part of the active latents (…, min(K, M/S)). Collective: every
        shard must call it."""
        k = min(self.k, len(self.W_enc))
        selection = Selection(self.group, self.k)
        return topk_sae(x, self.W_enc, None, self.W_dec, self.b_dec, k, selection)

    def sum_over_rows(self, partial: Tensor) -> Tensor:
        """Add up, in place, what each shard has summed over its rows. Collective: every shard must
        call it."""
        return self.group.sum_(partial)

    def total_norm(self, grads: list[Tensor]) -> Tensor:
        """The norm of the gradients of all shards together. A vector's gradient is the same in all
        of them, and counts once. Collective: every shard must call it."""
        sq = get_total_norm([g for g in grads if g.ndim == 2]).square()
        replicated = get_total_norm([g for g in grads if g.ndim == 1]).square()
        return (self.group.sum_(sq) + replicated).sqrt()

    def gather_rows(self, part: Tensor) -> Tensor:
        """All shards' rows (M, …) of a tensor with one row per latent, of which this shard holds
        `part` (M/S, …). Collective: every shard must call it; only rank 0 receives all rows, on
        the CPU, and the others get `part` back."""
        parts = splits(self.n_latents, self.group.size)
        return self.group.collect_on_rank0(part, [rows.stop - rows.start for rows in parts])

    def own_rows(self, whole: Tensor) -> Tensor:
        """A copy of this shard's rows (M/S, …) of `whole` (M, …), which has one row per latent."""
        return whole[self.rows].clone()
