"""Convert an SAE between this project's format and those of other libraries.

    python -m mlsae.convert theirs/layers.5 ours      # the format is detected from the files
    python -m mlsae.convert runs/demo for-saelens --to saelens
    python -m mlsae.convert autoencoders/6.pt ours

The formats:

    mlsae                config.json, model.safetensors: `MLSAE.from_pretrained`, `load_sae`
    released             the paper's own code (tim-lawson/mlsae), with or without the transformer
    sparsify             EleutherAI's sparsify: cfg.json, sae.safetensors
    saelens              SAELens 6: cfg.json, sae_weights.safetensors
    dictionary_learning  ae.pt, config.json: AutoEncoderTopK
    openai               openai/sparse_autoencoder: autoencoder.pt

Read only: Gemma Scope (params.npz, params.safetensors), Llama Scope (hyperparams.json), Qwen-Scope
(layerN.sae.pt), and of dictionary_learning BatchTopKSAE, MatryoshkaBatchTopKSAE and
JumpReluAutoEncoder.

The weights stay bit-identical and the outputs the same; an SAE that the target format cannot
express is an error. What it cannot store (layers, model, settings, counters of dead latents) is
written beside its files, in mlsae.json and carried.safetensors, and read back from there. Pickled
code is never run.
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
from .files import check_folder


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert, and to which format."""

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """The SAE: a folder, a .pt file, or a repository on the Hugging Face hub."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder for the converted SAE; must be new or empty."""
    to: Literal["mlsae", "released", "sparsify", "saelens", "dictionary_learning", "openai"] = (
        "mlsae"
    )
    """The format to write."""
    hookpoint: str | None = None
    """Folder of the SAE in SRC, if that has several, such as layers.5."""


def convert(config: ConvertConfig) -> str:
    """Convert as `config` says, and return a summary to print.

    Raises InputError, before anything is written, if SRC cannot be read, DST is not empty, or the
    target format cannot express the SAE.
    """
    src = formats.local_folder(config.src, config.hookpoint)
    source = formats.detect(src)
    sae = formats.read(src)
    check_folder(config.dst, "DST")
    made = not config.dst.exists()
    if not made and any(config.dst.iterdir()):
        raise InputError(
            f"DST must be a new or empty folder, and {config.dst} is not; choose another"
        )
    try:
        written = formats.write(sae, config.dst, config.to)
    except BaseException:  # a full disk: some of an SAE's files are no SAE
        for path in config.dst.iterdir() if config.dst.is_dir() else ():
            path.unlink()
        if made and config.dst.is_dir():
            config.dst.rmdir()
        raise
    lines = [
        f"{source}: {sae.d_in} inputs, {sae.n_latents:,} latents, {_codes(sae)}, "
        f"{'standardized' if sae.standardize else 'plain'} inputs",
        f"{config.to}: {', '.join(str(path) for path in written)}",
    ]
    if (src / "checkpoints").is_dir():
        lines.append(
            f"not converted: {src / 'checkpoints'}, the training state (optimizer, "
            "counters of dead latents), which only --resume reads"
        )
    return "\n".join(lines)


def _codes(sae: formats.SavedSAE) -> str:
    if sae.activation == "jumprelu":
        return f"JumpReLU with room for {sae.k_max} active ones"
    return f"k = {sae.k}" + ("" if sae.k_max is None else f" in the mean, {sae.k_max} at most")


def main() -> None:
    """Run the program."""
    config = parse(ConvertConfig, __doc__, sys.argv[1:], "python -m mlsae.convert")
    run_program(lambda: print(convert(config)))


if __name__ == "__main__":
    main()
