"""One pass of an MLSAE over a text: everything that an analysis counts.

Legend: L layers, R rows, T positions, N tokens, D width of the residual stream, M latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.stream import DataStream
from ..model import MLSAE
from .accumulate import Accumulator, Adjacent
from .examples import Examples
from .flow import Flow, FlowCounts
from .layer_spread import LayerSums, ReleasedSums
from .parquet import TokenText

_CENTER_TOKENS = 4096  # from which the mean residual is estimated, to 1/64 of the deviation


class Collected(NamedTuple):
    """The counts of a pass over a text, on the CPU."""

    counts: Tensor
    """(M, L) tokens at which a latent is active."""
    max: Tensor
    """(M,) the largest activation of each latent."""
    whole: LayerSums
    """Sums over the text, as one group."""
    grouped: LayerSums
    """Sums over each group of rows that the bootstrap draws."""
    rows: ReleasedSums
    adjacent: Adjacent
    flow: Flow | None
    """None if there is a single layer."""
    examples: Examples | None


@torch.inference_mode()
def collect(
    mlsae: MLSAE, stream: DataStream, text: TokenText, groups: int, n_examples: int
) -> Collected:
    """Read the rows of `text`, without special and dropped tokens, a few rows at a time.

    Rows are counted in `groups` groups; `n_examples` examples of each kind are kept per latent and
    layer.
    """
    device, n_latents, n_layers = stream.device, mlsae.config.n_latents, len(stream.reader.layers)
    input_ids, token_mask = text.input_ids, text.token_mask
    accumulator = Accumulator(n_latents, n_layers, len(input_ids), groups, device)
    adjacent = Adjacent(_mean_residual(stream, input_ids))
    examples = (
        Examples(n_latents, n_layers, n_examples, stream.seed, device) if n_examples else None
    )
    n_tokens = int(token_mask.sum())
    flow = FlowCounts(n_latents, n_layers, n_tokens, device) if n_layers > 1 else None
    places = torch.arange(input_ids.numel()).view_as(input_ids)
    bar = tqdm(total=input_ids.numel(), unit=" tokens", unit_scale=True, desc="analyzing")
    with bar:
        for start in range(0, len(input_ids), stream.micro_rows):
            rows = slice(start, start + stream.micro_rows)
            keep = token_mask[rows].to(device)
            x = stream.reader(input_ids[rows].to(device))[:, keep].float()  # (L, N, D)
            codes = mlsae.encode(x, stream.reader.layers)
            place = places[rows][token_mask[rows]]
            accumulator.update(codes, (place // input_ids.shape[1]).to(device))
            adjacent.update(x)
            if flow:
                flow.update(codes)
            if examples:
                examples.update(codes, text.segment[place].to(device), place.to(device))
            bar.update(input_ids[rows].numel())
    whole, grouped, row_sums = accumulator.finish()
    counts = accumulator.counts.view(n_latents, n_layers)
    return Collected(
        counts.cpu(), accumulator.max.cpu(), whole, grouped, row_sums, adjacent,
        flow.finish(counts) if flow else None, examples,
    )  # fmt: skip


def _mean_residual(stream: DataStream, input_ids: Tensor) -> Tensor:
    """The mean residual of each layer over the first rows, (L, D)."""
    first = input_ids[: max(1, _CENTER_TOKENS // stream.seq_len)]
    return torch.cat(list(stream.residuals(first)), 1).mean(1)
