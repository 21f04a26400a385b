"""The Parquet tables of an analysis: one row per latent, and one row per example.

Legend: L layers, M latents, n examples, R rows, T positions, W window.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..files import write_file
from ..metrics import mean_layer, normalized_entropy, var_layer
from .examples import AFTER, BEFORE, ExampleBatch, Examples
from .geometry import Directions
from .layer_spread import LayerSums

_LATENTS_PER_BATCH = 2048  # of the examples: memory holds one batch, a row group of the file
_QUARTERS = 4

EXAMPLES = pa.schema(
    {
        "latent": pa.int32(),
        "layer": pa.int16(),
        "kind": pa.string(),
        "activation": pa.float32(),
        "tokens": pa.list_(pa.string()),
        "activations": pa.list_(pa.float32()),
        "position": pa.int16(),
        "document": pa.int64(),
    }
)


class TokenText:
    """The analyzed rows input_ids (R, T) as text; `strings` is the text of each token id.

    A segment is what lies between two tokens of a row that token_mask (R, T) leaves out, special or
    dropped: a whole document, or a part of it. Segments are numbered in the order of the text.
    """

    def __init__(self, input_ids: Tensor, token_mask: Tensor, strings: list[str]) -> None:
        is_start = ~token_mask
        is_start[:, 0] = True  # a row never continues the one before
        self.input_ids, self.token_mask, self.strings = input_ids, token_mask, strings
        self.segment = is_start.flatten().cumsum(0)
        """(R · T,) the segment of each place, row · T + position."""
        self._kept = token_mask.flatten()
        self._tokens = np.array(strings, dtype=object)

    def windows(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """The windows around places (n,): their places (n, W), and which of them are in the
        segment."""
        near = place[:, None] + torch.arange(-BEFORE, AFTER + 1)
        inside = (near >= 0) & (near < len(self.segment))
        near = near.clamp(0, len(self.segment) - 1)
        inside &= self._kept[near] & (self.segment[near] == self.segment[place][:, None])
        return near, inside

    def example_rows(self, batch: ExampleBatch, kinds: list[str]) -> pa.Table:
        """Rows of `EXAMPLES`; the i-th example of each slot is of kind kinds[i]."""
        latent, layer, rank = (batch.score > -torch.inf).nonzero(as_tuple=True)
        place = batch.place[latent, layer, rank]
        near, inside = self.windows(place)
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), inside.sum(1).cumsum(0)])
        offsets = pa.array(ends.numpy().astype(np.int32))
        tokens = self._tokens[self.input_ids.flatten()[near[inside]].numpy()]
        activations = batch.window[latent, layer, rank][inside].float().numpy()
        columns = {
            "latent": batch.first + latent.numpy(),
            "layer": layer.numpy(),
            "kind": np.array(kinds, dtype=object)[rank.numpy()],
            "activation": batch.activation[latent, layer, rank].numpy(),
            "tokens": pa.ListArray.from_arrays(offsets, pa.array(tokens, pa.string())),
            "activations": pa.ListArray.from_arrays(offsets, pa.array(activations, pa.float32())),
            "position": inside[:, :BEFORE].sum(1).numpy(),
            "document": self.segment[place].numpy(),
        }
        arrays = [
            x if isinstance(x, pa.ListArray) else pa.array(x, EXAMPLES.field(name).type)
            for name, x in columns.items()
        ]
        return pa.Table.from_arrays(arrays, schema=EXAMPLES)


def write_examples(path: Path, examples: Examples | None, text: TokenText) -> int:
    """Write the table `EXAMPLES`, empty without `examples`: its number of rows.

    Kind "top": the highest activations of a slot. "q1" … "q4": from the lowest to the highest
    quarter of a uniform draw of the tokens where the latent is active.
    """
    aside = path.with_name(path.name + ".partial")
    n_rows = 0
    try:
        with pq.ParquetWriter(aside, EXAMPLES, compression="zstd") as writer:
            for top, drawn in examples.batches(_LATENTS_PER_BATCH) if examples else ():
                n = top.score.shape[-1]
                quarters = [f"q{1 + i * _QUARTERS // n}" for i in range(n)]
                for batch, kinds in ((top, ["top"] * n), (drawn, quarters)):
                    rows = text.example_rows(batch, kinds)
                    writer.write_table(rows)
                    n_rows += len(rows)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return n_rows


def activity_columns(
    sums: LayerSums, counts: Tensor, threshold: int, n_tokens: int
) -> dict[str, Tensor]:
    """How often and at which layers each latent is active, (M,) each.

    Layers are weighted by the mean of the tokens' distributions and, in the columns named
    `…_totals`, by summed activation. `sums` has one group; counts (M, L). NaN for a latent that is
    never active.
    """
    (profile,), (totals,), (within,) = sums
    active = profile.sum(1)
    by_profile, by_totals = (
        {
            "mean_layer": mean_layer(p),
            "var_layer": var_layer(p),
            "std_layer": var_layer(p).clamp_min(0).sqrt(),
            "entropy": normalized_entropy(p),
        }
        for p in (profile, totals)
    )
    return {
        "tokens_active": active.round().long(),
        "frequency": active.round() / n_tokens,
        "var_within_token": within / active,
        **by_profile,
        **{f"{name}_totals": values for name, values in by_totals.items()},
        "n_layers": (counts >= threshold).sum(1),
    }


def direction_columns(directions: Directions, strings: list[str]) -> dict[str, Any]:
    """For each latent, the cosine of its encoder row, the nearest other latent, and the nearest
    tokens of both embeddings; null where the model has no such embedding."""
    near = directions.neighbors
    columns: dict[str, Any] = {
        "encoder_cosine": directions.encoder_cosine.cpu(),
        "nearest": near.nearest.cpu(),
        "nearest_cosine": near.cosine.cpu(),
    }
    for side, nearest in directions.tokens.items():
        if nearest is None:
            columns[f"cosine_{side}"] = pa.nulls(len(near.nearest), pa.float32())
            columns[f"tokens_{side}"] = pa.nulls(len(near.nearest), pa.list_(pa.string()))
        else:
            ids = nearest.tokens.cpu().tolist()
            columns[f"cosine_{side}"] = nearest.cosine[:, 0].cpu()
            columns[f"tokens_{side}"] = [[strings[i] for i in row] for row in ids]
    return columns


def write_table(path: Path, columns: dict[str, Any]) -> None:
    """Write columns of one length, tensors or lists, as a Parquet file."""
    table = pa.table(
        {name: x.numpy() if isinstance(x, Tensor) else x for name, x in columns.items()}
    )
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    write_file(path, content.getvalue())
