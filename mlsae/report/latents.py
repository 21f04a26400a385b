"""What the browser of latents holds: numbers of each latent, and examples while they fit.

Legend: L layers, M latents, E examples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray

from .pack import number, pack_json
from .run_data import Analysis

Integers = NDArray[np.int64]

SHARD = 64
"""Latents whose examples are unpacked together."""
KINDS = ("top", "q4", "q3", "q2", "q1")
NUMBERS = (
    "tokens_active", "frequency", "mean_layer", "std_layer", "var_layer", "var_within_token",
    "entropy", "n_layers", "mean_layer_totals", "entropy_totals", "max_activation", "nearest",
    "nearest_cosine", "encoder_cosine",
)  # fmt: skip
_TABLE_BYTES = 4_000_000  # of the page, for the numbers
_DEPTHS = (1000, 100, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
_SAMPLED = 12  # shards that stand for all when a depth is chosen
_PEAKS = 4  # tokens that stand for a latent in the list


class Browser(NamedTuple):
    """What is packed into the page, and what it says of itself."""

    packed: dict[str, str]
    """"latents", and "examples-0", … : a shard of `SHARD` latents each, in the same order."""
    listed: int
    """Latents in the list: those that were active, the most frequent first."""
    active: int
    reached: int
    """Latents, from the first of the list, that the examples in the page are of."""
    examples: int
    """Examples in the page."""
    examples_in_all: int
    depth: int | None
    """Examples a latent has at most, or None where all are there."""


def browser(analysis: Analysis, budget: int) -> Browser:
    """The data of the browser in at most `budget` bytes of the page.

    Numbers go before examples. Where not all examples fit, every latent keeps its first few: the
    strongest at any layer, then the strongest of each other layer, then the strongest of each
    quantile band, then the seconds of each, and so on.
    """
    table = analysis.latents
    tokens_active = table["tokens_active"].to_numpy()
    active = np.flatnonzero(tokens_active)
    rows = active[np.argsort(-tokens_active[active], kind="stable")]  # of the table
    order = _Order(analysis, table["latent"].to_numpy()[rows])
    listed = len(rows)
    most = min(_TABLE_BYTES, budget)
    while len(packed := pack_json(_columns(analysis, rows[:listed], order))) > most and listed:
        listed //= 2
    shards, depth = _shards(order, -(-listed // SHARD), budget - len(packed))
    reached = min(listed, SHARD * len(shards))
    within = (order.place < reached) & (order.depth < depth)
    return Browser(
        {"latents": packed} | {f"examples-{i}": shard for i, shard in enumerate(shards)},
        listed,
        len(active),
        reached,
        int(within.sum()),
        len(order.place),
        None if within.all() else depth,
    )


class _Order:
    """Every example's latent by its place in the list, and its rank among that latent's."""

    def __init__(self, analysis: Analysis, listed: Integers) -> None:
        # In one piece: rows are taken from it hundreds of times.
        self.table = pyarrow.parquet.read_table(analysis.examples).combine_chunks()
        latent = self.table["latent"].to_numpy()
        layer = self.table["layer"].to_numpy()
        strength = -self.table["activation"].to_numpy()
        kinds = self.table["kind"].cast(pyarrow.string())
        kind = pyarrow.compute.index_in(kinds, pyarrow.array(KINDS)).to_numpy()
        place = np.full(max(latent.max(initial=0), listed.max(initial=0)) + 1, len(listed))
        place[listed] = np.arange(len(listed))
        self.place: Integers = place[latent]
        """(E,) of each example's latent in the list."""
        in_group = _ranks(np.lexsort((strength, kind, layer, latent)), latent, layer, kind)
        order = np.lexsort((strength, kind, in_group, self.place))
        self.depth: Integers = _ranks(order, self.place)
        """(E,) of each example among its latent's."""
        self.order: Integers = order
        self.starts = np.searchsorted(self.place[order], np.arange(len(listed) + 1))

    def shard(self, index: int, depth: int) -> dict[str, Any]:
        """`depth` examples of each latent in a shard, as columns; `ends` says whose they are."""
        first, last = index * SHARD, min((index + 1) * SHARD, len(self.starts) - 1)
        span = self.order[self.starts[first] : self.starts[last]]
        span = span[self.depth[span] < depth]
        rows = self.table.take(pyarrow.array(span))
        counts = np.bincount(self.place[span] - first, minlength=last - first)
        activations = rows["activations"].to_pylist()
        return {
            "ends": counts.cumsum().tolist(),
            "layer": rows["layer"].to_pylist(),
            "kind": rows["kind"].to_pylist(),
            "activation": [number(value) for value in rows["activation"].to_pylist()],
            "position": rows["position"].to_pylist(),
            "document": rows["document"].to_pylist(),
            "tokens": rows["tokens"].to_pylist(),
            "activations": [[round(value, 2) for value in row] for row in activations],
        }

    def peaks(self, n_latents: int) -> list[list[str]]:
        """The tokens at which each of the first latents is most active: at most `_PEAKS`."""
        chosen = self.order[: self.starts[n_latents]]
        chosen = chosen[self.depth[chosen] < 4 * _PEAKS]
        if not len(chosen):
            return [[] for _ in range(n_latents)]
        rows = self.table.select(["tokens", "position"]).take(pyarrow.array(chosen))
        tokens = rows["tokens"].combine_chunks()
        at = tokens.offsets.to_numpy()[:-1] + rows["position"].to_numpy()
        strings = tokens.values.take(pyarrow.array(at)).to_pylist()
        found: list[dict[str, None]] = [{} for _ in range(n_latents)]
        for place, token in zip(self.place[chosen].tolist(), strings, strict=True):
            if len(found[place]) < _PEAKS:
                found[place].setdefault(token)
        return [list(words) for words in found]


def _ranks(order: Integers, *keys: Integers) -> Integers:
    """The rank of each element among those of equal keys, where `order` sorts them together."""
    new = np.ones(len(order), dtype=bool)
    for i, key in enumerate(keys):
        differs = np.diff(key[order]) != 0
        new[1:] = differs if i == 0 else new[1:] | differs
    index = np.arange(len(order))
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = index - np.maximum.accumulate(np.where(new, index, 0))
    return ranks


def _columns(analysis: Analysis, rows: Integers, order: _Order) -> dict[str, Any]:
    """The numbers of the latents at `rows` of the table, as columns; shares in thousandths."""
    table = analysis.latents.take(pyarrow.array(rows))
    ids = table["latent"].to_numpy()
    totals = analysis.totals.numpy()[ids]
    with np.errstate(invalid="ignore"):
        summed = totals / totals.sum(1, keepdims=True)
    shares = {"profile": analysis.profile.numpy()[ids], "profile_totals": summed}
    return {
        "layers": analysis.about["layers"],
        "n_latents": analysis.latents.num_rows,
        "shard": SHARD,
        "latent": ids.tolist(),
        **{name: [number(x) for x in table[name].to_pylist()] for name in NUMBERS},
        **{
            name: np.rint(1000 * np.nan_to_num(share)).astype(int).ravel().tolist()
            for name, share in shares.items()
        },
        "peaks": order.peaks(len(rows)),
        "tokens_in": table["tokens_in"].to_pylist(),
        "tokens_out": table["tokens_out"].to_pylist(),
    }


def _shards(order: _Order, n_shards: int, budget: int) -> tuple[list[str], int]:
    """Packed shards within the budget, and the depth of them."""
    sample = range(0, n_shards, max(1, n_shards // _SAMPLED))
    longest = int(order.depth.max(initial=0)) + 1
    for depth in (longest, *(depth for depth in _DEPTHS if depth < longest)):
        size = sum(len(pack_json(order.shard(i, depth))) for i in sample) / max(1, len(sample))
        if size * n_shards <= 0.93 * budget:
            break
    shards: list[str] = []
    left = budget
    for i in range(n_shards):
        left -= len(shard := pack_json(order.shard(i, depth))) + 100  # its element in the page
        if left < 0:
            break
        shards.append(shard)
    return shards, depth
