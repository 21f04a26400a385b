"""The least FLOPs and bytes that each piece of work needs.

Each input is read once and each output written once. Gathering from a weight reads at most
min(N·K, M) different rows of it. Indices have 8 bytes. A FLOP is one multiplication or addition.

Legend: L layers, N tokens (of all layers, in a training step), D inputs, M latents, K active
latents per token, Q dead latents, e bytes per number.
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


class TrainShape(NamedTuple):
    """The sizes of a training step of an SAE of L layers: a part of N tokens, and the optimizer."""

    name: str
    layers: int
    n: int
    d: int
    m: int
    k: int
    dead: int = 0
    """Dead latents; AuxK activates `k_aux` of them per token and layer."""
    k_aux: int = 0

    @property
    def encode(self) -> ProblemShape:
        """Its encode, of L · N vectors."""
        return ProblemShape(self.name, self.layers * self.n, self.d, self.m, self.k)


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


def standardize(s: ProblemShape, e: int) -> Cost:
    """x (N, D) → (N, D), with a mean and a standard deviation of 4 bytes per token, and per
    dimension one center of 4 bytes and two moments of 8. Per number about 10 FLOPs: 4 for mean and
    spread over D, 2 to standardize, 1 to center, 3 for the moments over N."""
    return Cost(10 * s.n * s.d, 2 * e * s.n * s.d + 8 * s.n + 20 * s.d)


def reconstruction_error(s: ProblemShape, e: int) -> Cost:
    """x and x̂ (N, D) → the error (N, D); mean, standard deviation and moments as in `standardize`,
    and no center. Per number 10 FLOPs: 3 for x − x̂, 2 for its square, 1 to standardize it, 4 for
    its moments."""
    return Cost(10 * s.n * s.d, 3 * e * s.n * s.d + 8 * s.n + 16 * s.d)


def decode_error(s: ProblemShape, e: int) -> Cost:
    """`gather_sum` and a bias of 4 bytes per dimension, then `reconstruction_error`: x̂ is neither
    written nor read."""
    both = gather_sum(s, e) + reconstruction_error(s, e)
    return both + Cost(s.n * s.d, 4 * s.d - 2 * e * s.n * s.d)


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


def tangent_momentum(s: ProblemShape, e: int, unit_norm: bool) -> Cost:
    """NorMuon's momentum of a float32 weight (M, D): reads gradient and moment, and the weight with
    `unit_norm`; writes the moment, and a direction of e bytes."""
    return Cost(10 * s.m * s.d, (16 if unit_norm else 12) * s.m * s.d + e * s.m * s.d)


def apply_rows(s: ProblemShape, e: int) -> Cost:
    """NorMuon's step of a float32 weight (M, D), by an update of e bytes: reads both, writes the
    weight; reads and writes a number per row."""
    return Cost(8 * s.m * s.d, (8 + e) * s.m * s.d + 8 * s.m)


def normuon(s: ProblemShape, e: int, unit_norm: bool) -> Cost:
    """NorMuon's update of a float32 weight (M, D): 4 M D² FLOPs in e bytes, which read the
    direction twice and write the update. What is (D, D) is left out."""
    products = Cost(4 * s.m * s.d**2, 3 * e * s.m * s.d)
    return tangent_momentum(s, e, unit_norm) + products + apply_rows(s, e)


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


def csc_by_latent(s: ProblemShape) -> Cost:
    """indices (N, K) → as many selections, sorted by latent, and M + 1 offsets. A sort reads and
    writes several times; this is the least."""
    return Cost(0, 8 * (2 * s.n * s.k + s.m + 1))


def sum_by_latent(s: ProblemShape, e: int) -> Cost:
    """values (N, K), sorted by latent → (M,) float32."""
    return Cost(s.n * s.k, s.n * s.k * (e + 8) + 4 * s.m)


def product(n: int, m: int, d: int, e: int) -> Cost:
    """(N, D) @ (D, M) → (N, M): 2 N D M FLOPs."""
    return Cost(2 * n * d * m, e * (n * d + m * d + n * m))


def aux(s: ProblemShape, e: int) -> tuple[Cost, ...]:
    """AuxK among M dead latents, as dense products: scores, the K largest kept, reconstruction,
    what it misses of the error, the codes' gradient, and both weights' gradients."""
    down = product(s.n, s.m, s.d, e)
    up = product(s.n, s.d, s.m, e) + Cost(0, (4 - e) * s.n * s.d)  # stored in float32
    masked = Cost(s.n * s.m, 3 * e * s.n * s.m)
    weights = product(s.m, s.d, s.n, e)
    return down, keep_topk(s, e), up, aux_residual(s, e), down, masked, weights, weights


def training_step(t: TrainShape, e: int, optimizer: str = "adam") -> tuple[Cost, ...]:
    """What a training step must do: one part of a batch, then the optimizer of both
    weights."""
    return training_part(t, e) + optimizer_step(t, e, optimizer)


def training_part(t: TrainShape, e: int) -> tuple[Cost, ...]:
    """Forward and backward of a part of a batch, with weights and gradients in float32, copies of
    the weights in e bytes, and residuals in e bytes."""
    s = t.encode
    wide = Cost(0, (4 - e) * s.m * s.d)  # gradients are in float32
    parts = [standardize(s, e), topk_encode(s, e), decode_error(s, e), gather_dot(s, e)]
    parts += [csc_by_latent(s), scatter_outer(s, e) + wide, scatter_outer(s, e) + wide]
    parts += [sum_by_latent(s, e)]
    if t.dead:
        parts += aux(s._replace(m=t.dead, k=min(t.k_aux, t.dead)), e)
    return tuple(parts)


def optimizer_step(t: TrainShape, e: int, optimizer: str = "adam") -> tuple[Cost, ...]:
    """The update of both weights, and of their copies in e bytes."""
    s = t.encode
    copies = Cost(0, 2 * e * s.m * s.d)
    orthogonal = [normuon(s, e, unit_norm) for unit_norm in (False, True)]
    return (copies, *(orthogonal if optimizer == "normuon" else [adam(s), adam(s)]))
