"""Follow the positions of a model's forward passes, also while it generates.

Legend: B rows, T positions of a pass, W positions in all, those before the pass included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .positions import Positions, locate

# A pass with a KV cache is given its new tokens only. How many came before is told by the width of
# attention_mask, or the length of the cache, but a state-space model may have neither. What every
# model has in generation is `prepare_inputs_for_generation`, which is given the whole text of each
# step; and only `generate` knows where the prompt ends, since without a cache each step looks like
# a prompt. So both are wrapped while an intervention lasts.

_CACHES = ("cache", "past_key_values", "cache_params", "state", "mems")
"""The names of the argument that holds a cache; the first one since transformers 5.24."""


class PositionTracker:
    """The positions of the forward pass of `model` that is running.

    In `generate`, the prompt is what it was given. In a pass called by hand it is the whole row, or
    with a cache the row of the pass that began it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.positions: Positions | None = None  # of the pass that is running
        self._mask: Tensor | None = None  # (B, W) of the last pass
        self._step: tuple[int, Tensor | None] | None = None  # W and (B, W), from generation
        self._prompt: int | None = None  # columns
        self._embedded = (
            0  # columns of a prompt that was given as embeddings, and is not in the ids
        )
        self._generating = self._begun = False

    @contextmanager
    def following(self) -> Iterator[None]:
        """Within the context, `positions` are known while the model runs."""
        names = ("generate", "prepare_inputs_for_generation")
        own = {name: vars(self.model).get(name) for name in names}  # of an outer intervention, say
        handles = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end, always_call=True),
        ]
        for name, wrap in zip(names, (self._wrap_generate, self._wrap_prepare), strict=True):
            if hasattr(self.model, name):
                setattr(self.model, name, wrap(getattr(self.model, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, value in own.items():
                vars(self.model).pop(name, None)
                if value is not None:
                    setattr(self.model, name, value)

    def _wrap_generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def wrapped(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            if self._generating:  # a model that drafts for itself; the prompt is that of the user
                return generate(inputs, *args, **kwargs)
            ids: Tensor | None = kwargs.get("input_ids") if inputs is None else inputs
            embeddings: Tensor | None = kwargs.get("inputs_embeds")
            mask: Any = kwargs.get("attention_mask")
            self._embedded = 0 if ids is not None or embeddings is None else embeddings.shape[1]
            width = self._embedded if ids is None else ids.shape[1]
            self._prompt = max(width, 1, *(mask.shape[1:] if _is_flat(mask) else ()))
            self._generating, self._begun = True, False
            try:
                return generate(inputs, *args, **kwargs)
            finally:
                self._generating, self._prompt, self._step = False, None, None

        return wrapped

    def _wrap_prepare(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(prepare)
        def wrapped(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            mask = kwargs.get("attention_mask")
            mask = mask if _is_flat(mask) else None
            width = self._embedded + input_ids.shape[1] if mask is None else mask.shape[1]
            self._step = (width, mask)
            return prepare(input_ids, *args, **kwargs)

        return wrapped

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = _tokens(args, kwargs)
        rows, n_new = tokens.shape[:2]
        if self._step is not None:
            width, mask = self._step
            self._step = None
            if not self._begun:
                self._prompt, self._begun = max(self._prompt or 0, width), True
        else:
            mask = kwargs.get("attention_mask")
            if mask is not None and not _is_flat(mask):
                raise InputError(
                    "attention_mask must be (rows, tokens) in an intervention, which counts "
                    f"positions by it, got {_kind(mask)}"
                )
            width = n_new + self._past(kwargs) if mask is None else mask.shape[1]
        if self._prompt is None or (width == n_new and not self._generating):
            self._prompt = width
        self._mask = self._whole_mask(mask, (rows, width), width - n_new, tokens.device)
        self.positions = locate(self._mask, n_new, self._prompt)

    def _end(self, *_: Any) -> None:
        self.positions = None

    def _whole_mask(
        self, mask: Tensor | None, shape: tuple[int, int], past: int, device: torch.device
    ) -> Tensor:
        """The mask (B, W) of a pass, bool: as given; or else no padding, but for what the last pass
        had, if that was of the `past` columns."""
        if mask is not None:
            return mask.to(device).bool()
        whole = torch.ones(shape, dtype=torch.bool, device=device)
        last = self._mask
        if past and last is not None and last.shape == (shape[0], past):
            whole[:, :past] = last.to(device)
        return whole

    def _past(self, kwargs: dict[str, Any]) -> int:
        """How many positions the caches among the arguments hold."""
        cache = next((kwargs[n] for n in _CACHES if kwargs.get(n) is not None), None)
        if cache is None:
            return 0
        try:
            return int(cache.get_seq_length())
        except (AttributeError, ValueError):  # a state, which has no length
            return 0 if self._mask is None else self._mask.shape[1]


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a forward pass reads: ids (B, T) or embeddings (B, T, D)."""
    for part in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if isinstance(part, Tensor) and part.shape[1]:  # ids are empty beside embeddings
            return part
    raise InputError("input_ids or inputs_embeds must be given to the model, got neither")


def _is_flat(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def _kind(mask: Any) -> str:
    return f"the shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
