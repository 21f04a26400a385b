"""Steer a transformer by the latents of an MLSAE: `python -m mlsae.steer`.

Legend: T positions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..analysis.geometry import token_strings
from ..files import check_folder, write_file
from .activations import Activations, read_activations
from .command_line import SteerConfig, changes_of
from .context import intervene
from .edits import Change, Edit
from .effects import Effects, measure_effects
from .generation import check_finite, continue_ids
from .opening import open_run
from .positions import shown_where


@dataclass(frozen=True)
class Steered:
    """What came of changes."""

    config: SteerConfig
    model: str
    changes: list[Change]
    tokens: list[str]
    """The prompt's, T of them."""
    continuations: tuple[str, str]
    """Without changes, and with them."""
    effects: Effects
    strings: list[str]
    """The text of each token of the vocabulary."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-serializable: all that is shown, and at every position."""
        up, down = self.effects.next_tokens(self.config.show)
        named = [[entry | {"token": self.strings[entry["id"]]} for entry in e] for e in (up, down)]
        return {
            "run": str(self.config.run),
            "model": self.model,
            "prompt": self.config.prompt,
            "tokens": self.tokens,
            "changes": [_as_dict(change) for change in self.changes],
            "max_new_tokens": self.config.max_new_tokens,
            "temperature": self.config.temperature,
            "seed": self.config.seed,
            "baseline": self.continuations[0],
            "steered": self.continuations[1],
            "kl": self.effects.kl().tolist(),
            "next_token": {"up": named[0], "down": named[1]},
            "latents": [entry._asdict() for entry in self.effects.latents],
        }


def steer(config: SteerConfig) -> Steered:
    """Generate with and without the changes of `config`, and measure what they do to the prompt.

    Raises InputError for bad input, before anything is generated, and if predictions become NaN.
    """
    changes = changes_of(config)
    if config.save is not None:
        check_folder(config.save.parent, "--save", files=(config.save.name,))
    activations = _activations(config, changes)
    opened = open_run(config)
    mlsae, reader, tokenizer, model = (
        opened.mlsae,
        opened.reader,
        opened.tokenizer,
        opened.reader.model,
    )
    ids = opened.tokenize(config.prompt, config.max_new_tokens)
    with intervene(model, mlsae, changes, activations=activations):
        pass  # whether they fit
    effects = measure_effects(mlsae, reader, ids, changes, activations, config.show)
    check_finite(effects.log_p)
    continuations = [
        _continue(config, model, tokenizer, ids.to(mlsae.sae.W_dec.device), context)
        for context in (nullcontext(), intervene(model, mlsae, changes, activations=activations))
    ]
    strings = token_strings(tokenizer)
    result = Steered(
        config,
        opened.name,
        changes,
        [strings[i] for i in ids.tolist()],
        (continuations[0], continuations[1]),
        effects,
        strings,
    )
    if config.save is not None:
        config.save.parent.mkdir(parents=True, exist_ok=True)
        write_file(config.save, json.dumps(result.as_dict(), indent=2).encode())
    return result


def _activations(config: SteerConfig, changes: Sequence[Change]) -> Activations | None:
    """Those of the run's analysis, if an edit is measured in them."""
    needed = any(isinstance(c, Edit) and c.units in ("max", "mean") for c in changes)
    return read_activations(config.run) if needed else None


def _continue(config: SteerConfig, model: Any, tokenizer: Any, ids: Tensor, context: Any) -> str:
    """What the model adds to the prompt's ids (T,), run in `context`."""
    with context:
        new = continue_ids(
            model, tokenizer, ids, config.max_new_tokens, config.temperature, config.seed
        )
    return str(tokenizer.decode(new))


def _as_dict(change: Change) -> dict[str, Any]:
    where = shown_where(change.positions)
    return {"kind": type(change).__name__.lower(), **asdict(change), "positions": where}
