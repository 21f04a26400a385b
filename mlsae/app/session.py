"""The models of a run, and what they say: all of it runs in the one thread of `worker`.

Legend: L layers, T positions, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import builtin
from ..analysis.geometry import token_strings
from ..analysis.prompt import read_prompt, tokenize
from ..attribution import trace
from ..cli import silence_transformers
from ..data.residuals import ResidualReader
from ..distributed import choose_device
from ..errors import InputError
from ..evaluation.heldout import HeldoutConfig, open_run
from ..intervention import Edit, Opened, Replace, intervene, read_activations
from ..intervention.edits import Change, at_layers
from ..intervention.generation import check_finite, continue_ids
from ..report.trace_page import drawn_flows, flows_width, trace_plots

if TYPE_CHECKING:
    from .__main__ import AppConfig

MOST_TOKENS = 1024
"""Of a prompt."""
_MODEL = (
    "model", "revision", "trust_remote_code", "model_dtype", "model_device_map", "model_quantize",
)  # fmt: skip
"""Settings that decide a transformer."""
_SHOWN = 8  # next tokens
_EDGES = 24  # strongest nodes of a trace, between which edges are drawn

Stopped = Callable[[], bool]
"""Whether nobody waits for the result any more."""


class StoppedError(Exception):
    """Nobody waits for the result any more."""


class Session:
    """The MLSAE of the run in `folder`, whose config.json is `about`, and its transformer.

    Several sessions of one transformer hold it once. Raises InputError if they cannot be loaded, or
    do not fit together.
    """

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        config: AppConfig,
        others: Sequence[Session] = (),
    ) -> None:
        silence_transformers()
        trained = about.get("training")
        names_text = isinstance(trained, dict) and trained.get("dataset")
        given = HeldoutConfig(
            folder,
            # No text is read, but where norms that are dropped have to be measured.
            dataset=None if names_text else builtin.NAME,
            model=config.model,
            lens=config.lens,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
        self.folder = folder
        self.mlsae, self.stream = open_run(given, choose_device(config.device))
        self._share(others)
        self.strings = token_strings(self.stream.tokenizer)
        model: Any = self.stream.reader.model
        settings = model.config.get_text_config()
        self.context: int | None = getattr(settings, "max_position_embeddings", None)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that prompts are read at."""
        return tuple(self.stream.reader.layers)

    def read(self, text: str) -> dict[str, Any]:
        """The active (token, layer, latent) of a text, sparse: see `analysis.prompt`."""
        return read_prompt(self.mlsae, self.stream, self._ids(text), self.strings)

    @torch.inference_mode()
    def next_tokens(
        self, text: str, position: int, changes: Sequence[Change], stopped: Stopped
    ) -> dict[str, Any]:
        """What may follow a position of a text: for the model, with `changes` if there are any, and
        with the reconstruction at each layer in the residual's place (of the tokens that the MLSAE
        is for). Each has its likeliest tokens, with p and logit, and KL(model ‖ it) in nats.

        Raises InputError if there is no such position, a change does not fit, or predictions become
        NaN.
        """
        ids = self._ids(text)
        if not 0 <= position < len(ids):
            raise InputError(f"position must be in [0, {len(ids) - 1}], got {position}")
        kept = self.stream.token_mask(ids[None])[0].nonzero()[:, 0].tolist()
        rows: list[tuple[str, list[Change]]] = [("model", [])]
        rows += [("changed", list(changes))] if changes else []
        if kept:
            rows += [(str(layer), [Replace((layer,), tuple(kept))]) for layer in self.layers]
        truth: Tensor | None = None
        result = []
        for name, own in rows:
            if stopped():
                raise StoppedError
            logits = self._logits(ids, own)[position].double().cpu()
            log_p = logits.log_softmax(-1)
            check_finite(log_p)
            truth = log_p if truth is None else truth
            result.append({"name": name, **self._likeliest(truth, log_p, logits)})
        return {"token": self.strings[int(ids[position])], "rows": result}

    def trace(self, text: str, target: dict[str, Any]) -> dict[str, Any]:
        """What a prediction after a text, or a latent in it, rests on (`attribution.trace`): its
        numbers, without the long lists, and the plots of its page.

        Raises InputError if `target` names nothing that can be traced.
        """
        reader = self.stream.reader
        opened = Opened(self.mlsae, self.stream.config.model, self.stream.tokenizer, reader)
        self._ids(text)  # whether it is short enough
        found = trace(opened, text, edges=_EDGES, **target).as_dict(_EDGES)
        plots = {name: json.loads(plot.to_json()) for name, plot in trace_plots(found).items()}
        shown = ("tokens", "target", "n_nodes", "nodes", "edges", "correlation")
        return {
            **{name: found[name] for name in shown},
            "layers": found["layers"],
            "flows": [[flow["token"], flow["latent"]] for flow in drawn_flows(found)],
            "width": flows_width(found),
            "plots": plots,
        }

    def check(self, text: str, changes: Sequence[Change], max_new_tokens: int) -> Tensor:
        """The ids (T,) of a text to go on from. Raises InputError if it is too long for that, or a
        change does not fit."""
        ids = self._ids(text)
        if self.context and len(ids) + max_new_tokens > self.context:
            raise InputError(
                f"the prompt and the new tokens must be at most {self.context} together (the "
                f"model's context), got {len(ids)} and {max_new_tokens}"
            )
        n_layers = len(self.stream.reader.blocks)
        at_layers(changes, self.mlsae, n_layers, self._activations(changes))
        return ids

    def generate(
        self,
        ids: Tensor,
        changes: Sequence[Change],
        sampling: dict[str, Any],
        show: Callable[[str, int], None],
        stopped: Stopped,
    ) -> str:
        """The text that follows token ids (T,) under `changes`. As it comes, `show` is given the
        text so far, in whole characters, and the number of its tokens; it ends early if
        `stopped`."""
        tokenizer = self.stream.tokenizer

        def watch(new: Tensor) -> bool:
            text = str(tokenizer.decode(new))
            if not text.endswith("\ufffd"):  # a part of a character, whose rest is to come
                show(text, len(new))
            return stopped()

        model = self.stream.reader.model
        with torch.inference_mode(), self._changed(changes):
            new = continue_ids(
                model, tokenizer, ids.to(self.stream.device), **sampling, watch=watch
            )
        return str(tokenizer.decode(new))

    def _share(self, others: Sequence[Session]) -> None:
        """Use the transformer of another session, if it is the same one, and drop this one's."""
        for other in others:
            stream = other.stream
            if all(getattr(stream.config, n) == getattr(self.stream.config, n) for n in _MODEL):
                self.stream.reader = ResidualReader(stream.reader.model, self.layers)
                return

    def _ids(self, text: str) -> Tensor:
        ids = tokenize(self.stream, text)
        if len(ids) > MOST_TOKENS:
            raise InputError(
                f"the prompt must have at most {MOST_TOKENS:,} tokens, got {len(ids):,}"
            )
        return ids

    def _logits(self, ids: Tensor, changes: Sequence[Change]) -> Tensor:
        """The logits (T, V) of token ids (T,) under `changes`."""
        with self._changed(changes):
            return self.stream.reader.logits(ids[None].to(self.stream.device))[0]

    def _changed(self, changes: Sequence[Change]) -> Any:
        if not changes:
            return nullcontext()
        activations = self._activations(changes)
        return intervene(self.stream.reader.model, self.mlsae, changes, activations=activations)

    def _activations(self, changes: Sequence[Change]) -> Any:
        """Those of the run's analysis, if an edit is measured in them."""
        needed = any(isinstance(c, Edit) and c.units in ("max", "mean") for c in changes)
        return read_activations(self.folder) if needed else None

    def _likeliest(self, truth: Tensor, log_p: Tensor, logits: Tensor) -> dict[str, Any]:
        top = log_p.topk(min(_SHOWN, len(log_p))).indices
        tokens = [
            {"text": self.strings[i] if i < len(self.strings) else f"{i}",
             "p": log_p[i].exp().item(), "logit": logits[i].item()}
            for i in top.tolist()
        ]  # fmt: skip
        kl = (truth.exp() * (truth - log_p)).sum().item()
        return {"kl": max(0.0, kl), "tokens": tokens}
