"""Copies of weights in the dtype that a step computes in, made again when the weight has changed.

Legend: "…" any shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Shadow(NamedTuple):
    copy: Tensor
    """(…) in the shadows' dtype."""
    source: Tensor
    """(…) the memory that was copied. While it is held here, no other tensor has its address."""
    version: int
    """That of the weight when it was copied: writing to a tensor counts it up."""


class Shadows:
    """Copies of weights in `dtype`, never stale:

        shadows = Shadows(torch.bfloat16)
        optimizer = UnitNormAdam(sae.parameter_groups(), shadows=shadows)
        W = shadows.of(sae.W_dec)

    `of` copies a weight when it is first asked for, and again after the weight was written to or
    given other memory: by `load_state_dict`, an edit under `no_grad`, or `weight.data = …`. A step
    of a `UnitNormAdam` that has the shadows writes them with the weights, so `of` need not. A
    copy's own memory stays the same, as a CUDA graph wants it, while the weight's shape and device
    do.

    Two edits cannot be seen, as autograd does not see them either: writing in place to
    `weight.data`, as in `weight.data.mul_(2)`, and the step of a torch optimizer with `fused=True`.
    Edit the weight itself under `torch.no_grad()`, or call `clear`.

    A copy lives as long as its weight. Copies are not saved, pickled, or copied with the rest.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._shadows: Any = WeakTensorKeyDictionary()

    def of(self, weight: Tensor) -> Tensor:
        """The weight (…) in `dtype`, detached; the weight itself if it has it.

        Tensors that stand for others, such as DTensors, and inference tensors, which do not count
        their changes, are cast each time.
        """
        if weight.dtype == self.dtype:
            return weight
        if weight.is_inference() or not is_plain(weight):
            return weight.detach().to(self.dtype)
        shadow = self._shadows.get(weight)
        if shadow is not None and _is_fresh(shadow, weight):
            return shadow.copy
        copy = self.to_write(weight)
        if copy is None:
            copy = torch.empty_like(weight, dtype=self.dtype, requires_grad=False)
        copy.copy_(weight.detach())
        self._record(weight, copy)
        return copy

    def to_write(self, weight: Tensor) -> Tensor | None:
        """The memory of the weight's copy, for whoever writes weight and copy at once and then
        calls `written`. None if no copy was asked for, or it would be of another kind."""
        shadow = self._shadows.get(weight)
        if shadow is None:
            return None
        copy = shadow.copy
        fits = copy.shape == weight.shape and copy.device == weight.device
        return copy if fits and copy.stride() == weight.stride() else None

    def written(self, weight: Tensor) -> None:
        """Say that what `to_write` gave now holds the weight."""
        self._record(weight, self._shadows[weight].copy)

    def clear(self) -> None:
        """Drop all copies."""
        self._shadows.clear()

    def _record(self, weight: Tensor, copy: Tensor) -> None:
        self._shadows[weight] = _Shadow(copy, weight.detach(), weight._version)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shadows, (self.dtype,)


def is_plain(tensor: Tensor) -> bool:
    """Whether torch's operators work on the tensor's own memory: a Tensor or Parameter, and no
    class that stands for other tensors. A FakeTensor passes for one: it has shapes only."""
    plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain or isinstance(tensor, FakeTensor)


def _is_fresh(shadow: _Shadow, weight: Tensor) -> bool:
    source = shadow.source
    return (
        shadow.version == weight._version
        and source.shape == weight.shape
        and source.stride() == weight.stride()
        and (isinstance(weight, FakeTensor) or source.data_ptr() == weight.data_ptr())
    )
