"""Convert an SAE between this project's format and those of other libraries.

    python -m mlsae.convert theirs/layers.5 ours      # the files tell which format it is
    python -m mlsae.convert runs/demo for-saelens --to saelens
    python -m mlsae.convert autoencoders/6.pt ours

The formats:

    mlsae                config.json, model.safetensors: `MLSAE.from_pretrained`, `load_sae`
    released             the paper's own code (tim-lawson/mlsae), with its transformer or without
    sparsify             EleutherAI's: cfg.json, sae.safetensors
    saelens              SAELens 6: cfg.json, sae_weights.safetensors
    dictionary_learning  ae.pt, config.json: AutoEncoderTopK
    openai               openai/sparse_autoencoder: autoencoder.pt

Weights keep their bits, and computation its meaning: what the format asked for cannot compute is
refused. What it has no word for (layers, model, settings, counters of dead latents) goes into
mlsae.json and carried.safetensors beside its files, and is read from there on the way back. No
pickled code is ever run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from . import formats
from .cli import parse, run_program
from .errors import InputError


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert, and into what."""

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Folder, or .pt file, of an SAE."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder for the converted one; it must be new or empty."""
    to: Literal["mlsae", "released", "sparsify", "saelens", "dictionary_learning", "openai"] = (
        "mlsae"
    )
    """The format to write."""


def convert(config: ConvertConfig) -> str:
    """Convert as `config` says: what to tell the user.

    Raises InputError if SRC cannot be read or DST not take it, before anything is written.
    """
    source = formats.detect(config.src)
    found = formats.read(config.src)
    if config.dst.exists() and (not config.dst.is_dir() or any(config.dst.iterdir())):
        raise InputError(
            f"DST must be a new or empty folder, and {config.dst} is not; choose another"
        )
    written = formats.write(found, config.dst, config.to)
    lines = [
        f"{source}: {found.d_in} inputs, {found.n_latents:,} latents, k = {found.k}, "
        f"{'standardized' if found.standardize else 'plain'} inputs",
        f"{config.to}: {', '.join(str(path) for path in written)}",
    ]
    if (config.src / "checkpoints").is_dir():
        lines.append(
            f"not converted: {config.src / 'checkpoints'}, the state of the training (optimizer, "
            "counters of dead latents); only --resume reads it"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the program."""
    config = parse(ConvertConfig, __doc__, sys.argv[1:], "python -m mlsae.convert")
    run_program(lambda: print(convert(config)))


if __name__ == "__main__":
    main()
