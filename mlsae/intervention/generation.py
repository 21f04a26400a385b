"""What a transformer goes on with, token by token.

Legend: T tokens of the prompt, N tokens that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from ..errors import InputError


def continue_ids(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    watch: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """The ids (N,) that `model` adds to ids (T,), up to EOS: the likeliest each time at temperature
    0, else drawn by `seed`. `watch` is given those so far after each token, and may end it by
    returning True.

    Raises InputError if predictions become NaN.
    """
    if max_new_tokens == 0:
        return ids[:0]
    sampling = temperature > 0
    options = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling,
        temperature=temperature if sampling else 1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )

    def ends(whole: Tensor, _scores: Any, **_options: Any) -> Tensor:
        end = watch is not None and watch(whole[0, len(ids) :])
        return torch.full((len(whole),), end, device=whole.device)

    torch.manual_seed(seed)
    whole: Tensor = model.generate(
        ids[None],
        options,
        attention_mask=torch.ones_like(ids[None]),
        logits_processor=[_checked_logits],
        stopping_criteria=[ends],
    )
    return whole[0, len(ids) :]


def check_finite(predictions: Tensor) -> None:
    """Raise InputError if predictions are NaN."""
    if predictions.isnan().any():
        raise InputError(
            "--add, --scale and --clamp must leave the model's predictions finite, and with these "
            "changes they are not; change less, or check that the model is whole"
        )


def _checked_logits(_ids: Tensor, logits: Tensor) -> Tensor:
    """The logits of a step of `generate`, checked."""
    check_finite(logits)
    return logits
