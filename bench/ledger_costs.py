"""What one call moves: each of this package's ops by its cost, each of torch's by its tensors.

The package's ops are looked up by name, and their sizes are read off the arguments. An op that is
not here cannot be counted, and the ledger says so.

Legend: N tokens, D inputs, M latents, K active latents per token, Q dead latents.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from sparse_topk import costs, torch_ops
from sparse_topk.costs import Cost

from .shapes import ProblemShape


class Moved(NamedTuple):
    """What one call moves and multiplies."""

    bytes: float
    """Read from and written to memory."""
    flop: float = 0.0
    """Of half-precision matrix products; of others, where memory is the limit, 0."""
    gathered: float = 0.0
    """Bytes of rows that are read wherever an index points, each as often as it is named."""
    table: float = 0.0
    """Bytes of all the rows that are gathered from."""


Arguments = dict[str, Any]


def _shape(n: int, k: int, d: int, m: int) -> ProblemShape:
    return ProblemShape("", n, d, m, k)


def _gathers(cost: Cost, s: ProblemShape, table: Tensor) -> Moved:
    rows = s.n * s.k * s.d * table.element_size()
    return Moved(cost.bytes, 0.0, rows, table.nbytes)


def _topk_encode(a: Arguments) -> Moved:
    x, m = a["x"], len(a["W"] if a.get("latents") is None else a["latents"])
    cost = costs.topk_encode(_shape(len(x), a["k"], x.shape[1], m), x.element_size())
    return Moved(cost.bytes, cost.flop)


def _gather_sum(a: Arguments) -> Moved:
    (n, k), (m, d), e = a["indices"].shape, a["W"].shape, a["W"].element_size()
    s = _shape(n, k, d, m)
    return _gathers(costs.gather_sum(s, e), s, a["W"])


def _scatter_outer(a: Arguments) -> Moved:
    x, (n, k) = a["x"], a["values"].shape
    s = _shape(n, k, x.shape[1], len(a["csc"].indptr) - 1)
    into = a.get("out") is not None
    e = x.element_size()
    if into:
        return _gathers(costs.scatter_outer_add(s, e), s, x)
    wide = (a["dtype"].itemsize - e if a.get("dtype") else 0) * s.m * s.d
    return _gathers(costs.scatter_outer(s, e) + Cost(0, wide), s, x)


def _csc_by_latent(a: Arguments) -> Moved:
    n, k = a["indices"].shape
    return Moved(costs.csc_by_latent(_shape(n, k, 0, a["n_latents"])).bytes)


def _sum_by_latent(a: Arguments) -> Moved:
    (n, k), e = a["values"].shape, a["values"].element_size()
    return Moved(costs.sum_by_latent(_shape(n, k, 0, len(a["csc"].indptr) - 1), e).bytes)


def _adam(a: Arguments) -> Moved:
    shadow = 0 if a.get("shadow") is None else a["shadow"].nbytes
    moments = 2 * (a["exp_avg"].nbytes + a["exp_avg_sq"].nbytes)
    return Moved(2 * a["weight"].nbytes + a["grad"].nbytes + moments + shadow)


def _tangent_momentum(a: Arguments) -> Moved:
    (m, d), e = a["weight"].shape, a["dtype"].itemsize
    cost = costs.tangent_momentum(_shape(0, 0, d, m), e, a["unit_norm"])
    return Moved(cost.bytes)


def _apply_rows(a: Arguments) -> Moved:
    (m, d), shadow = a["weight"].shape, 0 if a.get("shadow") is None else a["shadow"].nbytes
    cost = costs.apply_rows(_shape(0, 0, d, m), a["update"].element_size())
    return Moved(cost.bytes + shadow)


def _standardize(a: Arguments) -> Moved:
    x, e = a["x"], a["dtype"].itemsize
    s = _shape(x[..., 0].numel(), 0, x.shape[-1], 0)
    return Moved(costs.standardize(s, e).bytes + _wider(x, e))


def _decode_error(a: Arguments) -> Moved:
    x, W = a["x"], a["W"]
    s, e = _shape(x[..., 0].numel(), a["indices"].shape[1], x.shape[-1], len(W)), W.element_size()
    moved = _gathers(costs.decode_error(s, e), s, W)
    return moved._replace(bytes=moved.bytes + _wider(x, e))


def _reconstruction_error(a: Arguments) -> Moved:
    x, e = a["x"], a["x_hat"].element_size()
    s = _shape(x[..., 0].numel(), 0, x.shape[-1], 0)
    return Moved(costs.reconstruction_error(s, e).bytes + _wider(x, e))


def _wider(x: Tensor, e: int) -> int:
    """What x takes beyond e bytes a number: costs are of one dtype."""
    return x.numel() * (x.element_size() - e)


def _decode_backward(a: Arguments) -> Moved:
    W, (n, k) = a["W"], a["indices"].shape
    s, e = _shape(n, k, W.shape[1], len(W)), W.element_size()
    epilogue = Cost(0, 2 * e * n * k + (4 + e) * n)  # values and σ in, scaled values and scale out
    return _gathers(costs.gather_dot(s, e) + epilogue, s, W)


def _note_active(a: Arguments) -> Moved:
    (n, k), e = a["values"].shape, a["values"].element_size()
    return Moved(n * k * (e + 8) + 8 * len(a["last_active"]))


def _merge_moments(a: Arguments) -> Moved:
    return Moved(6 * a["a"].mean.numel() * 8)


def _keep_topk(a: Arguments) -> Moved:
    n, q = a["z"].shape
    return Moved(costs.keep_topk(_shape(n, a["k"], 0, q), a["z"].element_size()).bytes)


def _aux_residual(a: Arguments) -> Moved:
    error = a["error"]
    s = _shape(len(error), 0, error.shape[1], 0)
    return Moved(costs.aux_residual(s, error.element_size()).bytes)


OPS: dict[str, Callable[[Arguments], Moved]] = {
    "topk_encode": _topk_encode,
    "gather_sum": _gather_sum,
    "gather_dot": _gather_sum,
    "csc_by_latent": _csc_by_latent,
    "scatter_outer": _scatter_outer,
    "sum_by_latent": _sum_by_latent,
    "adam_unit_norm_": _adam,
    "apply_rows_": _apply_rows,
    "tangent_momentum_": _tangent_momentum,
    "standardize": _standardize,
    "decode_backward": _decode_backward,
    "decode_error": _decode_error,
    "merge_moments": _merge_moments,
    "note_active_": _note_active,
    "reconstruction_error": _reconstruction_error,
    "keep_topk_": _keep_topk,
    "aux_residual": _aux_residual,
}
"""The package's ops, by name."""


def moved_by_op(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moved:
    """What a call of one of the package's ops moves. Raises KeyError if it is not in `OPS`."""
    if name not in OPS:
        raise KeyError(f"bench/ledger_costs.py has no cost of the op {name}: add it to OPS")
    signature = inspect.signature(getattr(torch_ops, name))
    bound = signature.bind(*args, **{k: v for k, v in kwargs.items() if k in signature.parameters})
    bound.apply_defaults()
    return OPS[name](bound.arguments)


# Torch's own operators, by the last part of their names.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_FREE |= {"lift_fresh", "squeeze_", "unsqueeze_", "detach_", "set_", "_local_scalar_dense"}
_FREE |= {"scalar_tensor"}  # on the host: the number in where(mask, tensor, 0)
_OVERWRITE = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_"}
_GATHER = {"index", "index_select", "embedding", "gather", "_unsafe_index"}
_SCATTER = {"index_put_", "index_add_", "scatter_", "scatter_add_", "index_copy_", "index_fill_"}
_PRODUCT = {"mm", "addmm", "bmm", "baddbmm"}


def tensors(*values: Any) -> list[Tensor]:
    """The tensors within arguments or results."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def size_of(tensor: Tensor) -> int:
    """Bytes that a pass over the tensor touches: an expanded dimension is one element."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(n if stride else min(n, 1) for n, stride in sizes) * tensor.element_size()


def moved_by_torch(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Moved | None:
    """What a call of torch's operator `func` moves; None if it launches nothing: a view, or an
    allocation."""
    name = func._schema.name.split("::")[-1]
    if name in _FREE:
        return None
    given = tensors(args, kwargs)
    storages = {t.untyped_storage()._cdata for t in given}
    made = [t for t in tensors(result) if t.untyped_storage()._cdata not in storages]
    read, changed = _read_and_changed(func, args, kwargs)
    if not made and not changed:
        return None
    written = sum(map(size_of, made + changed))
    if name in _GATHER and made:
        read_bytes = min(size_of(read[0]), written) + sum(map(size_of, read[1:]))
    elif name in _SCATTER:  # as many elements as there are values
        read_bytes = sum(map(size_of, read[1:]))
        written = min(written, max(map(size_of, read[1:]), default=0))
    else:
        read_bytes = sum(map(size_of, read))
    flop = 0.0
    if name in _PRODUCT:
        a, b = given[-2:] if name in ("addmm", "baddbmm") else given[:2]
        flop = 2.0 * a.numel() * b.shape[-1] if a.element_size() == 2 else 0.0
    return Moved(read_bytes + written, flop)


def _read_and_changed(
    func: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that a call reads, and those of its arguments that it writes to."""
    read, changed = [], []
    for i, argument in enumerate(func._schema.arguments):
        given = tensors(args[i] if i < len(args) else kwargs.get(argument.name))
        written = argument.alias_info is not None and argument.alias_info.is_write
        overwritten = argument.is_out or func._schema.name.split("::")[-1] in _OVERWRITE
        changed += given if written else []
        read += [] if written and overwritten else given
    return read, changed
