"""Rows of Neuronpedia's tables Neuron, Activation and Explanation.

Legend: D width of the residual stream, m latents, V vocabulary.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..report.labels import Labels

_NEAREST = 10  # tokens that a latent promotes, and that it suppresses
_BINS = 50  # of the histogram of its logits
_LOGITS = 2**24  # computed at a time: 64 MB
_EMPTY: tuple[str, ...] = (
    "vector", "topkCosSimIndices", "topkCosSimValues", "neuron_alignment_indices",
    "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_pearson", "correlated_neurons_l1", "correlated_features_indices",
    "correlated_features_pearson", "correlated_features_l1", "freq_hist_data_bar_heights",
    "freq_hist_data_bar_values", "decoder_weights_dist",
)  # fmt: skip
"""Columns of Neuron that are left empty: an MLSAE's analysis has no such numbers."""


class Names(NamedTuple):
    """What the export is called at Neuronpedia."""

    model: str
    source_set: str
    creator: str

    def source(self, layer: int) -> str:
        """The source of a layer."""
        return f"{layer}-{self.source_set}"

    @property
    def release(self) -> str:
        """The release of all of them, whose name is no other model's."""
        return f"{self.model}-{self.source_set}"


class Logits(NamedTuple):
    """What some latents do to the logits, as rows of Neuron have it: of each latent."""

    pos: tuple[list[list[str]], list[list[float]]]
    neg: tuple[list[list[str]], list[list[float]]]
    bars: tuple[list[list[float]], list[list[float]]]
    """The histogram's heights, and the middles of its bins."""


def logits_of(W_dec: Tensor, W_U: Tensor | None, strings: list[str]) -> Logits:
    """What the decoder's rows W_dec (m, D) add to the logits per unit of activation, W_dec W_Uᵀ,
    without the final norm; W_U (V, D). All empty if the model has no unembedding."""
    if W_U is None:
        none: list[Any] = [[] for _ in range(len(W_dec))]
        return Logits((none, none), (none, none), (none, none))
    pos, neg, bars = Logits(([], []), ([], []), ([], []))
    n_tokens = min(len(strings), len(W_U))  # an embedding may have rows without a token
    n = min(_NEAREST, n_tokens)
    for rows in W_dec.split(max(1, _LOGITS // n_tokens)):
        logits = rows.float() @ W_U[:n_tokens].float().T
        for found, largest in ((pos, True), (neg, False)):
            values, ids = logits.topk(n, dim=1, largest=largest)
            found[0].extend([strings[i] for i in row] for row in ids.tolist())
            found[1].extend(map(_short, values.tolist()))
        for bar, part in zip(bars, _histogram(logits), strict=True):
            bar.extend(map(_short, part.tolist()))
    return Logits(pos, neg, bars)


def _short(numbers: list[float]) -> list[float]:
    """With 5 digits: what float16 holds, and pages show."""
    return [float(f"{number:.5g}") for number in numbers]


def _histogram(logits: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row of logits (m, V) are in each of `_BINS` equal parts of its range, and
    the parts' middles: (m, bins) each."""
    low, high = logits.amin(1, keepdim=True), logits.amax(1, keepdim=True)
    width = ((high - low) / _BINS).clamp_min(1e-12)
    bins = ((logits - low) / width).long().clamp_(0, _BINS - 1)
    heights = torch.zeros(len(logits), _BINS, device=logits.device)
    heights.scatter_add_(1, bins, torch.ones_like(logits))
    return heights, low + width * (torch.arange(_BINS, device=logits.device) + 0.5)


def feature(
    row: dict[str, Any], names: Names, frequency: float, examples: list[Any], logits: Logits, i: int
) -> dict[str, Any]:
    """A row of Neuron, of the i-th latent of `logits`."""
    return {
        **row,
        "sourceSetName": names.source_set,
        "maxActApprox": max((max(_short(e["activations"])) for e in examples), default=0.0),
        "frac_nonzero": frequency,
        "pos_str": logits.pos[0][i],
        "pos_values": logits.pos[1][i],
        "neg_str": logits.neg[0][i],
        "neg_values": logits.neg[1][i],
        "logits_hist_data_bar_heights": logits.bars[0][i],
        "logits_hist_data_bar_values": logits.bars[1][i],
        "hasVector": False,
        "vectorLabel": None,
        "vectorDefaultSteerStrength": None,
        "hookName": None,
        **{name: [] for name in _EMPTY},
    }


def activation(row: dict[str, Any], n: int, now: str, example: dict[str, Any]) -> dict[str, Any]:
    """A row of Activation: the n-th example of a latent at a layer."""
    values = _short(example["activations"])
    return {
        **row,
        "id": _id("activation", row, str(n)),
        "createdAt": now,
        "tokens": example["tokens"],
        "values": values,
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
        "dataIndex": None,
        "dataSource": None,
        "dfaValues": [],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "lossValues": [],
        "logitContributions": None,
        "binMin": None,
        "binMax": None,
        "binContains": None,
        "qualifyingTokenIndex": example["position"],
    }


def explanations(
    labels: Labels, features: list[dict[str, Any]], names: Names
) -> list[dict[str, Any]]:
    """Rows of Explanation: the labels of the latents of `features`."""
    rows = []
    for feature in features:
        entry = labels.get(int(feature["index"]))
        if entry and (entry["label"] or entry["notes"]):
            key = {name: feature[name] for name in ("modelId", "layer", "index")}
            rows.append(
                {
                    **key,
                    "id": _id("explanation", key, ""),
                    "authorId": names.creator,
                    "description": entry["label"] or entry["notes"],
                    "notes": entry["notes"] or None,
                    "typeName": None,
                    "explanationModelName": None,
                    "createdAt": entry["changed"],
                    "updatedAt": entry["changed"],
                }
            )
    return rows


def _id(kind: str, row: dict[str, Any], more: str) -> str:
    """An id that no other row has, the same each time: in the form of a cuid."""
    text = "\n".join((kind, row["modelId"], row["layer"], row["index"], more))
    return "c" + hashlib.sha256(text.encode()).hexdigest()[:24]
