"""Find a lens of a transformer on a text: `python -m mlsae.lens`.

Legend: L layers, the last of them last; B rows, T positions, D width of the residual stream.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from ..basis import Lens
from ..cli import empty_table
from ..data.config import DataConfig, check_seed
from ..data.model_id import model_id
from ..data.stream import DataStream, Shape, read_shape
from ..data.transformer import load_config
from ..distributed import choose_device, log_rank0
from ..errors import InputError
from ..files import check_folder, write_file
from ..formats import LENS, lens_bytes
from .affine import SecondMoments, affine_maps
from .tuned import TunedMaps, kl, unembedded

_MOMENT_VECTORS = 64  # per dimension, that a tuned lens's first maps are of


@dataclass(frozen=True)
class LensConfig:
    """Of which transformer, on what text, and how."""

    data: tyro.conf.OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    kind: Literal["tuned", "affine"] = "tuned"
    """tuned: maps trained so that the model's final norm and unembedding predict from them what the
    model predicts (Belrose et al., arXiv 2303.08112). affine: in closed form, from means and
    covariances; z has those of the last layer's residuals, and correlates most with them."""
    tokens: int = 65_536
    """Tokens to train on. A tuned lens also reads 64 per dimension of the residual stream before,
    for its first maps, which are the affine ones."""
    batch_tokens: int = 512
    """Tokens per optimizer step, or read at a time; one row at least."""
    lr: float = 3e-3
    """Peak learning rate of a tuned lens, in units of the residuals' standard deviation."""
    eval_tokens: int = 4096
    """Held-out tokens to measure on."""
    seed: int = 0
    """Seed of the order of rows."""
    device: str = "auto"
    """auto: CUDA if available, else the CPU."""
    out: Path = Path("runs/lens")
    """Folder for lens.safetensors."""
    overwrite: bool = False
    """Replace the lens that is in the folder."""


class Found(NamedTuple):
    """A lens, and how well it predicts."""

    lens: Lens
    kl: list[float]
    """KL(model ‖ lens) of next tokens at each layer but the last, in nats, on held-out text."""
    kl_logit_lens: list[float]
    """The same without a map: z = x."""
    n_tokens: int
    """Held-out tokens measured on."""
    seconds: float

    def table(self) -> Table:
        """A row per layer."""
        table = empty_table(
            f"KL(model ‖ lens), nats per token: {self.n_tokens:,} held-out tokens",
            ["layer", "logit lens", "this lens", "condition number"],
        )
        rows = zip(self.lens.layers, self.kl_logit_lens, self.kl, strict=True)
        for layer, before, after in rows:
            condition = f"{self.lens.condition[layer]:.1f}"
            table.add_row(str(layer), f"{before:.4f}", f"{after:.4f}", condition)
        return table


def find_lens(config: LensConfig) -> Found:
    """Find the lens that `config` asks for, measure it, and write its file.

    Raises InputError for bad input, before anything is read; or if a map cannot be inverted.
    """
    started = time.perf_counter()
    _check(config)
    device, shape = choose_device(config.device), _shape(config.data)
    batch_rows = max(1, config.batch_tokens // shape.seq_len)
    stream = DataStream(config.data, shape, device, micro_rows=batch_rows, seed=config.seed)
    heldout = stream.heldout(config.eval_tokens)
    matrix, bias = _maps(config, stream, batch_rows)
    about = {"kind": config.kind, **model_id(config.data), "dataset": config.data.dataset}
    n_layers, layers = len(stream.reader.blocks), stream.reader.layers[:-1]
    lens = Lens(layers, matrix, bias, n_layers, about | {"tokens": config.tokens})
    own, without, n_tokens = _measure(lens, stream, heldout)
    lens.about |= {"kl": own, "kl_logit_lens": without}
    config.out.mkdir(parents=True, exist_ok=True)
    write_file(config.out / LENS, lens_bytes(lens))
    return Found(lens, own, without, n_tokens, time.perf_counter() - started)


def _check(config: LensConfig) -> None:
    for name in ("tokens", "batch_tokens", "eval_tokens"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(config, name)}")
    if not 0 < config.lr < 1e3:
        raise InputError(f"--lr must be greater than 0, and below 1000, got {config.lr}")
    check_seed(config.seed)
    check_folder(config.out, files=(LENS,))
    if (config.out / LENS).exists() and not config.overwrite:
        raise InputError(
            f"--out must have no lens, and {config.out} has one; choose another, or replace it "
            "with --overwrite"
        )


def _shape(data: DataConfig) -> Shape:
    """The shape of the residuals to read, the last layer's among them. Raises InputError if there
    is no other."""
    shape, last = read_shape(data), load_config(data).num_hidden_layers - 1
    layers = tuple(sorted({*shape.layers, last}))
    if len(layers) < 2:
        raise InputError(
            f"--layers must name a layer below the last, {last}, whose map is the identity, got "
            f"{' '.join(map(str, shape.layers))}"
        )
    return shape._replace(layers=layers)


def _maps(config: LensConfig, stream: DataStream, batch_rows: int) -> tuple[Tensor, Tensor]:
    """A (L − 1, D, D) and b (L − 1, D)."""
    n_layers, d_in = len(stream.reader.layers), stream.d_in
    moments = SecondMoments(n_layers, d_in, stream.device)
    tuned = config.kind == "tuned"
    n_first = _MOMENT_VECTORS * d_in if tuned else config.tokens
    step_tokens = batch_rows * stream.seq_len
    total = n_first + (config.tokens if tuned else 0)
    bar = tqdm(total=total, unit=" tokens", unit_scale=True, desc="moments", dynamic_ncols=True)
    with bar, closing(stream.batches(batch_rows)) as batches:
        rows = next(batches)
        found = stream.resolve_drop(rows)
        if found:
            log_rank0(found)
        for done in range(0, n_first, step_tokens):
            for x in stream.residuals(rows):
                moments.update(x)
            bar.update(min(step_tokens, n_first - done))
            rows = next(batches)
        matrix, bias = affine_maps(moments)
        if not tuned:
            return matrix[:-1], bias[:-1]
        steps = max(1, round(config.tokens / step_tokens))
        maps = TunedMaps(matrix, bias, moments, config.lr, steps)
        bar.set_description("training")
        for _ in range(steps):
            for x, mask in stream.masked_residuals(rows):
                loss = maps.step(stream.reader, rows.to(stream.device), x, mask)
            bar.update(min(step_tokens, total - bar.n))
            bar.set_postfix_str(f"KL={loss:.3f}")
            rows = next(batches)
    return maps.finished()


@torch.no_grad()
def _measure(
    lens: Lens, stream: DataStream, heldout: Tensor
) -> tuple[list[float], list[float], int]:
    """The KL of the lens and of the logit lens at each of its layers, on rows (B, T), and the
    tokens."""
    n_layers = len(lens.layers)
    sums = torch.zeros(2, n_layers, dtype=torch.float64)
    n_tokens = 0
    for rows, x, mask in _parts(stream, heldout):
        log_p = unembedded(stream.reader, rows, x[-1], mask)
        n_tokens += len(log_p)
        for i, layer in enumerate(lens.layers):
            own = x[i].float()
            for which, z in enumerate((lens(own, layer), own)):
                divergence = kl(log_p, unembedded(stream.reader, rows, z, mask))
                sums[which, i] += divergence.sum(dtype=torch.float64).cpu()
    if not n_tokens:
        raise InputError("DATASET must hold held-out tokens that are not special, got none")
    own_kl, without = (sums / n_tokens).tolist()
    return own_kl, without, n_tokens


def _parts(stream: DataStream, heldout: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows (B, T) at a time, their residuals (L, B · T, D) and mask (B · T,)."""
    parts = heldout.split(stream.micro_rows)
    for rows in tqdm(parts, desc="held-out text", leave=False, disable=len(parts) < 2):
        for x, mask in stream.masked_residuals(rows):
            yield rows.to(stream.device), x, mask
