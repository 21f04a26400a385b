"""What a program measures, printed and written row by row, so that nothing is lost if it is cut off
before its end."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .results import describe_machine, file_name, table

Row = Mapping[str, Any]


class Record:
    """Rows in sections, in <folder>/<device>-<kind>.json: {"machine": …, section: [row, …]}."""

    def __init__(self, kind: str, folder: Path, device: str, seconds: float) -> None:
        self.machine = describe_machine()
        name = self.machine["device"] if device == "cuda" else f"{self.machine['device']} cpu"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{file_name(name)}-{kind}.json"
        self.sections: dict[str, list[Row]] = {}
        self._started, self._seconds = time.perf_counter(), seconds

    def add(self, section: str, row: Row) -> None:
        """Keep a row, print it, and write the file anew."""
        self.sections.setdefault(section, []).append(row)
        print(f"{section}:", *(f"{k} {_cell(v)};" for k, v in row.items()), flush=True)
        content = {"machine": self.machine, **self.sections}
        self.path.write_text(json.dumps(content, indent=1) + "\n")

    def time_left(self) -> float:
        """Seconds of the program's time that are left."""
        return self._seconds - (time.perf_counter() - self._started)

    def tables(self, *sections: str) -> str:
        """The sections named, or all, as Markdown."""
        parts = []
        for section in sections or self.sections:
            rows = self.sections.get(section, [])
            header = list(dict.fromkeys(key for row in rows for key in row))
            lines = [[_cell(row.get(key)) for key in header] for row in rows]
            parts.append(f"## {section}\n\n{table(header, lines)}\n")
        return "\n".join(parts)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return f"{value}"
