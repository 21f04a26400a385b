"""Where the numbers in evaluation.json and analysis.json come from: keys that both files have."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..data.stream import DataStream
from ..memory import peak
from ..model import MLSAE

_TEXT = ("dataset", "dataset_config", "dataset_split", "dataset_revision", "heldout_share")


@dataclass(frozen=True)
class Provenance:
    """Which MLSAE was measured, on what text, where, and at what cost."""

    run: str
    """Folder of the MLSAE, or its name on the hub."""
    model: str
    dataset: str
    dataset_config: str | None
    dataset_split: str
    dataset_revision: str | None
    heldout_share: float
    tokens: int
    """Tokens that were measured on: neither special nor dropped."""
    tokens_dropped: int
    """Tokens that were dropped though not special, by the rule `dropped`."""
    dropped: dict[str, Any]
    """`data.sinks.DropRule`."""
    rows: int
    seq_len: int
    layers: tuple[int, ...]
    """Layers that were measured at."""
    lens: dict[str, Any] | None
    """Which lens the MLSAE has: its kind, and the SHA-256 of its maps."""
    trained_on_layers: tuple[int, ...]
    n_latents: int
    k: int
    interval: str
    """What the intervals are, in words."""
    seed: int
    seconds: float
    peak_bytes: int
    device: str
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """JSON-serializable."""
        return asdict(self)


def provenance_of(
    run: Path, mlsae: MLSAE, stream: DataStream, token_mask: Tensor, text_mask: Tensor,
    interval: str, started: float,
) -> Provenance:  # fmt: skip
    """The provenance of a measurement that has just ended and began at `started`
    (`time.perf_counter`), at the tokens that `token_mask` (rows, T) leaves of those that are not
    special, `text_mask` (rows, T)."""
    lens = mlsae.lens
    return Provenance(
        run=str(run),
        model=stream.config.model,
        **{name: getattr(stream.config, name) for name in _TEXT},
        tokens=int(token_mask.sum()),
        tokens_dropped=int(text_mask.sum() - token_mask.sum()),
        dropped=stream.drop.as_dict(),
        rows=len(token_mask),
        seq_len=stream.seq_len,
        layers=stream.reader.layers,
        lens=None if lens is None else {"kind": lens.about.get("kind"), "sha256": lens.digest},
        trained_on_layers=mlsae.config.layers,
        n_latents=mlsae.config.n_latents,
        k=mlsae.config.k,
        interval=interval,
        seed=stream.seed,
        seconds=time.perf_counter() - started,
        peak_bytes=peak(stream.device),
        device=str(stream.device),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
