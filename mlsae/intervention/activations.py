"""How active latents are over text, as the analysis of a run found: what edits are measured in.

Legend: M latents, L layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..formats.saved import read_tensors
from .literals import Units


class Activations(NamedTuple):
    """The activations of latents where they are active, over many tokens and all layers."""

    max: Tensor
    """(M,) the largest; 0 for a latent that was never active."""
    mean: Tensor
    """(M,) the mean over the tokens and layers where it is active; 0 if never."""

    def of(self, latent: int, units: Units) -> float:
        """The activation that is 1 of `units`, "max" or "mean". Raises InputError if there is
        none."""
        values = self.max if units == "max" else self.mean
        value = values[latent].item() if latent < len(values) else 0.0
        if not value > 0:
            raise InputError(
                f"units {units!r} need a latent that was active in the analysis, and {latent} "
                "never was; give units 'sigma' or 'raw', or analyze more --tokens"
            )
        return value


def read_activations(run: Path | str) -> Activations:
    """What `python -m mlsae.analyze` left in the folder `run`: `max_activation` of
    analysis_latents.parquet, and Σ totals / Σ counts over layers of analysis.safetensors.

    Raises InputError if a file is missing or damaged.
    """
    run = Path(run)
    table, arrays = run / "analysis_latents.parquet", run / "analysis.safetensors"
    for path in (table, arrays):
        if not path.is_file():
            raise InputError(
                f"units 'max' and 'mean' need {path}, which is not there; run `python -m "
                f"mlsae.analyze {run}` first"
            )
    try:
        column = pyarrow.parquet.read_table(table, columns=["max_activation"])["max_activation"]
        largest = torch.tensor(column.to_pylist(), dtype=torch.float64).nan_to_num()
    except (OSError, ValueError, TypeError, KeyError, pyarrow.ArrowException) as error:
        raise InputError(
            f"{table} cannot be read: {first_line(error)}; measure it again with mlsae.analyze"
        ) from error
    tensors = read_tensors(arrays)
    totals, counts = (tensors.get(name, torch.empty(0, 0)) for name in ("totals", "counts"))
    if totals.shape != counts.shape or totals.shape[:1] != largest.shape:
        raise InputError(
            f"{arrays} must hold totals and counts of {len(largest)} latents, got shapes "
            f"{tuple(totals.shape)} and {tuple(counts.shape)}; measure it again with mlsae.analyze"
        )
    active = counts.sum(1).clamp_min(1)
    return Activations(largest, totals.double().sum(1) / active)
