"""What an SAE trains on: rows of tokens, and the residuals of the transformer at them.

Legend: L layers, B rows, T positions, N tokens, D width of the residual stream, S shards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import ALONE, Mesh, splits
from ..errors import InputError
from .config import DataConfig
from .documents import Split
from .residuals import ResidualReader, chosen_layers
from .tokens import Batches, BroadcastBatches, Rows, not_special
from .transformer import load_config, load_tokenizer, load_transformer


class Shape(NamedTuple):
    """The shape of the residuals, as the transformer's configuration tells."""

    d_in: int
    """Width of the residual stream (D)."""
    layers: tuple[int, ...]
    """Those to read."""
    seq_len: int
    """Tokens per row (T)."""


def read_shape(config: DataConfig) -> Shape:
    """The shape that `config` asks for.

    Raises InputError if the model has no such layers, or rows are longer than its context.
    """
    text_config = load_config(config.model)
    context = getattr(text_config, "max_position_embeddings", None) or 2048
    seq_len = config.seq_len or min(context, 2048)
    if seq_len > context:
        raise InputError(
            f"--seq_len must be at most {context} (the model's context), got {seq_len}"
        )
    layers = chosen_layers(config.layers, text_config.num_hidden_layers)
    return Shape(text_config.hidden_size, layers, seq_len)


class DataStream:
    """Rows of tokens, and the residuals of the transformer at them, `micro_rows` rows at a time.

    With several processes, rank 0 reads the text, all have the same rows, and each has the
    residuals of some of them. `seed` orders the rows. Unless `whole`, the transformer's blocks
    above the last layer that is read are not loaded, so that it has no logits. For `reserved` see
    `transformer.load_transformer`.

    Raises InputError if the model or its tokenizer cannot be loaded.
    """

    def __init__(
        self,
        config: DataConfig,
        shape: Shape,
        device: torch.device,
        mesh: Mesh = ALONE,
        *,
        micro_rows: int,
        seed: int = 0,
        whole: bool = True,
        reserved: int = 0,
    ) -> None:
        self.config, self.device, self.mesh = config, device, mesh
        self.d_in, layers, self.seq_len = shape
        self.micro_rows, self.seed = micro_rows, seed
        self.tokenizer = load_tokenizer(config.model)
        n_layers = None if whole else layers[-1] + 1
        self.reader = ResidualReader(load_transformer(config, device, n_layers, reserved), layers)

    def batches(
        self, batch_rows: int, state: dict[str, Any] | None = None
    ) -> Batches | BroadcastBatches:
        """Batches (B, T) to train on, without end; from a saved state, if given."""
        world = self.mesh.world
        if world.rank > 0:
            return BroadcastBatches((batch_rows, self.seq_len), world)
        return Batches(self._rows("train", endless=True), batch_rows, state, world)

    def heldout(self, tokens: int) -> Tensor:
        """Rows (B, T) that are never trained on, `tokens` tokens in all or fewer if the text has
        fewer."""
        n_rows = min(max(1, tokens // self.seq_len), sys.maxsize)  # which is what islice takes
        return torch.stack(list(islice(self._rows("heldout"), n_rows)))

    def count(self, input_ids: Tensor) -> int:
        """Tokens of rows (B, T), special ones dropped."""
        return int(not_special(input_ids, self.tokenizer).sum())

    def residuals(self, input_ids: Tensor) -> Iterator[Tensor]:
        """Residuals (L, N, D) of this process's rows among input_ids (B, T), special tokens
        dropped, in parts. Processes with the same rows are given the same parts."""
        data = self.mesh.data
        own = splits(len(input_ids), data.size)[data.rank]
        if own.start == own.stop:
            return
        for part in input_ids[own].split(self.micro_rows):
            yield self._read(part)

    def _read(self, rows: Tensor) -> Tensor:
        """Residuals (L, N, D) of rows (B, T). Processes that hold shards of the latents run the
        transformer on some of the rows each, and exchange what they have read."""
        group = self.mesh.latents
        token_mask = not_special(rows, self.tokenizer)
        parts = splits(len(rows), group.size)
        lengths = [int(token_mask[part].sum()) for part in parts]
        own = parts[group.rank] if lengths[group.rank] else parts[0]
        x = self.reader(rows[own].to(self.device))[:, token_mask[own].to(self.device)]
        x = x[:, : lengths[group.rank]]
        if group.size == 1 or not any(lengths):
            return x.float()
        gathered = group.all_gather(F.pad(x, (0, 0, 0, max(lengths) - x.shape[1])))  # (S, L, N', D)
        return torch.cat(
            [part[:, :length] for part, length in zip(gathered, lengths, strict=True)], dim=1
        ).float()

    def _rows(self, split: Split, endless: bool = False) -> Rows:
        return Rows(
            self.config.dataset,
            self.tokenizer,
            self.seq_len,
            split,
            column=self.config.column,
            seed=self.seed,
            endless=endless,
        )
