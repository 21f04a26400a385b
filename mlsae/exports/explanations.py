"""Explanations of latents that delphi wrote, as labels of a run.

    explanations/layers.5_latent755.txt    "scripts of Unicode", as JSON, or as plain text

The text of a file is a label of the latent that its name ends with. The id is the same at all
layers: if a latent has several texts, the label is that of the first layer, and the notes have all.
A text that is too long for a label is cut there and whole in the notes. What somebody has written
stays.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import InputError, first_line
from ..formats.saved import read_json
from ..report.labels import LONGEST, add_labels

_NAME = re.compile(r"(.*?)_?latent_?(\d+)")


def take_labels(run: Path, folder: Path) -> str:
    """Add the explanations in `folder` to the labels of `run`: what to print of it.

    Raises InputError, before anything is written, if there are none, or one cannot be read, or is
    of no latent of the run.
    """
    n_latents = read_json(run / "config.json").get("n_latents", 0)
    texts = read_explanations(folder)
    wrong = [latent for latent in texts if latent >= n_latents]
    if wrong:
        raise InputError(
            f"--labels_from must hold explanations of {run}, which has {n_latents:,} latents, and "
            f"{folder} has one of latent {wrong[0]}; give those of this run"
        )
    added = add_labels(run, {latent: _label(found) for latent, found in texts.items()})
    kept = len(texts) - added
    return f"{added:,} labels added to {run}" + (
        f"; {kept:,} latents have a label already, which stays" if kept else ""
    )


def read_explanations(folder: Path) -> dict[int, dict[str, str]]:
    """The texts in `folder`, by latent and hookpoint. Raises InputError if there are none, or one
    cannot be read."""
    if not folder.is_dir():
        raise InputError(f"--labels_from must be a folder of explanations, and {folder} is none")
    paths = sorted((p for p in folder.iterdir() if p.suffix in (".txt", ".json")), key=_natural)
    texts: dict[int, dict[str, str]] = {}
    for path in paths:
        name = _NAME.fullmatch(path.stem)
        if name is None:
            continue
        text = _read(path)
        if text:
            texts.setdefault(int(name[2]), {})[name[1]] = text
    if not texts:
        raise InputError(
            "--labels_from must be a folder with explanations of latents, in files such as "
            f"layers.5_latent755.txt, and {folder} has none; give delphi's folder explanations"
        )
    return texts


def _natural(path: Path) -> list[tuple[int, str]]:
    """By which layers.2 comes before layers.10."""
    return [(len(part), part) for part in re.split(r"(\d+)", path.name)]


def _read(path: Path) -> str:
    try:
        content = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be a readable text: {first_line(error)}") from error
    try:
        found = json.loads(content)
    except ValueError:
        found = content  # plain text
    if isinstance(found, dict):
        found = found.get("explanation")
    if not isinstance(found, str):
        raise InputError(
            f"{path} must hold a text, or an object with an explanation, got {content[:40]!r}"
        )
    return " ".join(found.split())


def _label(found: dict[str, str]) -> tuple[str, str]:
    """Label and notes of the texts of one latent, by hookpoint."""
    label, longest = next(iter(found.values())), LONGEST["label"]
    several = len(set(found.values())) > 1
    lines = [f"{hookpoint}: {text}" if several else text for hookpoint, text in found.items()]
    if not several and len(label) <= longest:
        return label, ""
    if len(label) > longest:
        label = label[: longest - 1].rsplit(" ", 1)[0] + "…"
    notes = "\n".join(lines if several else lines[:1])
    most = LONGEST["notes"]
    return label, notes if len(notes) <= most else notes[: most - 1] + "…"
