"""What a run logs while it trains: metrics.jsonl; on request, TensorBoard, Weights & Biases,
trackio, or several of them."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import Context
from pathlib import Path
from typing import Any

from ..distributed import log_rank0
from ..errors import InputError, first_line


class MetricsLog:
    """Writes lines of metrics to `metrics.jsonl` in the run's folder, and to the loggers `names`.

    `position` is where the file ended at the checkpoint that the run resumes from, after `tokens`
    tokens: what was written after it is cut off. `run_id` names the run of Weights & Biases and of
    trackio, which a resumed run continues. A logger that fails later is told once and no longer
    used: the metrics are in the file.

    Raises InputError if the file is shorter than `position`, or a logger cannot start.
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
        self._loggers: dict[str, _TensorBoard | _WandB | _Trackio] = {}
        size = path.stat().st_size if path.exists() else 0
        if size < position:
            raise InputError(
                f"{path} must have the {position:,} bytes that were in it at the checkpoint, and "
                f"has {size:,}; put it back, or start over with --overwrite"
            )
        self._file = path.open("a+b")
        try:
            for name in dict.fromkeys(names):
                with _starting(name):
                    if name == "tensorboard":
                        self._loggers[name] = _TensorBoard(folder, tokens + 1 if position else None)
                    elif name == "wandb":
                        self._loggers[name] = _WandB(folder, settings, run_id)
                    else:
                        self._loggers[name] = _Trackio(folder, settings, run_id)
        except BaseException:
            self.close()
            raise
        self._file.truncate(position)

    def write(self, line: dict[str, Any]) -> None:
        """Write a line. Its "tokens" are the step of the loggers' curves."""
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        scalars = _scalars(line)
        for name, logger in list(self._loggers.items()):
            with self._dropped_if_it_fails(name):
                logger.write(scalars, line["tokens"])

    def position(self) -> int:
        """Where the file ends, synced to the disk up to there."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file and the loggers."""
        self._file.close()
        for name, logger in list(self._loggers.items()):
            with self._dropped_if_it_fails(name):
                logger.close()

    @contextmanager
    def _dropped_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many types; none is worth the run
            del self._loggers[name]
            log_rank0(
                f"--log {name} failed and is no longer used: {first_line(error)}; all metrics are "
                "in metrics.jsonl"
            )


class _TensorBoard:
    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def write(self, scalars: dict[str, float], tokens: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, tokens)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, settings: dict[str, Any], run_id: str) -> None:
        self._run = importlib.import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", "mlsae"),
            name=folder.resolve().name,
            dir=str(folder),
            config=settings,
            id=run_id,
            resume="allow",
            reinit="create_new",  # beside the other SAEs' runs in this process
        )

    def write(self, scalars: dict[str, float], tokens: int) -> None:
        self._run.log(scalars, step=tokens)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A run on this machine, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL tell."""

    def __init__(self, folder: Path, settings: dict[str, Any], run_id: str) -> None:
        init = importlib.import_module("trackio").init
        with redirect_stdout(sys.stderr):  # stdout is for results
            # In a context of its own: `init` ends the run of the context, that of another SAE.
            self._run = Context().run(
                init,
                project=os.environ.get("TRACKIO_PROJECT", "mlsae"),
                name=f"{folder.resolve().name}-{run_id[:8]}",  # runs are resumed by name
                config=settings,
                resume="allow",
                embed=False,
            )

    def write(self, scalars: dict[str, float], tokens: int) -> None:
        self._run.log(scalars, step=tokens)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._run.finish()


_ADVICE = {
    "tensorboard": "leave it out",
    "trackio": "unset TRACKIO_SPACE_ID and TRACKIO_SERVER_URL, or leave it out",
    "wandb": "run `wandb login`, set WANDB_MODE=offline, or leave it out",
}


@contextmanager
def _starting(name: str) -> Iterator[None]:
    """Raise InputError if the logger `name` cannot start."""
    try:
        yield
    except Exception as error:  # no key, no network, a damaged package: of many types
        raise InputError(
            f"--log {name} must name a logger that starts, and it does not: {first_line(error)}; "
            f"{_ADVICE[name]}"
        ) from error


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
