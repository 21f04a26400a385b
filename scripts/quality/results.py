"""The file of results: a line of JSON for each training, to which more are appended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def read(results: Path) -> list[Line]:
    """The lines of the file; none if there is no such file."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text().splitlines()]


def append(results: Path, line: Line) -> None:
    """Append a line, and print it without what it has per layer."""
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps({k: v for k, v in line.items() if "layers" not in k}), flush=True)
