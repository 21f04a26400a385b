"""Massive activations: the tokens that an SAE leaves out, beside special ones.

In many transformers a few vectors have norms tens to thousands of times those of all others: at the
first position, whatever its token, or at a delimiter (attention sinks; Sun et al., arXiv
2402.17762). They would make nearly all of the variance, so that the loss and FVU would be theirs.

    token n is massive:   |x[ℓ, n]| > ratio · median_n |x[ℓ, n]|   at any layer ℓ

|x| is not centered, as massive vectors move the mean. The ratio 10 is the one that
dictionary_learning recommends. A token is dropped at all layers if it is massive at one, so that
all layers have the same tokens.

Legend: L layers, B rows, T positions, N tokens, D width of the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .config import DataConfig

MASSIVE = 10.0
"""The ratio of `--drop_norm auto`."""
_TOP_SHARE = 0.5  # of the variance, in 1 % of the vectors: more is worth a word
_NAMED = 4  # positions and tokens


@dataclass(frozen=True)
class DropRule:
    """Which tokens are dropped, beside special ones."""

    positions: tuple[int, ...] = ()
    """Positions in a row."""
    tokens: tuple[int, ...] = ()
    """Token ids."""
    norm: float | None = None
    """Drop what is massive by this ratio. None: nothing."""
    medians: tuple[float, ...] = ()
    """The median norm of each layer, fixed when it was measured; with `norm` only."""

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> DropRule:
        """The rule that `as_dict` gave; without an entry, nothing is dropped. Raises InputError for
        anything else."""
        names = ("positions", "tokens", "medians")
        values = [saved.get(name, ()) for name in names] if isinstance(saved, dict) else [None]
        norm = saved.get("norm") if isinstance(saved, dict) else None
        numbers = [norm if norm is not None else 0.0]
        for value in values:
            numbers.extend(value if isinstance(value, (list, tuple)) else [None])
        if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in numbers):
            raise InputError(
                f"dropped must hold lists of numbers, {', '.join(names)}, and the number norm, got "
                f"{saved!r}; repair the file it was read from, or measure again"
            )
        return cls(norm=norm, **{n: tuple(v) for n, v in zip(names, values, strict=True)})

    def as_dict(self) -> dict[str, Any]:
        """JSON-serializable."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def keeps_places(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) → (B, T) bool: what neither its position nor its id drops."""
        positions = torch.arange(input_ids.shape[-1], device=input_ids.device)
        dropped = torch.isin(positions, positions.new_tensor(self.positions))
        return ~(dropped | torch.isin(input_ids, input_ids.new_tensor(self.tokens)))

    def keeps_norms(self, norms: Tensor) -> Tensor:
        """norms (L, N) → (N,) bool: the tokens that are massive at no layer.

        A norm that is not finite is kept, so that training stops at it. A layer whose median norm
        is 0 drops nothing.
        """
        if self.norm is None:
            return torch.ones(norms.shape[1], dtype=torch.bool, device=norms.device)
        limits = self.norm * norms.new_tensor(self.medians)[:, None]
        return ~((norms > limits) & (limits > 0) & norms.isfinite()).any(0)

    def __str__(self) -> str:
        """In words: "position 0; norms above 10 × the median of their layer"; "" for nothing."""
        parts = []
        for name, values in (("position", self.positions), ("token id", self.tokens)):
            if values:
                parts.append(f"{name}{'s' * (len(values) > 1)} {', '.join(map(str, values))}")
        if self.norm is not None:
            parts.append(f"norms above {self.norm:g} × the median of their layer")
        return "; ".join(parts)


def rule_of_places(config: DataConfig, tokenizer: Any, seq_len: int) -> DropRule:
    """The rule of `config.drop_positions` and `config.drop_tokens`: all but norms.

    Raises InputError for a position outside of the row, for text that is not one token, or for a
    ratio of norms that is not above 1.
    """
    ratio = config.drop_norm
    if not isinstance(ratio, str) and not 1 < ratio < math.inf:
        raise InputError(f"--drop_norm must be greater than 1, or auto or off, got {ratio:g}")
    for position in config.drop_positions:
        if not 0 <= position < seq_len:
            raise InputError(
                f"--drop_positions must be in [0, {seq_len - 1}] (a row has {seq_len} tokens; see "
                f"--seq_len), got {position}"
            )
    ids = [_token_id(token, tokenizer) for token in config.drop_tokens]
    return DropRule(tuple(sorted(set(config.drop_positions))), tuple(sorted(set(ids))))


def _token_id(token: str, tokenizer: Any) -> int:
    """The id that a number, a token of the vocabulary, or a text names."""
    if token.isascii() and token.isdigit():
        if int(token) < len(tokenizer):
            return int(token)
        raise InputError(
            f"--drop_tokens must be in [0, {len(tokenizer) - 1}] (the tokenizer's ids), got {token}"
        )
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if token in vocabulary:
        return vocabulary[token]
    ids: list[int] = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(
            f"--drop_tokens must be ids or texts of one token each, and {token!r} has {len(ids)} "
            f"(ids {' '.join(map(str, ids)) or 'none'}); give ids"
        )
    return ids[0]


class Massive(NamedTuple):
    """Which of N tokens are massive, by what ratio, and how much longer than others they are."""

    token: Tensor
    """(N,) bool."""
    ratio: float
    times: Tensor
    """(N,) |x| over the median of the layer, at the layer where it is the most."""


def resolve_norm(
    rule: DropRule, setting: float | Literal["auto", "off"], norms: Tensor
) -> tuple[DropRule, Massive]:
    """`rule` with what `setting` (`--drop_norm`) says of norms (L, N), and what is massive. auto:
    as 10 if anything is, else off."""
    ratio = MASSIVE if isinstance(setting, str) else float(setting)
    medians = tuple(norms.median(1).values.tolist())
    by_norm = replace(rule, norm=ratio, medians=medians)
    token = ~by_norm.keeps_norms(norms)
    times = (norms / norms.new_tensor(medians)[:, None]).nan_to_num(0, 0).amax(0)
    drops = setting != "off" and (setting != "auto" or bool(token.any()))
    return (by_norm if drops else rule), Massive(token, ratio, times)


def describe_massive(
    massive: Massive, input_ids: Tensor, token_mask: Tensor, tokenizer: Any, dropped: bool
) -> str:
    """One line: how many tokens are massive, where, and whether they are dropped; "" if none are.

    The N tokens are those of input_ids (B, T) that token_mask (B, T) leaves. Positions, then token
    ids, are named if most of their occurrences are massive, and there are several; of all others
    the longest vector is.
    """
    if not massive.token.any():
        return ""
    position, ids = token_mask.nonzero()[:, 1], input_ids[token_mask]
    left, places = massive.token.clone(), []
    for name, values in (("position", position), ("token", ids)):
        occurrences, hits = torch.bincount(values), torch.bincount(values[left])
        occurrences = occurrences[: len(hits)]
        most = (hits > occurrences / 2) & (occurrences > 1)
        named = sorted(most.nonzero()[:, 0].tolist(), key=lambda i: -hits[i])
        for i in named[:_NAMED]:
            text = f" {tokenizer.decode([i])!r}" if name == "token" else ""
            places.append(f"{name} {i}{text} ({hits[i]} of {occurrences[i]})")
            left &= values != i
    if left.any():
        n = int(torch.where(left, massive.times, 0).argmax())
        places.append(
            f"{int(left.sum()):,} elsewhere, the longest token {ids[n]} "
            f"{tokenizer.decode([ids[n]])!r} at position {position[n]}"
        )
    count, ratio = int(massive.token.sum()), massive.ratio
    per_row = f"{count / len(input_ids):.2g} per row"
    fate = (
        f"dropped at all layers ({per_row}); keep them with --drop_norm off"
        if dropped
        else f"kept ({per_row}); drop them with --drop_norm {ratio:g}"
    )
    return (
        f"{count:,} of {len(ids):,} tokens have a norm above {ratio:g} × the median of a layer, up "
        f"to {massive.times.max():,.0f} ×: {', '.join(places)}. They are {fate}"
    )


def describe_top_share(top_share: Sequence[float], layers: Sequence[int]) -> str:
    """A word if 1 % of the vectors carry most of the variance of a layer (`metrics.top_share`), of
    the layer where they carry the most; else ""."""
    share, layer = max(zip(top_share, layers, strict=True))
    if not share > _TOP_SHARE:
        return ""
    return (
        f"1 % of the vectors carry {share:.0%} of the variance at layer {layer}, so FVU is mostly "
        "theirs; see --drop_norm, --drop_positions and --drop_tokens"
    )
