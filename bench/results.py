"""The results of a bench run, kept as JSON: timings, and the machine that they are from."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """The time and memory of one piece of work by one implementation."""

    work: str
    """What was done: "encode", "decode", "adam", "step", …"""
    impl: str
    """What did it: "ours", "dense", or another library's name."""
    shape: str
    """The name of the `ProblemShape`; n, d, m and k are its sizes."""
    n: int
    d: int
    m: int
    k: int
    dtype: str
    seconds: float
    """The median of the rounds."""
    fastest: float
    """The minimum of the rounds, in seconds."""
    rounds: int
    flop: float
    bytes: float
    roofline: float
    """The least seconds that any implementation takes, at this machine's rates in this run."""
    peak_bytes: int
    """Memory beyond the inputs and what was allocated before; includes the results."""
    axis: str | None = None
    """In a scaling row, the size that is varied: "n", "d", "m" or "k"."""
    matmul: float | None = None
    """Median seconds of the encoder's bare float32 product, timed in turn with the work."""


@dataclass(frozen=True)
class BenchRun:
    """The timings of one program on one machine."""

    machine: dict[str, Any]
    rates: dict[str, float]
    """The machine's measured rates, by name and unit."""
    rows: list[Timing]
    notes: dict[str, str]
    """For each implementation: its version, and how its work differs from ours."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def file_name(device: str) -> str:
    """A device's name as that of a file: "NVIDIA H100 80GB HBM3" → "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def save(section: str, run: BenchRun, path: Path | None = None) -> Path:
    """Write a run as the `section` ("suite" or "peers") of bench/results/<device>.json, or of
    `path`. The other section of the file is kept."""
    path = path or FOLDER / f"{file_name(run.machine['device'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {}
    content[section] = asdict(run)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def load(path: Path) -> dict[str, BenchRun]:
    """The sections of a file that `save` wrote."""
    return {
        section: BenchRun(**run | {"rows": [Timing(**row) for row in run["rows"]]})
        for section, run in json.loads(path.read_text()).items()
    }


def describe_machine() -> dict[str, Any]:
    """Device, driver, versions, commit and date."""
    machine: dict[str, Any] = {
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "driver": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": _first_line_of("git", "describe", "--always", "--dirty"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if torch.cuda.is_available():
        machine["device"] = torch.cuda.get_device_name()
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        machine["driver"] = _first_line_of("nvidia-smi", *query)
    return machine


def _processor() -> str:
    """The processor's name, or only its architecture if the system does not report a name."""
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


def _first_line_of(*command: str) -> str | None:
    """The first line that a command prints; None if it fails or prints nothing."""
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip().splitlines()[0] if process.stdout.strip() else None
