"""The sizes that are timed. It knows no torch, so that every environment can read it.

Legend: N tokens, D inputs, M latents, K active latents a token.
"""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One size of the work."""

    name: str
    n: int
    d: int
    m: int
    k: int


SHAPES = {
    "cuda": (
        Shape("pythia-70m x64", 8192, 512, 32768, 32),
        Shape("pythia-1.4b x64", 8192, 2048, 131072, 32),
        Shape("sparsify", 8192, 1024, 131072, 32),
        Shape("wide-k", 8192, 1024, 65536, 256),
        Shape("long", 65536, 512, 32768, 32),
    ),
    "cpu": (
        Shape("pythia-70m x64, 1024 tokens", 1024, 512, 32768, 32),
        Shape("small", 1024, 256, 8192, 32),
        Shape("small wide-k", 512, 256, 8192, 256),
    ),
}
"""By the kind of device."""

_BASE = {
    "cuda": Shape("scaling", 8192, 1024, 32768, 32),
    "cpu": Shape("scaling", 512, 256, 8192, 32),
}
_FACTORS = (0.25, 0.5, 1, 2, 4)


def scaled(kind: str) -> list[tuple[str, Shape]]:
    """For a kind of device, what is varied ("n", "d", "m" or "k") and the shape: each size from a
    quarter to four times, the others kept."""
    base = _BASE[kind]
    found = []
    for factor in _FACTORS:
        found += [
            ("n", base._replace(n=round(base.n * factor))),
            ("d", base._replace(d=round(base.d * factor))),
            ("m", base._replace(m=round(base.m * factor))),
            ("k", base._replace(k=round(base.k * factor))),
        ]
    return sorted(found)
