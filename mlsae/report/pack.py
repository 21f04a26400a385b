"""A page is one file: what it holds is compressed, and its own script unpacks it.

Base64 has no character that HTML gives a meaning, so no text of a user's can end a script.
"""

from __future__ import annotations

import base64
import functools
import gzip
import json
import math
from importlib import resources
from typing import Any

import jinja2
import plotly.graph_objects as go
import plotly.offline
from markupsafe import Markup

LIMIT = 10_000_000
"""Bytes of a page at most."""


def pack(text: str) -> str:
    """The gzip of `text` in base64; the same text gives the same characters."""
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def pack_json(value: Any) -> str:
    """`value` as JSON, packed. NaN, which JSON has not, is refused."""
    return pack(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def pack_figures(figures: dict[str, go.Figure]) -> str:
    """Plotly figures by name, packed."""
    return pack_json({name: json.loads(figure.to_json()) for name, figure in figures.items()})


@functools.cache
def packed_plotly() -> str:
    """plotly.js: 1.9 MB instead of 4.7."""
    return pack(plotly.offline.get_plotlyjs())


def number(value: float | None, digits: int = 4) -> float | None:
    """`value` to so many significant digits, or None where it is none, NaN or infinite."""
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None


def render(template: str, scripts: tuple[str, ...], packed: dict[str, str], **values: Any) -> bytes:
    """The page of a template in this folder, its style, scripts and packed data in it.

    Every value is escaped where the template puts it.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(
        css=Markup(_file("page.css")),
        scripts=[Markup(_file(script)) for script in scripts],
        packed={name: Markup(text) for name, text in packed.items()},
        **values,
    )
    return page.encode()


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
