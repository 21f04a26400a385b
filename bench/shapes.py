"""The problem shapes that are timed, in plain Python.

Legend: L layers, N tokens, D inputs, M latents, K active latents per token.
"""

from __future__ import annotations

from sparse_topk.costs import ProblemShape as ProblemShape
from sparse_topk.costs import TrainShape as TrainShape

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


ENCODES = {
    "cuda": (
        ProblemShape("S1", 8192, 512, 32768, 32),
        ProblemShape("S2", 8192, 2048, 131072, 32),
        ProblemShape("SP", 8192, 1024, 131072, 32),
        ProblemShape("WK", 8192, 1024, 65536, 256),
        ProblemShape("LONG", 98304, 512, 32768, 32),
    ),
    "cpu": (ProblemShape("tiny", 64, 32, 512, 8), ProblemShape("tiny wide-k", 64, 32, 512, 32)),
}
"""What `bench.step` and `bench.tune` encode. LONG is a part of a training batch: 16,384 tokens of
six layers."""

FEW_TOKENS = {
    "cuda": [ENCODES["cuda"][i]._replace(n=n) for i in (0, 1) for n in (1, 128, 512)],
    "cpu": [ENCODES["cpu"][0]._replace(n=n) for n in (1, 16)],
}
"""Encodes of few tokens, as inference has them."""


_PYTHIA_70M = TrainShape("pythia-70m", 6, 16384, 512, 32768, 32)
TRAININGS = {
    "cuda": (
        _PYTHIA_70M,
        _PYTHIA_70M._replace(name="pythia-70m, 1000 dead", dead=1000, k_aux=256),
        TrainShape("pythia-1.4b", 24, 1024, 2048, 131072, 32),
    ),
    "cpu": (
        TrainShape("tiny", 2, 32, 16, 256, 8),
        TrainShape("tiny, 20 dead", 2, 32, 16, 256, 8, dead=20, k_aux=4),
    ),
}
"""The training steps that `bench.step` times and `bench.ledger` counts."""
