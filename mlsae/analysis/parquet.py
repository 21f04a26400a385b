"""The Parquet tables of an analysis: a row a latent, and a row an example.

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
from .examples import AFTER, BEFORE, Examples, Some
from .geometry import Nearest, Neighbors
from .layer_spread import LayerSums

_LATENTS_AT_ONCE = 2048  # in a row group of the examples: memory holds one
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


class Text:
    """The rows input_ids (R, T) that were analyzed, as examples quote them.

    A piece is what lies between two special tokens of a row: the whole of a document, or the part
    of it that a row has. Pieces are numbered in the order of the text.
    """

    def __init__(self, input_ids: Tensor, token_mask: Tensor, strings: list[str]) -> None:
        ends = ~token_mask
        ends[:, 0] = True  # a row never goes on from the one before
        self.ids = input_ids.flatten().numpy()
        self.strings = np.array(strings, dtype=object)
        self.piece = ends.flatten().cumsum(0)  # (R · T,)
        self.token_mask = token_mask.flatten()

    def quotes(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """The window about each place (n,): places (n, W), and which of them are in its piece."""
        near = place[:, None] + torch.arange(-BEFORE, AFTER + 1)
        inside = (near >= 0) & (near < len(self.piece))
        near = near.clamp(0, len(self.piece) - 1)
        inside &= self.token_mask[near] & (self.piece[near] == self.piece[place][:, None])
        return near, inside

    def rows(self, some: Some, kinds: list[str]) -> pa.Table:
        """The rows of `EXAMPLES` of some latents; the i-th of a slot's examples is of kinds[i]."""
        latent, layer, rank = (some.score > -torch.inf).nonzero(as_tuple=True)
        place = some.place[latent, layer, rank]
        near, inside = self.quotes(place)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), inside.sum(1).cumsum(0)])
        offsets_array = pa.array(offsets.numpy().astype(np.int32))
        tokens = self.strings[self.ids[near[inside].numpy()]]
        window = some.window[latent, layer, rank][inside].float().numpy()
        kind = np.array(kinds, dtype=object)[rank.numpy()]
        columns = {
            "latent": some.first + latent.numpy(),
            "layer": layer.numpy(),
            "kind": kind,
            "activation": some.activation[latent, layer, rank].numpy(),
            "tokens": pa.ListArray.from_arrays(offsets_array, pa.array(tokens, pa.string())),
            "activations": pa.ListArray.from_arrays(offsets_array, pa.array(window, pa.float32())),
            "position": inside[:, :BEFORE].sum(1).numpy(),
            "document": self.piece[place].numpy(),
        }
        arrays = [
            x if isinstance(x, pa.ListArray) else pa.array(x, EXAMPLES.field(name).type)
            for name, x in columns.items()
        ]
        return pa.Table.from_arrays(arrays, schema=EXAMPLES)


def write_examples(path: Path, examples: Examples | None, text: Text) -> int:
    """Write `EXAMPLES` (empty without examples), and say how many rows it has.

    Kind "top": the highest activations of a slot. "q1" … "q4": from the lowest to the highest
    quarter of a uniform draw of the tokens where it is active.
    """
    aside = path.with_name(path.name + ".partial")
    n_rows = 0
    try:
        with pq.ParquetWriter(aside, EXAMPLES, compression="zstd") as writer:
            for top, drawn in examples.parts(_LATENTS_AT_ONCE) if examples else ():
                n = top.score.shape[-1]
                for some, kinds in (
                    (top, ["top"] * n),
                    (drawn, [f"q{1 + i * _QUARTERS // n}" for i in range(n)]),
                ):
                    rows = text.rows(some, kinds)
                    writer.write_table(rows)
                    n_rows += len(rows)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return n_rows


def latent_columns(
    sums: LayerSums, counts: Tensor, threshold: int, n_tokens: int
) -> dict[str, Tensor]:
    """Of each latent, (M,) each: how often and at which layers it is active, by the mean of its
    tokens' distributions, and, named `…_totals`, by its summed activation.

    `sums` has one group; counts (M, L). NaN where a latent is never active.
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


def direction_columns(
    near: Neighbors, tokens: dict[str, Nearest | None], strings: list[str]
) -> dict[str, Any]:
    """Of each latent's direction: the nearest other one, and the nearest tokens of the input and
    the output embedding; nulls where the model has no such embedding of the residual's width."""
    columns: dict[str, Any] = {"nearest": near.nearest.cpu(), "nearest_cosine": near.cosine.cpu()}
    for side, found in tokens.items():
        n = len(near.nearest)
        columns |= {f"cosine_{side}": pa.nulls(n, pa.float32())}
        columns |= {f"tokens_{side}": pa.nulls(n, pa.list_(pa.string()))}
        if found:
            columns[f"cosine_{side}"] = found.cosine[:, 0].cpu()
            ids = found.tokens.cpu().tolist()
            columns[f"tokens_{side}"] = [[strings[i] for i in row] for row in ids]
    return columns


def write_table(path: Path, columns: dict[str, Any]) -> None:
    """Write columns, tensors or lists, of one length as a Parquet file."""
    table = pa.table(
        {name: x.numpy() if isinstance(x, Tensor) else x for name, x in columns.items()}
    )
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    write_file(path, content.getvalue())
