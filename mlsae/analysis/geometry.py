"""What the decoder's rows point at: one another, the encoder's, and the vocabulary.

Legend: M latents, D width of the residual stream, V vocabulary, n nearest tokens, E edges.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_COSINES_ELEMENTS = 2**24  # computed at a time: 64 MB
_BINS = 200
_GRID = 20_001  # points of [−1, 1] on which the density of random cosines is summed


class Neighbors(NamedTuple):
    """Cosines between different rows of a matrix (M, D)."""

    nearest: Tensor
    """(M,) the other row of the largest cosine."""
    cosine: Tensor
    """(M,) that cosine. Its mean is MMCS: mean_i max_{j ≠ i} cos(W_i, W_j), over all ordered pairs
    (the paper's released code compares half of them)."""
    edges: Tensor
    """(E,) of the bins of the histogram, over [−1, 1]."""
    share: Tensor
    """(E − 1,) share of the pairs i ≠ j in each bin."""


def neighbors(W: Tensor) -> Neighbors:
    """See `Neighbors`; W (M, D), a few rows against all at a time.

    Raises ValueError if M < 2.
    """
    n = len(W)
    if n < 2:
        raise ValueError(f"W must have at least 2 rows, got {n}")
    unit = F.normalize(W.float(), dim=1)
    counts = torch.zeros(_BINS, dtype=torch.float64)
    at_a_time = max(1, _COSINES_ELEMENTS // n)
    best, nearest = [], []
    for start in range(0, n, at_a_time):
        cosines = unit[start : start + at_a_time] @ unit.T
        itself = torch.arange(len(cosines), device=W.device)
        cosines[itself, start + itself] = -torch.inf
        some = cosines.max(1)
        best.append(some.values)
        nearest.append(some.indices)
        cosines.clamp_(-1, 1)  # rounding goes past the ends
        cosines[itself, start + itself] = 2  # outside the histogram
        counts += torch.histc(cosines, _BINS, -1, 1).cpu().double()
    edges = torch.linspace(-1, 1, _BINS + 1, dtype=torch.float64)
    return Neighbors(torch.cat(nearest), torch.cat(best), edges, counts / counts.sum())


def random_cosines(edges: Tensor, d_in: int, n: int) -> tuple[Tensor, float]:
    """The control: of n independent random directions in `d_in` dimensions, the share of pairs in
    each bin (E − 1,), and the expected largest cosine of one of them to the others (MMCS).

    The density of one cosine is ∝ (1 − x²)^((D − 3) / 2), with distribution function C; the
    largest of n − 1 has C^(n − 1), as they are independent given the one. So nothing needs to be
    drawn: C is summed on a grid. D must be at least 3.
    """
    x = torch.linspace(-1, 1, _GRID, dtype=torch.float64)
    middle = (x[1:] + x[:-1]) / 2
    density = ((1 - middle.square()).log() * ((d_in - 3) / 2)).exp()
    below = F.pad((density / density.sum()).cumsum(0), (1, 0))
    index = ((edges + 1) / 2 * (_GRID - 1)).round().long()
    largest = below.pow(n - 1)
    return below[index].diff(), (largest.diff() * middle).sum().item()


class Nearest(NamedTuple):
    """The vocabulary's tokens nearest to each latent."""

    tokens: Tensor
    """(M, n) ids, the nearest first."""
    cosine: Tensor
    """(M, n)."""


def nearest_tokens(W: Tensor, embedding: Tensor, n: int) -> Nearest:
    """The n embeddings (V, D) of the largest cosine to each row of W (M, D).

    The embeddings are centered: cos(W_j, E_v − mean_v E_v). What all of them share tells no token
    from another; at the output it adds the same number to every logit, which softmax ignores.
    """
    E = embedding.float()
    E = F.normalize(E - E.mean(0), dim=1)
    unit = F.normalize(W.float(), dim=1)
    found = [
        (part @ E.T).topk(min(n, len(E)))
        for part in unit.split(max(1, _COSINES_ELEMENTS // len(E)))
    ]
    return Nearest(torch.cat([x.indices for x in found]), torch.cat([x.values for x in found]))


def embeddings_of(model: Any, d_in: int, n_tokens: int) -> dict[str, Tensor | None]:
    """The input and the output embedding (V, D) of the tokenizer's `n_tokens` tokens; None where
    the model has none, or one of another width than the residual stream."""
    found: dict[str, Tensor | None] = {}
    for name, module in (
        ("in", model.get_input_embeddings()),
        ("out", model.get_output_embeddings()),
    ):
        weight: Tensor | None = getattr(module, "weight", None)
        found[name] = None if weight is None or weight.shape[1] != d_in else weight[:n_tokens]
    return found


def token_strings(tokenizer: Any) -> list[str]:
    """What each token of the vocabulary reads as, spaces and line ends kept; "�" for part of a
    character."""
    ids = range(len(tokenizer))
    strings = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        # Tokenizers of SentencePiece drop the space that a word of its own begins with.
        " " + text if (piece or "").startswith("▁") and not text.startswith(" ") else text
        for text, piece in zip(strings, pieces, strict=True)
    ]
