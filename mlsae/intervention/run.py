"""Steer a transformer by the latents of an MLSAE: `python -m mlsae.steer`.

Legend: T positions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..analysis.geometry import token_strings
from ..data.config import DataConfig
from ..data.residuals import ResidualReader
from ..data.transformer import check_token_ids, load_tokenizer, load_transformer
from ..distributed import choose_device
from ..errors import InputError
from ..evaluation.heldout import check_trained
from ..files import check_folder, write_file
from ..formats.places import check_residual
from ..model import MLSAE
from .activations import Activations, read_activations
from .command_line import SteerConfig, changes_of
from .context import intervene
from .edits import Change, Edit
from .effects import Effects, measure_effects
from .generation import check_finite, continue_ids
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
    device = choose_device(config.device)
    mlsae = MLSAE.from_pretrained(config.run, device).requires_grad_(False)
    activations = _activations(config, changes)
    data, tokenizer, model = _open_model(config, mlsae, device)
    reader = ResidualReader(model, mlsae.config.layers or None)
    ids = _tokenize(config, tokenizer, model)
    with intervene(model, mlsae, changes, activations=activations):
        pass  # whether they fit
    effects = measure_effects(mlsae, reader, ids, changes, activations, config.show)
    check_finite(effects.log_p)
    continuations = [
        _continue(config, model, tokenizer, ids.to(device), context)
        for context in (nullcontext(), intervene(model, mlsae, changes, activations=activations))
    ]
    strings = token_strings(tokenizer)
    result = Steered(
        config,
        data.model,
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


def _open_model(
    config: SteerConfig, mlsae: MLSAE, device: torch.device
) -> tuple[DataConfig, Any, Any]:
    """The transformer that the MLSAE was trained on, or that is given, and its tokenizer."""
    check_residual(mlsae.about, f"RUN {config.run}")
    trained = mlsae.about.get("training", {})
    check_trained(trained, config.run)
    name = config.model or mlsae.config.model
    if not name:
        raise InputError(
            f"--model must be given, since config.json in {config.run} names none, got none"
        )
    own = config.model is None
    data = DataConfig(
        name,
        revision=config.revision or (trained.get("revision") if own else None),
        trust_remote_code=config.trust_remote_code,
        eos_token=config.eos_token or (trained.get("eos_token") if own else None),
        model_dtype=trained.get("model_dtype", "auto"),
        model_device_map=trained.get("model_device_map"),
        model_quantize=trained.get("model_quantize"),
    )
    tokenizer, model = load_tokenizer(data), load_transformer(data, device)
    check_token_ids(tokenizer, model)
    return data, tokenizer, model


def _tokenize(config: SteerConfig, tokenizer: Any, model: Any) -> Tensor:
    """The prompt's ids (T,). Raises InputError if there are none, or too many."""
    ids = torch.tensor(tokenizer(config.prompt)["input_ids"], dtype=torch.int64)
    if not len(ids):
        raise InputError("--prompt must have at least one token, got ''; give some text")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and len(ids) + config.max_new_tokens > context:
        raise InputError(
            f"--prompt and --max_new_tokens must be at most {context} tokens together (the model's "
            f"context), got {len(ids)} and {config.max_new_tokens}"
        )
    return ids


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
