"""The data of the page's browser of latents: metrics of each latent, and as many examples as fit.

Legend: L layers, M latents, E examples.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray

from ..errors import InputError, first_line
from .labels import Labels, shown_labels
from .pack import pack_json, rounded
from .run_data import Analysis
from .schema import FLOW_NUMBERS, LATENT_NUMBERS, MATCH_NUMBERS, check_example_values

Integers = NDArray[np.int64]

CHUNK = 64
"""Latents per chunk; the page unpacks the examples of a chunk together."""
KINDS = ("top", "q4", "q3", "q2", "q1")
_TABLE_BYTES = 4_000_000  # of the page, at most, for the metrics
_DEPTHS = (1000, 100, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
_SAMPLED = 12  # chunks from which the size of all is estimated when a depth is chosen
_PEAKS = 4  # tokens shown per latent in the list


class BrowserData(NamedTuple):
    """What is packed into the page, and the counts that the page states."""

    packed: dict[str, str]
    """By name: "latents", and "examples-0", "examples-1", …, each for `CHUNK` listed latents."""
    listed: int
    """Latents in the list: the active ones, the most frequent first."""
    active: int
    """Latents that were active at any token."""
    reached: int
    """Latents, from the top of the list, whose examples are in the page."""
    examples: int
    """Examples in the page."""
    total_examples: int
    """Examples that `mlsae.analyze` kept."""
    depth: int | None
    """Most examples per latent, or None if all are in the page."""


class BrowserTables:
    """The latents that were active, the most frequent first, and their examples: as JSON."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        tokens_active = analysis.latents["tokens_active"].to_numpy()
        self.active = np.flatnonzero(tokens_active)
        self.rows = self.active[np.argsort(-tokens_active[self.active], kind="stable")]
        """Of the table, in the list's order."""
        self.examples = _ExampleOrder(analysis, analysis.latents["latent"].to_numpy()[self.rows])

    def latents(self, labels: Labels, listed: int | None = None) -> dict[str, Any]:
        """The metrics of the first `listed` latents, or of all, as columns; and the labels of all
        latents that have one."""
        columns = _columns(self.analysis, self.rows[:listed], self.examples)
        return columns | {"labels": shown_labels(labels)}

    def chunk(self, index: int) -> dict[str, Any] | None:
        """The examples of chunk `index`, all of them; None if there is no such chunk."""
        is_there = 0 <= index * CHUNK < len(self.rows)
        return self.examples.chunk(index, sys.maxsize) if is_there else None


def browser_data(analysis: Analysis, labels: Labels, budget: int) -> BrowserData:
    """The data of the browser, in at most `budget` bytes of the page.

    Metrics have priority over examples. If not all examples fit, every latent keeps its first
    few, in this order: its strongest at any layer, the strongest at each other layer, the
    strongest of each quantile band, then the second of each of these, and so on.
    """
    tables = BrowserTables(analysis)
    examples, listed = tables.examples, len(tables.rows)
    limit = min(_TABLE_BYTES, budget)
    while len(packed := pack_json(tables.latents(labels, listed))) > limit and listed:
        listed //= 2
    chunks, depth = _chunks(examples, -(-listed // CHUNK), budget - len(packed))
    reached = min(listed, CHUNK * len(chunks))
    kept = (examples.place < reached) & (examples.depth < depth)
    return BrowserData(
        {"latents": packed} | {f"examples-{i}": chunk for i, chunk in enumerate(chunks)},
        listed,
        len(tables.active),
        reached,
        int(kept.sum()),
        len(examples.place),
        None if kept.all() else depth,
    )


class _ExampleOrder:
    """The examples, sorted by their latent's place in the list and their rank in that latent."""

    def __init__(self, analysis: Analysis, listed: Integers) -> None:
        try:
            table = pyarrow.parquet.read_table(analysis.examples)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise InputError(
                f"{analysis.examples} cannot be read: {first_line(error)}; measure it again with "
                "mlsae.analyze"
            ) from error
        self.table = table.combine_chunks()  # since rows are taken from it hundreds of times
        check_example_values(self.table, analysis.latents.num_rows, str(analysis.examples))
        latent = self.table["latent"].to_numpy()
        layer = self.table["layer"].to_numpy()
        activation = self.table["activation"].to_numpy()
        kinds = self.table["kind"].cast(pyarrow.string())
        kind = pyarrow.compute.index_in(kinds, pyarrow.array(KINDS)).to_numpy()
        place = np.full(max(latent.max(initial=0), listed.max(initial=0)) + 1, len(listed))
        place[listed] = np.arange(len(listed))
        self.place: Integers = place[latent]
        """(E,): the place in the list of each example's latent."""
        in_group = _ranks(np.lexsort((-activation, kind, layer, latent)), latent, layer, kind)
        order = np.lexsort((-activation, kind, in_group, self.place))
        self.depth: Integers = _ranks(order, self.place)
        """(E,): the rank of each example among those of its latent."""
        self.order: Integers = order
        self.starts = np.searchsorted(self.place[order], np.arange(len(listed) + 1))

    def chunk(self, index: int, depth: int) -> dict[str, Any]:
        """The first `depth` examples of each latent in a chunk, as columns.

        Those of the chunk's i-th latent are at ends[i − 1] … ends[i] − 1.
        """
        first, last = index * CHUNK, min((index + 1) * CHUNK, len(self.starts) - 1)
        span = self.order[self.starts[first] : self.starts[last]]
        span = span[self.depth[span] < depth]
        rows = self.table.take(pyarrow.array(span))
        counts = np.bincount(self.place[span] - first, minlength=last - first)
        activations = rows["activations"].to_pylist()
        return {
            "ends": counts.cumsum().tolist(),
            "layer": rows["layer"].to_pylist(),
            "kind": rows["kind"].to_pylist(),
            "activation": [rounded(value) for value in rows["activation"].to_pylist()],
            "position": rows["position"].to_pylist(),
            "document": rows["document"].to_pylist(),
            "tokens": rows["tokens"].to_pylist(),
            "activations": [[round(value, 2) for value in row] for row in activations],
        }

    def peaks(self, n_latents: int) -> list[list[str]]:
        """The tokens, at most `_PEAKS`, at which each of the first `n_latents` is most active."""
        chosen = self.order[: self.starts[n_latents]]
        chosen = chosen[self.depth[chosen] < 4 * _PEAKS]
        if not len(chosen):
            return [[] for _ in range(n_latents)]
        rows = self.table.select(["tokens", "position"]).take(pyarrow.array(chosen))
        tokens = rows["tokens"].combine_chunks()
        at = tokens.offsets.to_numpy()[:-1] + rows["position"].to_numpy()
        strings = tokens.values.take(pyarrow.array(at)).to_pylist()
        peaks: list[dict[str, None]] = [{} for _ in range(n_latents)]
        for place, token in zip(self.place[chosen].tolist(), strings, strict=True):
            if len(peaks[place]) < _PEAKS:
                peaks[place].setdefault(token)
        return [list(words) for words in peaks]


def _ranks(order: Integers, *keys: Integers) -> Integers:
    """The rank of each element among those with equal keys, in the order given.

    `order` sorts the elements so that those with equal keys are adjacent.
    """
    new = np.ones(len(order), dtype=bool)
    for i, key in enumerate(keys):
        differs = np.diff(key[order]) != 0
        new[1:] = differs if i == 0 else new[1:] | differs
    index = np.arange(len(order))
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = index - np.maximum.accumulate(np.where(new, index, 0))
    return ranks


def _columns(analysis: Analysis, rows: Integers, examples: _ExampleOrder) -> dict[str, Any]:
    """The metrics of the latents at `rows` of the table, as columns; shares in thousandths."""
    table = analysis.latents.take(pyarrow.array(rows))
    ids = table["latent"].to_numpy()
    totals = analysis.totals.numpy()[ids]
    with np.errstate(invalid="ignore"):
        summed = totals / totals.sum(1, keepdims=True)
    shares = {"profile": analysis.profile.numpy()[ids], "profile_totals": summed}
    if analysis.continued is not None:  # of the tokens at which it is active at all
        at_all = table["tokens_active"].to_numpy()[:, None]
        shares |= {
            "alive": analysis.counts.numpy()[ids] / at_all,
            "continued": analysis.continued.numpy()[ids] / at_all,
        }
    stability = analysis.summary.get("stability")
    numbers = LATENT_NUMBERS + (MATCH_NUMBERS if stability else ())
    numbers += FLOW_NUMBERS if analysis.continued is not None else ()
    return {
        "layers": analysis.summary["layers"],
        "n_latents": analysis.latents.num_rows,
        "chunk": CHUNK,
        "latent": ids.tolist(),
        "others": len(stability["others"]) if stability else 0,
        **{name: [rounded(x) for x in table[name].to_pylist()] for name in numbers},
        **{
            name: np.rint(1000 * np.nan_to_num(share)).astype(int).ravel().tolist()
            for name, share in shares.items()
        },
        "peaks": examples.peaks(len(rows)),
        "tokens_in": table["tokens_in"].to_pylist(),
        "tokens_out": table["tokens_out"].to_pylist(),
    }


def _chunks(examples: _ExampleOrder, n_chunks: int, budget: int) -> tuple[list[str], int]:
    """Packed chunks that fit into `budget` bytes, and their depth."""
    sample = range(0, n_chunks, max(1, n_chunks // _SAMPLED))
    longest = int(examples.depth.max(initial=0)) + 1
    for depth in (longest, *(depth for depth in _DEPTHS if depth < longest)):
        size = sum(len(pack_json(examples.chunk(i, depth))) for i in sample) / max(1, len(sample))
        if size * n_chunks <= 0.93 * budget:
            break
    chunks: list[str] = []
    left = budget
    for i in range(n_chunks):
        left -= len(chunk := pack_json(examples.chunk(i, depth))) + 100  # and its HTML element
        if left < 0:
            break
        chunks.append(chunk)
    return chunks, depth
