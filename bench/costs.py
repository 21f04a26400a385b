"""What each piece of work cannot do without: FLOPs and bytes.

Bytes count each input once and each output once. Of a weight that is gathered from, only as many
rows are counted as can differ: min(N·K, M). Indices have 8 bytes. A FLOP is a product or a sum.

Legend: N tokens, D inputs, M latents, K active latents a token, Q dead latents, e bytes a number.
"""

from __future__ import annotations

from typing import NamedTuple

from .shapes import Shape


class Cost(NamedTuple):
    """What a piece of work takes at least."""

    flop: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(self.flop + other.flop, self.bytes + other.bytes)

    def floor(self, flop_per_second: float, bytes_per_second: float) -> float:
        """Seconds below which no implementation can go: max(FLOPs / rate, bytes / bandwidth)."""
        return max(self.flop / flop_per_second, self.bytes / bytes_per_second)


def topk_encode(s: Shape, e: int) -> Cost:
    """x (N, D), W (M, D) → values, indices (N, K): 2 N D M FLOPs."""
    return Cost(2 * s.n * s.d * s.m, e * (s.n * s.d + s.m * s.d) + s.n * s.k * (e + 8))


def gather_sum(s: Shape, e: int) -> Cost:
    """values, indices (N, K), rows of W (M, D) → (N, D): 2 N K D FLOPs."""
    rows = min(s.n * s.k, s.m)
    return Cost(2 * s.n * s.k * s.d, e * (rows * s.d + s.n * s.d) + s.n * s.k * (e + 8))


def gather_dot(s: Shape, e: int) -> Cost:
    """x (N, D), indices (N, K), rows of W (M, D) → (N, K): the same numbers move as in
    `gather_sum`, the other way."""
    return gather_sum(s, e)


def scatter_outer(s: Shape, e: int) -> Cost:
    """values (N, K) in order, x (N, D) → (M, D), all of it written: 2 N K D FLOPs."""
    return Cost(2 * s.n * s.k * s.d, e * (s.m * s.d + s.n * s.d) + s.n * s.k * (e + 8))


def adam(s: Shape) -> Cost:
    """One float32 weight (M, D): it, its gradient and two moments read, all but the gradient
    written: 28 bytes and about 15 FLOPs a parameter."""
    return Cost(15 * s.m * s.d, 28 * s.m * s.d)


def encode_backward(s: Shape, e: int) -> Cost:
    """The gradient of W_enc: one `scatter_outer`."""
    return scatter_outer(s, e)


def decode_backward(s: Shape, e: int) -> Cost:
    """The gradients of the values and of W_dec: `gather_dot` and `scatter_outer`."""
    return gather_dot(s, e) + scatter_outer(s, e)


def forward(s: Shape, e: int) -> Cost:
    """x → x̂: encode and decode."""
    return topk_encode(s, e) + gather_sum(s, e)


def backward(s: Shape, e: int) -> Cost:
    """The gradients of both weights, from one of x̂."""
    return decode_backward(s, e) + encode_backward(s, e)


def step(s: Shape, e: int, dead: int = 0, k_aux: int = 0) -> tuple[Cost, ...]:
    """A training step in parts that follow one another, so that its floor is the sum of theirs:
    forward and backward of the SAE, the same among `dead` latents for AuxK, Adam of two weights.
    """
    parts = [topk_encode(s, e), gather_sum(s, e), backward(s, e), adam(s), adam(s)]
    if dead:
        aux = s._replace(m=dead, k=min(k_aux, dead))
        parts += [topk_encode(aux, e), gather_sum(aux, e), backward(aux, e)]
    return tuple(parts)
