"""The folders of runs: what may be in them, the checkpoint to go on from, room for what comes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config import TrainConfig, check_same, runs_of
from ..distributed import log_rank0
from ..errors import InputError
from ..files import check_out
from ..model import MLSAEConfig
from . import checkpoint

PUSHED_FILES = (  # of a run's, what others can use
    "config.json",
    "model.safetensors",
    "latents.safetensors",
    "metrics.jsonl",
    "report.html",
    "README.md",
)
RUN_FILES = (
    *PUSHED_FILES,
    "evaluation.csv",
    "evaluation.json",
    "analysis.json",
    "analysis.safetensors",
    "analysis_latents.parquet",
    "analysis_examples.parquet",
    "analysis_prompt.json",
    "prompt.html",
    "checkpoints",
    "tensorboard",
    "wandb",
)
RUN_FOLDERS = ("x*-k*", "n*-k*")  # see `config.runs_of`


def newest_checkpoint(config: TrainConfig) -> Path | None:
    """The newest checkpoint in `config.out`; None where it has come to none. Raises InputError
    where that would lose something."""
    path = checkpoint.newest(config.out, log_rank0)
    if path:
        return path
    models = (config.out, *(run.out for run in runs_of(config).values()))
    if checkpoint.any_written(config.out) or any(
        (folder / "model.safetensors").exists() for folder in models
    ):
        raise InputError(
            f"--resume needs an undamaged checkpoint, and {config.out} has none; choose another "
            "--out, or start over with --overwrite"
        )
    log_rank0(f"there is no checkpoint in {config.out} yet; starting at the beginning")
    return None


def load_checkpoint(path: Path, config: TrainConfig) -> dict[str, Any]:
    """The state in a checkpoint that the first process has found undamaged. Raises InputError
    where it is not this process's to see, or was saved with other settings."""
    if not path.exists():
        raise InputError(f"--out must be a folder that every node has, and {path} is not there")
    state = checkpoint.load(path)
    check_same(config, state["settings"])
    return state


def check_folders(config: TrainConfig, saes: Iterable[MLSAEConfig]) -> None:
    """Raise InputError if the folder cannot take the runs, or would lose something.

    What they take on the disk: two weights, the counts of latents, the report; and in each
    checkpoint, one of them being written, the weights and two moments of each."""
    bytes_needed = 0
    for sae in saes:
        bytes_needed += 4 * sae.n_latents * (2 * sae.d_in + 3 * len(sae.layers)) + 12 * 2**20
        bytes_needed += (config.keep_checkpoints + 1) * 24 * sae.n_latents * sae.d_in
    own = (*RUN_FILES, "runs.csv", *RUN_FOLDERS)
    check_out(config.out, config.overwrite, config.resume, own, bytes_needed)
    for pattern in RUN_FOLDERS:
        for folder in config.out.glob(pattern):
            check_out(folder, config.overwrite, config.resume, RUN_FILES, 0)


def empty(folder: Path) -> None:
    """Make the folder, and remove the runs in it, if any: `check_folders` has said that it may."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
