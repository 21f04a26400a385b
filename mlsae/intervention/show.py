"""What `python -m mlsae.steer` prints."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..cli import empty_table
from .run import Steered


def shown(result: Steered) -> Iterator[RenderableType]:
    """Tables and lines to print, in their order."""
    for change in result.changes:
        yield Text(str(change))
    if result.config.max_new_tokens:
        yield _continuations(result)
    kl = result.effects.kl()
    if not kl.any():
        yield "the prompt's predictions stay the same"
        return
    yield _next_tokens(result)
    yield _positions(result)
    if result.effects.latents:
        yield _latents(result)


def _continuations(result: Steered) -> Table:
    title = Text(f"After {_visible(result.config.prompt)}")
    table = Table(title=title)
    for heading in ("baseline", "steered"):
        table.add_column(heading, ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in result.continuations))
    return table


def _next_tokens(result: Steered) -> Table:
    headings = ["next token", "p", "p, steered", "change", "Δ logit"]
    table = empty_table("Next tokens that move most", headings, {"next token"})
    for entries in result.effects.next_tokens(result.config.show):
        for entry in entries:
            (p, q), (a, b) = entry["p"], entry["logit"]
            name = Text(_visible(result.strings[entry["id"]]))
            table.add_row(name, f"{p:.4f}", f"{q:.4f}", f"{q - p:+.4f}", f"{b - a:+.2f}")
        table.add_section()
    return table


def _positions(result: Steered) -> Table:
    headings = ["position", "token", "KL", "likeliest next", "steered"]
    left = {"token", "likeliest next", "steered"}
    table = empty_table("KL(baseline ‖ steered), nats", headings, left)
    best = result.effects.log_p.argmax(-1).T.tolist()  # (T, 2)
    rows = zip(result.tokens, result.effects.kl().tolist(), best, strict=True)
    for i, (token, kl, ids) in enumerate(rows):
        names = [Text(_visible(result.strings[j])) for j in ids]
        table.add_row(f"{i}", Text(_visible(token)), f"{kl:.4f}", *names)
    return table


def _latents(result: Steered) -> Table:
    headings = ["latent", "layer", "Σ h", "Σ h, steered", "Σ |Δh|"]
    table = empty_table("Other latents that change most above, over the prompt", headings)
    for latent in result.effects.latents:
        numbers = (f"{x:.2f}" for x in (latent.before, latent.after, latent.change))
        table.add_row(str(latent.latent), str(latent.layer), *numbers)
    return table


def _visible(text: str) -> str:
    """A text on one line, with its spaces to be seen."""
    return repr(text)
