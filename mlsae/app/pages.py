"""The page of a run: a frame, which asks for its data when it is open. It needs no torch."""

from __future__ import annotations

import base64
import functools
import hashlib
import shlex

from ..report.pack import read, render
from .requests import MOST_CHECKS, MOST_NEW_TOKENS
from .runs import Runs

_BEFORE = ("fetched.js", "page.js", "token.js", "written.js")
_BROWSER = ("list.js", "detail.js", "browser.js")
_AFTER = (
    "ask.js", "labels.js", "chosen.js", "next.js", "read.js", "steer.js", "trace.js", "start.js",
)  # fmt: skip


def page(runs: Runs, number: int) -> bytes:
    """The page of the run `number`, counted from 0."""
    run = runs.all[number]
    return render(
        "app.html",
        (*_BEFORE, *(_BROWSER if run.analyzed else ()), *_AFTER),
        {},
        package=__package__,
        styles=("page.css", "app.css"),
        title=f"MLSAE {runs.names[number]}",
        run=run,
        runs=runs.names,
        number=number,
        quoted=shlex.quote(str(run.folder)),
        most={"new": MOST_NEW_TOKENS, "checks": MOST_CHECKS},
        model=str(run.about.get("model") or "not named"),
    )


@functools.cache
def content_policy() -> str:
    """The Content-Security-Policy: only the page's own scripts run, and nothing else is reached.
    Plotly needs styles of its own, and images that it has drawn."""
    texts = [read(name, __package__).encode() for name in (*_BEFORE, *_BROWSER, *_AFTER)]
    hashes = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in texts]
    scripts = " ".join(f"'sha256-{each}'" for each in hashes)
    return (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'unsafe-inline'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
