"""Which directions the decoder's rows are close to: one another's, the encoder's, the embeddings'.

Legend: M latents, D width of the residual stream, V vocabulary, n nearest tokens, E edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_COSINES_ELEMENTS = 2**24  # computed at a time: 64 MB
_BINS = 200
_GRID = 20_001  # points of [−1, 1] on which the density of random cosines is summed
_NEAREST_TOKENS = 5


class Neighbors(NamedTuple):
    """Cosines between different rows of a matrix (M, D)."""

    nearest: Tensor
    """(M,) for each row, the other row of the largest cosine."""
    cosine: Tensor
    """(M,) that cosine. Its mean is MMCS: mean_i max_{j ≠ i} cos(W_i, W_j), over all ordered pairs
    (the paper's released code compares half of them)."""
    edges: Tensor
    """(E,) edges of the histogram's bins, over [−1, 1]."""
    share: Tensor
    """(E − 1,) the share of the pairs i ≠ j in each bin."""


def neighbors(W: Tensor) -> Neighbors:
    """The `Neighbors` of the rows of W (M, D), computed for a few rows against all at a time.

    Raises ValueError if M < 2.
    """
    n = len(W)
    if n < 2:
        raise ValueError(f"W must have at least 2 rows, got {n}")
    unit = F.normalize(W.float(), dim=1)
    counts = torch.zeros(_BINS, dtype=torch.float64)
    chunk = max(1, _COSINES_ELEMENTS // n)
    largest = []
    for start in range(0, n, chunk):
        cosines = unit[start : start + chunk] @ unit.T
        row = torch.arange(len(cosines), device=W.device)
        cosines[row, start + row] = -torch.inf  # of a row and itself
        largest.append(cosines.max(1))
        cosines.clamp_(-1, 1)  # rounding goes past the ends
        cosines[row, start + row] = 2  # outside the histogram
        counts += torch.histc(cosines, _BINS, -1, 1).cpu().double()
    edges = torch.linspace(-1, 1, _BINS + 1, dtype=torch.float64)
    return Neighbors(
        nearest=torch.cat([x.indices for x in largest]),
        cosine=torch.cat([x.values for x in largest]),
        edges=edges,
        share=counts / counts.sum(),
    )


def random_cosines(edges: Tensor, d_in: int, n: int) -> tuple[Tensor, float]:
    """The control for `neighbors`: n independent random directions in D = `d_in` ≥ 3 dimensions.

    Returns the share of pairs in each bin, (E − 1,), and the expected largest cosine of one
    direction to the others (MMCS). Nothing is drawn: the density of a cosine is
    ∝ (1 − x²)^((D − 3) / 2), its distribution function C is summed on a grid, and the largest of
    the n − 1 cosines to one direction, which are independent, has the distribution function
    C^(n − 1).
    """
    x = torch.linspace(-1, 1, _GRID, dtype=torch.float64)
    middle = (x[1:] + x[:-1]) / 2
    density = ((1 - middle.square()).log() * ((d_in - 3) / 2)).exp()
    below = F.pad((density / density.sum()).cumsum(0), (1, 0))
    index = ((edges + 1) / 2 * (_GRID - 1)).round().long()
    largest = below.pow(n - 1)
    return below[index].diff(), (largest.diff() * middle).sum().item()


class NearestTokens(NamedTuple):
    """The vocabulary's tokens nearest to each latent."""

    tokens: Tensor
    """(M, n) ids, the nearest first."""
    cosine: Tensor
    """(M, n)."""


def nearest_tokens(W: Tensor, embedding: Tensor, n: int) -> NearestTokens:
    """The n embeddings (V, D) of the largest cosine to each row of W (M, D).

    The embeddings are centered: cos(W_j, E_v − mean_v E_v). Their mean does not distinguish tokens;
    at the output it adds the same number to every logit, which softmax ignores.
    """
    E = embedding.float()
    E = F.normalize(E - E.mean(0), dim=1)
    unit = F.normalize(W.float(), dim=1)
    largest = [
        (rows @ E.T).topk(min(n, len(E)))
        for rows in unit.split(max(1, _COSINES_ELEMENTS // len(E)))
    ]
    return NearestTokens(
        tokens=torch.cat([x.indices for x in largest]),
        cosine=torch.cat([x.values for x in largest]),
    )


class Directions(NamedTuple):
    """What the decoder's rows are close to."""

    neighbors: Neighbors
    random_share: Tensor
    """(E − 1,) the share of pairs of random directions in each bin of `neighbors`."""
    random_mmcs: float
    tokens: dict[str, NearestTokens | None]
    """By `embeddings_of`: None where the model has no such embedding."""
    encoder_cosine: Tensor
    """(M,) cosine of each latent's decoder and encoder rows."""

    def as_dict(self) -> dict[str, Any]:
        """Averages and histograms, JSON-serializable. MMCS is of the weights, not of a text, so it
        has no interval."""
        near = self.neighbors
        return {
            "mmcs": {
                "value": near.cosine.mean().item(),
                "low": None,
                "high": None,
                "random": self.random_mmcs,
            },
            "cosine_histogram": {
                "edges": near.edges.tolist(),
                "decoder": near.share.tolist(),
                "random": self.random_share.tolist(),
            },
            "embeddings": {
                side: None if nearest is None else nearest.cosine[:, 0].mean().item()
                for side, nearest in self.tokens.items()
            },
        }


def compute_directions(
    W_dec: Tensor, W_enc: Tensor, transformer: Any, n_tokens: int, in_last_basis: bool = False
) -> Directions:
    """The `Directions` of the SAE with weights (M, D), on a transformer whose tokenizer has
    `n_tokens` tokens. With a lens, its rows are `in_last_basis`, that of the last layer's residual
    and of the output embeddings, and no lens carries the input embeddings there: they have none.
    """
    n_latents, d_in = W_dec.shape
    near = neighbors(W_dec)
    random_share, random_mmcs = random_cosines(near.edges, d_in, n_latents)
    embeddings = embeddings_of(transformer, d_in, n_tokens)
    if in_last_basis:
        embeddings["in"] = None
    tokens = {
        side: None if weight is None else nearest_tokens(W_dec, weight, _NEAREST_TOKENS)
        for side, weight in embeddings.items()
    }
    cosine = F.cosine_similarity(W_enc, W_dec, dim=1)
    return Directions(near, random_share, random_mmcs, tokens, cosine)


def embeddings_of(model: Any, d_in: int, n_tokens: int) -> dict[str, Tensor | None]:
    """The input ("in") and output ("out") embeddings (V, D) of the tokenizer's `n_tokens` tokens.

    None if the model has no such embedding, or its width is not the residual stream's, `d_in`.
    """
    embeddings: dict[str, Tensor | None] = {}
    for name, module in (
        ("in", model.get_input_embeddings()),
        ("out", model.get_output_embeddings()),
    ):
        weight: Tensor | None = getattr(module, "weight", None)
        embeddings[name] = None if weight is None or weight.shape[1] != d_in else weight[:n_tokens]
    return embeddings


def token_strings(tokenizer: Any, ids: Sequence[int] | None = None) -> list[str]:
    """The text of each of the tokens `ids` (None: of the vocabulary), with its spaces and line
    ends; "�" stands for part of a character."""
    ids = range(len(tokenizer)) if ids is None else ids
    strings = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        # SentencePiece tokenizers drop the space at the start of a token that is decoded alone.
        " " + text if (name or "").startswith("▁") and not text.startswith(" ") else text
        for text, name in zip(strings, names, strict=True)
    ]
