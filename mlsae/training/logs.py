"""What a run logs while it trains: metrics.jsonl; on request, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError


class MetricsLog:
    """Writes lines of metrics to `metrics.jsonl` in the run's folder, and to the loggers `names`.

    `position` is where the file ended at the checkpoint that the run resumes from, after `tokens`
    tokens: what was written after it is cut off. `run_id` names the Weights & Biases run, which a
    resumed run continues.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        settings: dict[str, Any],
        run_id: str,
        position: int = 0,
        tokens: int = 0,
    ) -> None:
        path = folder / "metrics.jsonl"
        self._file = path.open("a+b")
        if self._file.tell() < position:
            raise InputError(
                f"{path} must have the {position:,} bytes that were in it at the checkpoint, and "
                f"has {self._file.tell():,}; put it back, or start over with --overwrite"
            )
        self._file.truncate(position)
        self._tensorboard: Any = None
        self._wandb: Any = None
        if "tensorboard" in names:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(folder / "tensorboard"), purge_step=tokens + 1 if position else None
            )
        if "wandb" in names:
            self._wandb = importlib.import_module("wandb").init(
                project=os.environ.get("WANDB_PROJECT", "mlsae"),
                name=folder.resolve().name,
                dir=str(folder),
                config=settings,
                id=run_id,
                resume="allow",
                reinit="create_new",  # beside the other SAEs' runs in this process
            )

    def write(self, line: dict[str, Any]) -> None:
        """Write a line. Its "tokens" are the step of TensorBoard's and Weights & Biases' curves."""
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        scalars = _scalars(line)
        if self._tensorboard:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, line["tokens"])
        if self._wandb:
            self._wandb.log(scalars, step=line["tokens"])

    def position(self) -> int:
        """Where the file ends, synced to the disk up to there."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file and the loggers."""
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _scalars(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line by path; those of a list by position: "fvu_layers/3"."""
    scalars: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            scalars |= _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            scalars |= {f"{prefix}{key}/{i}": number for i, number in enumerate(value)}
        elif key != "tokens":
            scalars[f"{prefix}{key}"] = value
    return scalars
