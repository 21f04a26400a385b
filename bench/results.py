"""What a run of the benchmarks found: rows, and the machine they are from, kept as JSON."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One piece of work, timed."""

    work: str
    """What was done: "encode", "decode", "adam", "step", …"""
    side: str
    """Who did it: "ours", "dense", or a peer's name."""
    shape: str
    n: int
    d: int
    m: int
    k: int
    dtype: str
    seconds: float
    """The median of the rounds."""
    fastest: float
    """The least of the rounds, seconds."""
    rounds: int
    flop: float
    bytes: float
    floor: float
    """Seconds below which no implementation can go, by this machine's rates in this run."""
    peak_bytes: int
    """Memory beyond inputs and what was there before; results are counted."""
    axis: str | None = None
    """Of a scaling row, what is varied: "n", "d", "m" or "k"."""
    matmul: float | None = None
    """Median seconds of the encoder's bare float32 product, timed in turn with the work."""


@dataclass(frozen=True)
class Run:
    """The rows of one run of one program, on one machine."""

    machine: dict[str, Any]
    limits: dict[str, float]
    """What the machine was measured to do at best, by name and unit."""
    rows: list[Row]
    notes: dict[str, str]
    """By side: version, and what differs in its work."""


def save(section: str, run: Run, path: Path | None = None) -> Path:
    """Write a run as the `section` ("suite" or "peers") of bench/results/<device>.json, or of
    `path`; another section in that file stays."""
    name = re.sub(r"[^a-z0-9]+", "-", run.machine["device"].lower()).strip("-")
    path = path or FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {}
    content[section] = asdict(run)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def load(path: Path) -> dict[str, Run]:
    """The sections of a file that `save` wrote."""
    return {
        section: Run(**run | {"rows": [Row(**row) for row in run["rows"]]})
        for section, run in json.loads(path.read_text()).items()
    }


def describe_machine() -> dict[str, Any]:
    """Device, driver, versions, commit and date."""
    found: dict[str, Any] = {
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "driver": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = _output(*query)
    return found


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    version: str = triton.__version__
    return version


def _output(*command: str) -> str | None:
    """The first line that a command prints; None where it cannot be had."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
