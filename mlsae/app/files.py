"""What the page shows of a run's files, as JSON.

Legend: L layers.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import torch

from ..report import latent_plots
from ..report.browser import BrowserTables
from ..report.pack import json_text
from ..report.run_data import read_run_data


class RunFiles:
    """The files of the run in `folder`. Raises InputError if one is damaged."""

    def __init__(self, folder: Path) -> None:
        self.run = read_run_data(folder)
        self._tables = BrowserTables(self.run.analysis) if self.run.analysis else None

    @cached_property
    def latents(self) -> str | None:
        """The metrics of all latents that were active, as columns; None without an analysis. Labels
        change, so they come by themselves."""
        return json_text(self._tables.latents({})) if self._tables else None

    def examples(self, chunk: int) -> str | None:
        """The examples of a chunk of latents; None if there is no such chunk."""
        found = self._tables.chunk(chunk) if self._tables else None
        return None if found is None else json_text(found)

    @cached_property
    def plots(self) -> str:
        """The heatmap that others are drawn like."""
        layers = self.run.analysis.summary["layers"] if self.run.analysis else self.run.layers
        empty = latent_plots.heatmap(torch.zeros(0, len(layers)), layers)
        return json_text({"heatmap": json.loads(empty.to_json())})
