"""The least FLOPs and bytes that each piece of work needs.

Each input is read once and each output written once. Gathering from a weight reads at most
min(N·K, M) different rows of it. Indices have 8 bytes. A FLOP is one multiplication or addition.

Legend: N tokens, D inputs, M latents, K active latents per token, e bytes per number.
"""

from __future__ import annotations

from typing import NamedTuple

from .shapes import ProblemShape


class Cost(NamedTuple):
    """The least that a piece of work takes."""

    flop: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(self.flop + other.flop, self.bytes + other.bytes)

    def roofline(self, flop_per_second: float, bytes_per_second: float) -> float:
        """max(FLOPs / rate, bytes / bandwidth): the least seconds that any implementation takes."""
        return max(self.flop / flop_per_second, self.bytes / bytes_per_second)


def topk_encode(s: ProblemShape, e: int) -> Cost:
    """x (N, D), W (M, D) → values, indices (N, K): 2 N D M FLOPs."""
    return Cost(2 * s.n * s.d * s.m, e * (s.n * s.d + s.m * s.d) + s.n * s.k * (e + 8))


def gather_sum(s: ProblemShape, e: int) -> Cost:
    """values, indices (N, K), rows of W (M, D) → (N, D): 2 N K D FLOPs."""
    rows = min(s.n * s.k, s.m)
    return Cost(2 * s.n * s.k * s.d, e * (rows * s.d + s.n * s.d) + s.n * s.k * (e + 8))


def gather_dot(s: ProblemShape, e: int) -> Cost:
    """x (N, D), indices (N, K), rows of W (M, D) → (N, K): the cost of `gather_sum`, with input
    and output swapped."""
    return gather_sum(s, e)


def scatter_outer(s: ProblemShape, e: int) -> Cost:
    """values (N, K), sorted by latent, and x (N, D) → (M, D), every row written: 2 N K D FLOPs."""
    return Cost(2 * s.n * s.k * s.d, e * (s.m * s.d + s.n * s.d) + s.n * s.k * (e + 8))


def scatter_outer_add(s: ProblemShape, e: int) -> Cost:
    """`scatter_outer` added to a float32 (M, D): only the rows that a token chose are read and
    written, 8 bytes per number."""
    rows = min(s.n * s.k, s.m)
    return Cost(2 * s.n * s.k * s.d, 8 * rows * s.d + e * s.n * s.d + s.n * s.k * (e + 8))


def keep_topk(s: ProblemShape, e: int) -> Cost:
    """Scores (N, M), read and written in place; each is compared, which is no FLOP."""
    return Cost(0, 2 * e * s.n * s.m)


def aux_residual(s: ProblemShape, e: int) -> Cost:
    """float32 ê, error and weights → squares (N,) and gradient (N, D): 4 FLOPs per number."""
    return Cost(4 * s.n * s.d, (4 + 2 * e) * s.n * s.d + 8 * s.n)


def adam(s: ProblemShape) -> Cost:
    """One float32 weight (M, D): reads weight, gradient and two moments, writes all but the
    gradient. 28 bytes and about 15 FLOPs per parameter."""
    return Cost(15 * s.m * s.d, 28 * s.m * s.d)


def encode_backward(s: ProblemShape, e: int) -> Cost:
    """The gradient of W_enc: one `scatter_outer`."""
    return scatter_outer(s, e)


def decode_backward(s: ProblemShape, e: int) -> Cost:
    """The gradients of the values and of W_dec: `gather_dot` and `scatter_outer`."""
    return gather_dot(s, e) + scatter_outer(s, e)


def forward(s: ProblemShape, e: int) -> Cost:
    """x → x̂: encode and decode."""
    return topk_encode(s, e) + gather_sum(s, e)


def backward(s: ProblemShape, e: int) -> Cost:
    """The gradients of both weights from the gradient of x̂."""
    return decode_backward(s, e) + encode_backward(s, e)


def step(s: ProblemShape, e: int, dead: int = 0, k_aux: int = 0) -> tuple[Cost, ...]:
    """The sequential parts of a training step, whose rooflines add up: forward and backward of the
    SAE, Adam of two weights, and, for AuxK, forward and backward among `dead` latents."""
    parts = [topk_encode(s, e), gather_sum(s, e), backward(s, e), adam(s), adam(s)]
    if dead:
        aux = s._replace(m=dead, k=min(k_aux, dead))
        parts += [topk_encode(aux, e), gather_sum(aux, e), backward(aux, e)]
    return tuple(parts)
