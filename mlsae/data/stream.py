"""What a run trains on: rows of tokens, and the residuals of the transformer at them.

Legend: L layers, B rows, T positions, N tokens, D width of the residual stream, M latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TrainConfig, values_of
from ..distributed import ALONE, Mesh, splits
from ..errors import InputError
from ..model import MLSAEConfig
from . import tokens as data
from .documents import Split
from .residuals import ResidualReader, chosen_layers
from .transformer import load_config, load_tokenizer, load_transformer


class Shape(NamedTuple):
    """What a training's tensors will be, as the transformer's configuration tells."""

    d_in: int
    layers: tuple[int, ...]
    """Those to read."""
    seq_len: int
    """Tokens a row (T)."""

    def mlsae_config(self, run: TrainConfig) -> MLSAEConfig:
        """The MLSAE of a single `run`, see `config.runs_of`.

        Raises InputError if it has fewer latents than k.
        """
        (k,) = values_of(run.sae.k)
        (size,) = values_of(run.sae.n_latents or run.sae.expansion)
        n_latents = size if run.sae.n_latents else size * self.d_in
        if k > n_latents:
            raise InputError(
                f"--sae.k must be in [1, {n_latents}] (the number of latents), got {k}"
            )
        return MLSAEConfig(self.d_in, n_latents, k, self.layers, run.sae.standardize, run.model)


def read_shape(config: TrainConfig) -> Shape:
    """The shape that `config` asks for.

    Raises InputError if the model has no such layers, or rows are longer than its context, or
    than a batch or a part of one.
    """
    text_config = load_config(config.model)
    context = getattr(text_config, "max_position_embeddings", None) or 2048
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
    layers = chosen_layers(config.layers, text_config.num_hidden_layers)
    return Shape(text_config.hidden_size, layers, seq_len)


def micro_rows(config: TrainConfig, seq_len: int, mesh: Mesh) -> int:
    """Rows whose residuals a process has at a time."""
    share = -(-(config.batch_tokens // seq_len) // mesh.data.size)  # of a batch, at most
    return min(share, (config.micro_tokens or config.batch_tokens) // seq_len)


class DataStream:
    """Rows of tokens, and the residuals of the transformer at them. Of several processes, the
    first reads the text, and all have the same rows; each has the residuals of a part of them.

    Without `whole`, the transformer's blocks above the last layer that is read are not loaded, so
    that it has no logits. See `transformer.load_transformer` for `reserved`.

    Raises InputError if the model or the settings cannot be had or do not fit one another.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        mesh: Mesh = ALONE,
        *,
        whole: bool = True,
        reserved: int = 0,
    ) -> None:
        self.config, self.device, self.mesh = config, device, mesh
        self.d_in, layers, self.seq_len = read_shape(config)
        self.batch_rows = config.batch_tokens // self.seq_len
        self.micro_rows = micro_rows(config, self.seq_len, mesh)
        self.tokenizer = load_tokenizer(config.model)
        n_layers = None if whole else layers[-1] + 1
        self.reader = ResidualReader(load_transformer(config, device, n_layers, reserved), layers)

    def batches(self, state: dict[str, Any] | None = None) -> data.Batches | data.BroadcastBatches:
        """Batches (B, T) to train on, without end; from a saved state, if given."""
        world = self.mesh.world
        if world.rank > 0:
            return data.BroadcastBatches((self.batch_rows, self.seq_len), world)
        return data.Batches(self._rows("train", endless=True), self.batch_rows, state, world)

    def heldout(self) -> Tensor:
        """Rows (B, T) that are never trained on, `eval_tokens` in all where there are as many."""
        n_rows = max(1, self.config.eval_tokens // self.seq_len)
        return torch.stack(list(islice(self._rows("heldout"), n_rows)))

    def count(self, input_ids: Tensor) -> int:
        """Tokens of rows (B, T), special ones dropped."""
        return int(data.not_special(input_ids, self.tokenizer).sum())

    def residuals(self, input_ids: Tensor) -> Iterator[Tensor]:
        """Residuals (L, N, D) of this process's share of rows (B, T), special tokens dropped, a
        part at a time. Processes with the same rows are given the same parts."""
        data_group = self.mesh.data
        mine = splits(len(input_ids), data_group.size)[data_group.rank]
        if mine.start == mine.stop:
            return
        for part in input_ids[mine].split(self.micro_rows):
            yield self._read(part)

    def _read(self, rows: Tensor) -> Tensor:
        """Residuals (L, N, D) of rows (B, T). Processes that hold shards of the latents run the
        transformer on a share of the rows each, and send one another what they have read."""
        group = self.mesh.latents
        token_mask = data.not_special(rows, self.tokenizer)
        parts = splits(len(rows), group.size)
        lengths = [int(token_mask[part].sum()) for part in parts]
        mine = parts[group.rank] if lengths[group.rank] else parts[0]
        x = self.reader(rows[mine].to(self.device))[:, token_mask[mine].to(self.device)]
        x = x[:, : lengths[group.rank]]
        if group.size == 1 or not any(lengths):
            return x.float()
        gathered = group.all_gather(F.pad(x, (0, 0, 0, max(lengths) - x.shape[1])))  # (S, L, N', D)
        return torch.cat(
            [part[:, :length] for part, length in zip(gathered, lengths, strict=True)], dim=1
        ).float()

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
