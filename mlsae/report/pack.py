"""Put a page into one file: its data are compressed, and its own script unpacks them.

Base64 has no character that means something in HTML, so no text of a user's can end a script.
"""

from __future__ import annotations

import base64
import functools
import gzip
import json
import math
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

if TYPE_CHECKING:
    import plotly.graph_objects as go

MAX_PAGE_BYTES = 10_000_000


def pack(text: str) -> str:
    """The gzip of `text` in base64; the same text always gives the same characters."""
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def json_text(value: Any) -> str:
    """`value` as JSON. Raises ValueError if it holds NaN, which JSON cannot represent."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def pack_json(value: Any) -> str:
    """`value` as JSON, packed. Raises ValueError as `json_text`."""
    return pack(json_text(value))


def pack_plots(plots: dict[str, go.Figure]) -> str:
    """Plots by name, packed."""
    return pack_json({name: json.loads(plot.to_json()) for name, plot in plots.items()})


def plotly_js() -> str:
    """plotly.js, as the package has it."""
    return (resources.files("plotly") / "package_data" / "plotly.min.js").read_text("utf-8")


@functools.cache
def packed_plotly() -> str:
    """plotly.js, packed: 1.9 MB instead of 4.7."""
    return pack(plotly_js())


def rounded(value: float | None, digits: int = 4) -> float | None:
    """`value` to `digits` significant digits; None if it is None, NaN or infinite."""
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None


def render(
    template: str,
    scripts: tuple[str, ...],
    packed: dict[str, str],
    package: str = __package__,
    styles: tuple[str, ...] = ("page.css",),
    **values: Any,
) -> bytes:
    """The page of a template, with its styles, scripts and packed data inlined. All these files are
    in the folder of `package`, or else in this one.

    Every value is escaped where the template inserts it.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: read(name, package)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(
        css=Markup("".join(read(style, package) for style in styles)),
        scripts=[Markup(read(script, package)) for script in scripts],
        packed={name: Markup(text) for name, text in packed.items()},
        **values,
    )
    return page.encode()


def read(name: str, package: str = __package__) -> str:
    """A file of a page, in the folder of `package`, or else in this one."""
    own = resources.files(package) / name
    found = own if own.is_file() else resources.files(__package__) / name
    return found.read_text(encoding="utf-8")
