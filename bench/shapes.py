"""The problem shapes that are timed, in plain Python.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

from __future__ import annotations

from typing import NamedTuple


class ProblemShape(NamedTuple):
    """N, D, M and K of one benchmark, and what tables call it."""

    name: str
    n: int
    d: int
    m: int
    k: int


SHAPES = {
    "cuda": (
        ProblemShape("pythia-70m x64", 8192, 512, 32768, 32),
        ProblemShape("pythia-1.4b x64", 8192, 2048, 131072, 32),
        ProblemShape("sparsify", 8192, 1024, 131072, 32),
        ProblemShape("wide-k", 8192, 1024, 65536, 256),
        ProblemShape("long", 65536, 512, 32768, 32),
    ),
    "cpu": (
        ProblemShape("pythia-70m x64, 1024 tokens", 1024, 512, 32768, 32),
        ProblemShape("small", 1024, 256, 8192, 32),
        ProblemShape("small wide-k", 512, 256, 8192, 256),
    ),
}
"""The named shapes, by kind of device."""

_BASE = {
    "cuda": ProblemShape("scaling", 8192, 1024, 32768, 32),
    "cpu": ProblemShape("scaling", 512, 256, 8192, 32),
}
_FACTORS = (0.25, 0.5, 1, 2, 4)


def scaled(kind: str) -> list[tuple[str, ProblemShape]]:
    """For a kind of device: each size ("n", "d", "m", "k") varied from a quarter to four times its
    base with the others fixed, as (size varied, shape)."""
    base = _BASE[kind]
    shapes = []
    for factor in _FACTORS:
        shapes += [
            ("n", base._replace(n=round(base.n * factor))),
            ("d", base._replace(d=round(base.d * factor))),
            ("m", base._replace(m=round(base.m * factor))),
            ("k", base._replace(k=round(base.k * factor))),
        ]
    return sorted(shapes)
