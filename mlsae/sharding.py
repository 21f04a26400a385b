"""A TopK SAE whose latents are shared out among processes.

Each of S processes holds a contiguous part of the rows of W_enc and W_dec, with their gradients
and optimizer state, and sees all tokens. A token then costs each process, whatever M is:

    K values sent and received, to find the K largest of all shards
    1 count received, of how many of its own are among them
    D values summed over the processes, for the reconstruction (and D more for AuxK's)

Legend: N tokens, D inputs, M latents, K active latents a token, S shards.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from sparse_topk import SparseTopKSAE, TopK, encode, topk_sae

from .distributed import Group, splits


class Selection:
    """The `sparse_topk.Shards` of a group of processes: the k largest of all their candidates.

    The order is that of an unsharded SAE: by value, NaN first, equal ones by the latent's id,
    since the shards are in the order of the ids. Candidates that are 0 contribute nothing, and
    which of them are taken is left open.
    """

    def __init__(self, group: Group, k: int) -> None:
        self.group, self.k = group, k

    def keep(self, values: Tensor) -> Tensor:
        """This shard's candidates (N, K_s), 0 ≤ values or NaN, K_s ≤ k, with 0 for those that are
        not among the k largest of all shards.

        The tokens are shared out: a process gets the candidates of all shards at N / S of the
        tokens, in order of value, and tells each shard how many of its first ones are taken.
        """
        n, own = values.shape
        size, k = self.group.size, self.k
        if n == 0:
            return values
        ranked, order = values.sort(dim=1, descending=True, stable=True)
        part = math.ceil(n / size)  # tokens a process decides on
        offers = F.pad(ranked, (0, k - own, 0, part * size - n)).view(size, part, k)
        candidates = self.group.all_to_all(offers).transpose(0, 1).flatten(1)  # (N/S, S·K)
        best = candidates.sort(dim=1, descending=True, stable=True).indices[:, :k]
        shards = torch.arange(size, device=values.device)
        taken = (best[:, :, None] // k == shards).sum(1, dtype=torch.int32)  # (N/S, S)
        mine = self.group.all_to_all(taken.T.contiguous()).flatten()[:n]  # (N,)
        kept = torch.arange(own, device=values.device) < mine[:, None]
        return torch.zeros_like(values).scatter(1, order, ranked.where(kept, 0))

    def sum(self, partial: Tensor) -> Tensor:
        """Σ over the shards, summed in float32 at least."""
        dtype = torch.promote_types(partial.dtype, torch.float32)
        return self.group.sum_(partial.to(dtype)).to(partial.dtype)


class ShardedSAE(SparseTopKSAE):
    """A `SparseTopKSAE` of `n_latents` latents, of which this process holds a part:

        sae = ShardedSAE(d_in, n_latents, k, group)
        x_hat, codes = sae.reconstruct(x)  # the same x in every process, and so the same x_hat

    W_enc and W_dec (M/S, D) are rows `sae.rows` of those that a `SparseTopKSAE` draws from the
    same seed; b_dec (D,) is the same in all processes. The codes are this shard's own, as numbers
    of its rows, with value 0 where another shard's were larger. Gradients are complete.
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
        """This shard's candidates, (…, min(K, M/S)): no other shard is asked."""
        return encode(x - self.b_dec, self.W_enc, None, min(self.k, len(self.W_enc)))

    def reconstruct(self, x: Tensor) -> tuple[Tensor, TopK]:
        """x̂ (…, D), and this shard's part of the active latents (…, min(K, M/S))."""
        k = min(self.k, len(self.W_enc))
        selection = Selection(self.group, self.k)
        return topk_sae(x, self.W_enc, None, self.W_dec, self.b_dec, k, selection)

    def among(self, x: Tensor, latents: Tensor, k: int) -> Tensor:
        """x̂ without b_dec (…, D) from the k largest of some latents: `latents` (Q,) are this
        shard's of them, as numbers of its rows. Other shards may have more of them, or none."""
        W_enc, W_dec = self.W_enc[latents], self.W_dec[latents]
        if not len(latents):  # a row that is never active, to take part
            W_enc = W_dec = torch.zeros_like(self.W_enc[:1])
        k_here = min(k, len(W_enc))
        return topk_sae(x, W_enc, None, W_dec, None, k_here, Selection(self.group, k))[0]

    def total_norm(self, grads: list[Tensor]) -> Tensor:
        """The norm of all gradients of all shards together. A vector's is the same in all."""
        sq = get_total_norm([g for g in grads if g.ndim == 2]).square()
        whole = get_total_norm([g for g in grads if g.ndim == 1]).square()
        return (self.group.sum_(sq) + whole).sqrt()

    def whole(self, part: Tensor) -> Tensor:
        """What all shards hold of something with a row a latent, (M, …), on the CPU of the first;
        the others get their own part back. All must call it."""
        parts = splits(self.n_latents, self.group.size)
        return self.group.collect_on_rank0(part, [rows.stop - rows.start for rows in parts])
