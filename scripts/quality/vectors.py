"""Residuals on disk, so that all trainers see the same ones in the same order.

    about.json    what they are (`Harvest`), written last: without it the folder is not whole
    train.f16     (tokens, L, D) float16, row-major: what is trained on, batch after batch
    choose.f16    the same of held-out text, to choose settings by
    report.f16    the same of other held-out text, for the figures that are reported

Legend: L layers, N tokens, D width of the residual stream.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SLICES = ("choose", "report")
EPS = 1e-5
"""As `mlsae.model.SIGMA_EPS`, which an environment with a peer's transformers need not import."""


@dataclass(frozen=True)
class Harvest:
    """What was asked for, and what came."""

    tokens: int
    """To train on; the batch that reaches them is the last."""
    batch_tokens: int
    """Per batch, special ones included."""
    slice_tokens: int
    """Per held-out slice, special ones included."""
    layers: tuple[int, ...]
    d_in: int
    batches: tuple[tuple[int, int], ...] = ()
    """Per batch: how many tokens were kept, and how many the training program counts."""
    slices: dict[str, int] | None = None
    """How many tokens of each slice were kept."""
    dropped: dict[str, Any] | None = None
    """The rule that drops tokens: `mlsae.data.sinks.DropRule.as_dict`."""


class Vectors:
    """The residuals in a folder."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "about.json").read_text())
        about["layers"] = tuple(about["layers"])
        about["batches"] = tuple(tuple(batch) for batch in about["batches"])
        self.folder, self.about = folder, Harvest(**about)

    def batches(self) -> Iterator[tuple[Tensor, int]]:
        """Each batch to train on, (L, N, D) float32, and the tokens that it counts as."""
        array = self._array("train", sum(kept for kept, _ in self.about.batches))
        start = 0
        for kept, counted in self.about.batches:
            yield _tensor(array[start : start + kept]), counted
            start += kept

    def heldout(self, name: str, tokens: int = 2048) -> Iterator[Tensor]:
        """The slice `name`, (L, N, D) float32, `tokens` at a time."""
        n_tokens = (self.about.slices or {})[name]
        array = self._array(name, n_tokens)
        for start in range(0, n_tokens, tokens):
            yield _tensor(array[start : start + tokens])

    def _array(self, name: str, tokens: int) -> np.ndarray[Any, Any]:
        shape = (tokens, len(self.about.layers), self.about.d_in)
        return np.memmap(self.folder / f"{name}.f16", np.float16, "r", shape=shape)


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)).transpose(0, 1).contiguous()


def standardized(x: Tensor) -> Tensor:
    """x (L, N, D) → (L·N, D): (x − μ) / (σ + 1e-5), μ and the unbiased σ over the elements of each
    vector, as `MLSAE.standardize` gives them to our own SAE."""
    std, mean = torch.std_mean(x, dim=-1, keepdim=True)
    return ((x - mean) / (std + EPS)).flatten(0, 1)
