"""Harvest the built-in model's residuals, as `python -m mlsae.train` would see them.

Legend: L layers, N tokens, D width of the residual stream.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from mlsae.data.config import DataConfig
from mlsae.data.sinks import DropRule
from mlsae.data.stream import DataStream, read_shape
from mlsae.errors import InputError

from .vectors import SLICES, Harvest, Vectors

MICRO_TOKENS = 2048


def open_stream(layers: tuple[int, ...] | None, *, whole: bool) -> DataStream:
    """The built-in model and corpus; with `whole`, all of the model, which then has logits. In
    float32 on every machine."""
    config = DataConfig(layers=layers, model_dtype="float32")
    shape = read_shape(config)
    micro_rows = max(1, MICRO_TOKENS // shape.seq_len)
    return DataStream(config, shape, torch.device("cpu"), micro_rows=micro_rows, whole=whole)


def heldout_rows(stream: DataStream, slice_tokens: int) -> dict[str, Tensor]:
    """The rows (B, T) of each held-out slice."""
    return dict(zip(SLICES, stream.heldout(2 * slice_tokens).chunk(2), strict=True))


def drop_rule(about: Harvest) -> DropRule:
    """Which tokens the harvest left out."""
    return DropRule.from_dict(about.dropped or {})


def harvest(
    folder: Path,
    tokens: int,
    batch_tokens: int,
    slice_tokens: int,
    layers: tuple[int, ...] | None = None,
) -> Vectors:
    """The residuals of `layers` (None: all) in `folder`, which is filled if it holds none.

    Raises InputError if it holds others than asked for, or a residual exceeds float16.
    """
    stream = open_stream(layers, whole=False)
    asked: dict[str, Any] = {
        "tokens": tokens, "batch_tokens": batch_tokens, "slice_tokens": slice_tokens,
        "layers": stream.reader.layers,
    }  # fmt: skip
    if (folder / "about.json").exists():
        vectors = Vectors(folder)
        found = {name: getattr(vectors.about, name) for name in asked}
        if found != asked:
            raise InputError(
                f"--data must be a new folder or hold the residuals asked for, {_text(asked)}, and "
                f"{folder} holds {_text(found)}; name another folder, or remove that one"
            )
        return vectors
    about = Harvest(**asked, d_in=stream.d_in)
    folder.mkdir(parents=True, exist_ok=True)
    batches = _train(folder, stream, about)  # which settles what is dropped
    slices = {}
    for name, rows in heldout_rows(stream, slice_tokens).items():
        with (folder / f"{name}.f16").open("wb") as file:
            slices[name] = _write(file, stream.residuals(rows))
    about = replace(about, batches=batches, slices=slices, dropped=stream.drop.as_dict())
    partial = folder / "about.json.partial"
    partial.write_text(json.dumps(asdict(about)))
    partial.rename(folder / "about.json")
    return Vectors(folder)


def _train(folder: Path, stream: DataStream, about: Harvest) -> tuple[tuple[int, int], ...]:
    """Write the batches of a training run: `Harvest.batches`."""
    sizes: list[tuple[int, int]] = []
    done = 0
    batches = stream.batches(about.batch_tokens // stream.seq_len)
    bar = tqdm(total=about.tokens, desc="harvest", unit=" tokens", unit_scale=True)
    with (folder / "train.f16").open("wb") as file, closing(batches), bar:
        for rows in batches:
            if not sizes:
                stream.resolve_drop(rows)
            counted = stream.count(rows)
            sizes.append((_write(file, stream.residuals(rows)), counted))
            done += counted
            bar.update(counted)
            if done >= about.tokens:
                break
    return tuple(sizes)


def _write(file: BinaryIO, parts: Iterable[Tensor]) -> int:
    """Append residuals (L, N, D) in parts; how many tokens they are of."""
    n_tokens = 0
    for x in parts:
        half = x.transpose(0, 1).half()
        if not half.isfinite().all():
            raise InputError(
                "MODEL's residuals must be finite and below 65,504, the largest float16, got "
                f"{x.abs().max():.3g}; harvest another model"
            )
        file.write(half.contiguous().numpy().tobytes())
        n_tokens += len(half)
    return n_tokens


def _text(asked: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value if isinstance(value, tuple) else format(value, ',')}"
        for name, value in asked.items()
    )
