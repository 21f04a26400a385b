"""What a run trains on: rows of tokens, and the residuals of the transformer at them.

Legend: L layers, B rows, T positions, N tokens, D width of the residual stream, M latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from . import data
from .activations import ResidualReader, load_transformer
from .config import SAEConfig, TrainConfig, values_of
from .documents import Split
from .errors import InputError
from .model import MLSAEConfig


def row_length(config: TrainConfig, context: int) -> int:
    """The length T of rows that `config` asks for, of a model with so long a `context`.

    Raises InputError where it is longer than the context, or than a batch or a part of one.
    """
    seq_len = config.seq_len or min(context, 2048)
    if seq_len > context:
        raise InputError(
            f"--seq_len must be at most {context} (the model's context), got {seq_len}"
        )
    smallest = min(config.batch_tokens, config.micro_tokens or config.batch_tokens)
    if smallest < seq_len:
        raise InputError(
            f"--batch_tokens and --micro_tokens must be at least {seq_len} (a row; see --seq_len), "
            f"got {smallest}"
        )
    return seq_len


class Source:
    """Rows of tokens, and the residuals of the transformer at them.

    Raises InputError where the model or the settings cannot be had or do not fit one another.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        model, self.tokenizer = load_transformer(config.model, device)
        self.reader = ResidualReader(model, config.layers)
        self.config, self.device = config, device
        text_config = model.config.get_text_config()
        self.d_in: int = text_config.hidden_size
        context = getattr(text_config, "max_position_embeddings", None) or 2048
        self.seq_len = row_length(config, context)
        self.micro_rows = (config.micro_tokens or config.batch_tokens) // self.seq_len

    def mlsae_config(self, sae: SAEConfig) -> MLSAEConfig:
        """The MLSAE of these residuals that `sae`, with one value of each setting, asks for.

        Raises InputError where it has fewer latents than k.
        """
        (k,) = values_of(sae.k)
        (size,) = values_of(sae.n_latents or sae.expansion)
        n_latents = size if sae.n_latents else size * self.d_in
        if k > n_latents:
            raise InputError(
                f"--sae.k must be in [1, {n_latents}] (the number of latents), got {k}"
            )
        return MLSAEConfig(
            self.d_in, n_latents, k, self.reader.layers, sae.standardize, self.config.model
        )

    def batches(self, state: dict[str, Any] | None = None) -> data.Batches:
        """Batches (B, T) to train on, without end; from a saved state, if given."""
        return data.Batches(
            self._rows("train", endless=True), self.config.batch_tokens // self.seq_len, state
        )

    def heldout(self) -> Tensor:
        """Rows (B, T) that are never trained on, `eval_tokens` in all where there are as many."""
        n_rows = max(1, self.config.eval_tokens // self.seq_len)
        return torch.stack(list(islice(self._rows("heldout"), n_rows)))

    def count(self, input_ids: Tensor) -> int:
        """Tokens of rows (B, T), special ones dropped."""
        return int(data.not_special(input_ids, self.tokenizer).sum())

    def residuals(self, input_ids: Tensor) -> Iterator[Tensor]:
        """Residuals (L, N, D) of rows (B, T), special tokens dropped, a part at a time."""
        for part in input_ids.to(self.device).split(self.micro_rows):
            yield self.reader(part)[:, data.not_special(part, self.tokenizer)].float()

    def _rows(self, split: Split, endless: bool = False) -> data.Rows:
        return data.Rows(
            self.config.dataset,
            self.tokenizer,
            self.seq_len,
            split,
            column=self.config.column,
            seed=self.config.seed,
            endless=endless,
        )
