"""What an SAE trains on: rows of tokens, and the residuals of the transformer at them.

Legend: L layers, B rows, T positions, N tokens, D width of the residual stream, S shards.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import builtin
from ..distributed import ALONE, Mesh, splits
from ..errors import InputError
from .config import DataConfig
from .heldout_split import Split
from .residuals import ResidualReader, chosen_layers
from .sinks import describe_massive, resolve_norm, rule_of_places
from .tokens import Batches, BroadcastBatches, Rows, not_special
from .transformer import check_token_ids, load_config, load_tokenizer, load_transformer


class Shape(NamedTuple):
    """The shape of the residuals, as the transformer's configuration tells."""

    d_in: int
    """Width of the residual stream (D)."""
    layers: tuple[int, ...]
    """Those to read."""
    seq_len: int
    """Tokens per row (T)."""


class Residuals(NamedTuple):
    """Residuals to train on. The mask leaves tokens out without changing a shape."""

    x: Tensor
    """(L, N, D) in the transformer's dtype."""
    mask: Tensor
    """(N,) bool, on the same device: which tokens count."""


def read_shape(config: DataConfig) -> Shape:
    """The shape that `config` asks for.

    Raises InputError if the model has no such layers, or rows are longer than its context.
    """
    text_config = load_config(config)
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

    Special tokens are dropped, and what the rule `drop` names: at first by position and id, as
    `config` says; by norm too, once `resolve_drop` has measured norms or `drop` has been set.

    Raises InputError if the model or its tokenizer cannot be loaded, if they do not fit together,
    if the model's residual stream cannot be read, or if a position or token to drop does not exist.
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
        self.tokenizer = load_tokenizer(config)
        self.drop = rule_of_places(config, self.tokenizer, self.seq_len)
        n_layers = None if whole else layers[-1] + 1
        model = load_transformer(config, device, n_layers, reserved)
        check_token_ids(self.tokenizer, model)
        self.reader = ResidualReader(model, layers)
        self.n_bytes: int = sum(p.nbytes for p in model.parameters())
        """Of the transformer's weights that are loaded."""
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        """Of the residual stream."""

    def batches(
        self, batch_rows: int, state: dict[str, Any] | None = None
    ) -> Batches | BroadcastBatches:
        """Batches (B, T) to train on, without end; from a saved state, if given."""
        world = self.mesh.world
        if world.rank > 0:
            return BroadcastBatches((batch_rows, self.seq_len), world)
        return Batches(self._rows("train", self.seed, endless=True), batch_rows, state, world)

    def heldout(self, tokens: int) -> Tensor:
        """Rows (B, T) that are never trained on, `tokens` tokens in all or fewer if the text has
        fewer: the first ones of the text, in an order that `seed` draws."""
        n_rows = min(max(1, tokens // self.seq_len), sys.maxsize)  # which is what islice takes
        if self.config.dataset == builtin.NAME:
            # It is small, and shuffled whole: a few rows are of many files.
            return self._first_rows(n_rows, self.seed)
        rows = self._first_rows(n_rows)
        order = list(range(len(rows)))
        random.Random(self.seed).shuffle(order)
        return rows[order]

    def resolve_drop(self, input_ids: Tensor) -> str:
        """Complete the rule `drop` as `config.drop_norm` says of rows (B, T), which all processes
        have: a line about massive tokens among them, "" if there are none.

        Raises InputError if all tokens are dropped.
        """
        token_mask = self._keeps_places(input_ids)
        own = [x.norm(dim=-1) for x in self.residuals(input_ids)]
        none = torch.empty(len(self.reader.layers), 0, device=self.device)
        norms = self.mesh.data.all_cat(torch.cat([none, *own], 1)).cpu()
        if token_mask.any():
            self.drop, massive = resolve_norm(self.drop, self.config.drop_norm, norms)
        if not token_mask.any() or not self.drop.keeps_norms(norms).any():
            raise InputError(
                "--drop_positions, --drop_tokens and --drop_norm must leave tokens that are not "
                f"special, and drop all of the first {len(input_ids)} rows ({self.drop})"
            )
        dropped = self.drop.norm is not None
        return describe_massive(massive, input_ids, token_mask, self.tokenizer, dropped)

    def count(self, input_ids: Tensor) -> int:
        """Tokens of rows (B, T) that neither are special nor are dropped by position or id: known
        before the model has run. What is dropped by norm counts, with weight 0 in the loss, so that
        the losses of a batch's parts still add up to that of the batch."""
        return int(self._keeps_places(input_ids).sum())

    def token_mask(self, input_ids: Tensor) -> Tensor:
        """Which tokens of rows (B, T) are kept, (B, T) bool. The model runs if norms decide."""
        token_mask = self._keeps_places(input_ids)
        if self.drop.norm is not None and token_mask.any():
            parts = input_ids.split(self.micro_rows)
            kept = torch.cat([self._keeps_norms(self._read(rows)) for rows in parts])
            token_mask &= kept.view_as(token_mask).to(token_mask.device)
        return token_mask

    def masked_residuals(self, input_ids: Tensor) -> Iterator[Residuals]:
        """Residuals (L, N, D) of this process's rows among input_ids (B, T), in parts, with a mask
        that is False where a token is dropped. Processes with the same rows are given the same
        parts."""
        for rows in self._own_parts(input_ids):
            x = self._read(rows)
            mask = self._keeps_places(rows).flatten().to(x.device, non_blocking=True)
            if self.drop.norm is not None:
                mask &= self._keeps_norms(x)
            yield Residuals(x, mask)

    def residuals(self, input_ids: Tensor) -> Iterator[Tensor]:
        """As `masked_residuals`, without the tokens that are dropped, in float32: (L, N, D)."""
        for x, mask in self.masked_residuals(input_ids):
            yield x[:, mask].float()

    def kept_and_dropped(self, input_ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """As `residuals`, and beside them those of dropped tokens that are not special: pairs of
        (L, N, D)."""
        parts = zip(self._own_parts(input_ids), self.masked_residuals(input_ids), strict=True)
        for rows, (x, mask) in parts:
            dropped = not_special(rows, self.tokenizer).flatten().to(x.device) & ~mask
            yield x[:, mask].float(), x[:, dropped].float()

    def _keeps_places(self, input_ids: Tensor) -> Tensor:
        """(B, T) bool: what is neither special nor dropped by position or id."""
        return not_special(input_ids, self.tokenizer) & self.drop.keeps_places(input_ids)

    def _keeps_norms(self, x: Tensor) -> Tensor:
        """(N,) bool: which of the residuals x (L, N, D) are not dropped by norm."""
        return self.drop.keeps_norms(torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32))

    def _own_parts(self, input_ids: Tensor) -> Iterator[Tensor]:
        """This process's rows, `micro_rows` at a time."""
        data = self.mesh.data
        own = splits(len(input_ids), data.size)[data.rank]
        if own.start < own.stop:
            yield from input_ids[own].split(self.micro_rows)

    def _read(self, rows: Tensor) -> Tensor:
        """Residuals (L, N, D) of rows (B, T). Processes that hold shards of the latents run the
        transformer on some of the rows each, and exchange what they have read."""
        group = self.mesh.latents
        parts = splits(len(rows), group.size)
        lengths = [part.stop - part.start for part in parts]
        own = parts[group.rank] if lengths[group.rank] else parts[0]
        x = self.reader(rows[own].to(self.device))[:, : lengths[group.rank]]  # (L, B', T, D)
        if group.size == 1:
            return x.flatten(1, 2)
        padded = F.pad(x, (0, 0, 0, 0, 0, max(lengths) - x.shape[1]))
        gathered = zip(group.all_gather(padded), lengths, strict=True)  # (S, L, B', T, D)
        return torch.cat([part[:, :length] for part, length in gathered], dim=1).flatten(1, 2)

    def _first_rows(self, n: int, seed: int | None = None) -> Tensor:
        """The first `n` held-out rows (B, T), or fewer if there are fewer."""
        with closing(self._rows("heldout", seed)) as rows:
            return torch.stack(list(islice(rows, n)))

    def _rows(self, split: Split, seed: int | None = None, endless: bool = False) -> Rows:
        return Rows(self.config, self.tokenizer, self.seq_len, split, seed=seed, endless=endless)
