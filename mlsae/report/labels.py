"""What a user wrote about latents: a label and notes for each, in labels.json in the run's folder.

{"755": {"label": "scripts of Unicode", "notes": "", "changed": "2026-11-27T14:00:00+00:00"}}
"""

from __future__ import annotations

import csv
import io
import json
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import InputError, first_line
from ..files import LABELS, locked, write_file

LONGEST = {"label": 200, "notes": 4000}
"""Characters, at most."""
FIELDS = (*LONGEST, "changed")

_PATIENCE = 10  # seconds for which another program may hold the folder
_one_at_a_time = threading.Lock()  # in this process

Labels = dict[int, dict[str, str]]
"""By latent: label, notes, and when they were changed last."""


def read_labels(folder: Path) -> Labels:
    """The labels of the run in `folder`, in the order of the latents; {} if there are none. Raises
    InputError if the file is damaged."""
    path = folder / LABELS
    try:
        content = json.loads(path.read_text("utf-8"))
        labels = {int(latent): {name: entry[name] for name in FIELDS}
                  for latent, entry in content.items()}  # fmt: skip
        if not all(isinstance(text, str) for entry in labels.values() for text in entry.values()):
            raise TypeError("a label, notes or a date is no text")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} must hold labels of latents, and cannot be read: {first_line(error)}; repair "
            "or remove it"
        ) from error
    return dict(sorted(labels.items()))


def write_label(folder: Path, latent: int, label: str, notes: str) -> Labels:
    """Set the label and notes of a latent, or remove them if both are empty, and return all labels
    of the run in `folder`. What others write at the same time is kept, but of one latent the last.

    Raises InputError if a text is too long, or the file is damaged, or the folder cannot be
    written to.
    """
    for name, text in (("label", label), ("notes", notes)):
        if len(text) > LONGEST[name]:
            raise InputError(
                f"{name} must have at most {LONGEST[name]:,} characters, got {len(text):,}"
            )
    if not folder.is_dir():
        raise InputError(f"{folder} is not there any more, so labels cannot be written")
    try:
        with _one_at_a_time, locked(folder, _PATIENCE):
            labels = read_labels(folder)
            labels.pop(latent, None)
            if label or notes:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                labels[latent] = {"label": label, "notes": notes, "changed": now}
            labels = dict(sorted(labels.items()))
            _write(folder, labels)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return labels


def add_labels(folder: Path, found: Mapping[int, tuple[str, str]]) -> int:
    """Give each latent of `found` its label and notes there, but those that have some keep them:
    how many were given.

    Raises InputError if the file is damaged, or the folder cannot be written to.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        with _one_at_a_time, locked(folder, _PATIENCE):
            labels = read_labels(folder)
            new = {
                latent: {"label": label, "notes": notes, "changed": now}
                for latent, (label, notes) in found.items()
                if latent not in labels
            }
            _write(folder, labels | new)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return len(new)


def _write(folder: Path, labels: Labels) -> None:
    content = {str(latent): entry for latent, entry in sorted(labels.items())}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_file(folder / LABELS, text.encode("utf-8", "replace"))


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"labels must be written to {folder / LABELS}, and cannot be: {first_line(error)}"
    )


def labels_csv(labels: Labels) -> str:
    """The labels as a table: latent, label, notes, changed."""
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(("latent", *FIELDS))
    table.writerows((latent, *(entry[name] for name in FIELDS)) for latent, entry in labels.items())
    return out.getvalue()


def shown_labels(labels: Labels) -> dict[str, Any]:
    """What a page shows of them, by the latent's id."""
    return {
        str(latent): {name: entry[name] for name in LONGEST} for latent, entry in labels.items()
    }
