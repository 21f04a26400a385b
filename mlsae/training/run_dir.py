"""The folder of a run: what it may hold, what is written there, the checkpoint to resume from."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from ..batchtopk import BatchTopKSAE
from ..config import TrainConfig, shared_folder
from ..data.sinks import DropRule
from ..distributed import log_rank0
from ..errors import InputError
from ..files import (
    ANALYSIS_FILES,
    EVALUATION_FILES,
    LABELS,
    LOCK,
    check_folder,
    check_out,
    locked,
    write_file,
)
from ..formats import LENS
from ..model import MLSAEConfig
from ..report import write_report
from . import checkpoint, previous
from .inputs import Fingerprints, check_inputs
from .logs import MetricsLog
from .needs import disk_of
from .settings import check_same, settings_of
from .state import TrainState
from .validation import Validation

PUSHED_FILES = (  # what others can use of a run
    "config.json",
    "model.safetensors",
    LENS,
    "latents.safetensors",
    "metrics.jsonl",
    "report.html",
    "README.md",
)
RUN_FILES = (
    *PUSHED_FILES,
    *EVALUATION_FILES,
    *ANALYSIS_FILES,
    LABELS,
    "checkpoints",
    "tensorboard",
    "wandb",
    previous.PREVIOUS,
)
_MANY_CAPPED = 0.01  # a share of vectors
RUN_FOLDERS = ("x*-k*", "n*-k*")  # see `SAEConfig.name`


class RunDir:
    """The folder of one SAE in training, `config.out`, and what is written there.

    Rank 0 `writes`; every process makes the same calls. Given the saved part of a checkpoint, it
    restores `state` from it, and the log goes on where it was then.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        saved: dict[str, Any] | None = None,
        writes: bool = True,
        drop: DropRule | None = None,
    ) -> None:
        self.config, self.state, self.drop = config, state, drop or DropRule()
        self.capped = 0.0
        """With batchtopk, the share of capped vectors in the last line of the log."""
        self.id = saved["id"] if saved else uuid.uuid4().hex
        position = 0
        if saved:
            state.load_state_dict(saved)
            position = saved["metrics_position"]
        self.log: MetricsLog | None = None
        if writes:
            config.out.mkdir(parents=True, exist_ok=True)
            settings = settings_of(config)
            self.log = MetricsLog(config.out, config.log, settings, self.id, position, state.tokens)

    @property
    def name(self) -> str:
        """What tells the SAE from others that train beside it."""
        return self.config.sae.name

    def log_metrics(self, tokens_per_second: float, seconds: float, passes: int) -> dict[str, Any]:
        """Log a line of metrics of the steps since the last one, the last of which was in pass
        number `passes` over the text."""
        state = self.state
        window = state.end_window()
        told = [window.loss[None] / window.steps, window.aux[None] / window.steps, window.fvu()]
        if isinstance(state.mlsae.sae, BatchTopKSAE):
            threshold = state.mlsae.sae.threshold.double()  # as config.json will have it
            told += [window.capped_share[None], threshold[None]]
        loss, aux, *rest = torch.cat(told).tolist()  # all in one transfer
        fvu_layers = rest[: len(state.mlsae.config.layers)]
        line = {
            "tokens": state.tokens,
            "steps": state.steps,
            "passes": passes,
            "loss": loss,
            "fvu": sum(fvu_layers) / len(fvu_layers),
            "fvu_layers": fvu_layers,
            "aux": aux,
            "dead": state.dead_share(),
            "lr": state.optimizer.param_groups[0]["lr"],
            "tokens_per_second": tokens_per_second,
            "seconds": seconds,
        }
        if isinstance(state.mlsae.sae, BatchTopKSAE):
            self.capped, line["threshold"] = rest[-2:]
            line["capped"] = self.capped
        if self.log:
            self.log.write(line)
        return line

    def describe_cap(self) -> str:
        """That the cap of batchtopk is met by so many vectors that it matters; else ""."""
        if self.capped <= _MANY_CAPPED:
            return ""
        k_max = self.state.mlsae.config.k_max
        return (
            f"{self.capped:.1%} of the vectors that {self.name} saw last had all {k_max} latents "
            "active that --sae.k_max allows, so that more of theirs may have been left out; a "
            "larger one gives them room"
        )

    def log_validation(self, validation: Validation) -> None:
        """Log validation metrics."""
        if self.log:
            self.log.write({"tokens": self.state.tokens, "heldout": validation.as_dict()})

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on: tensors and JSON-serializable values.

        Raises NonFiniteError if a weight is not finite."""
        self.state.check_weights()
        position = self.log.position() if self.log else 0
        return {"id": self.id, "metrics_position": position, **self.state.state_dict()}

    def save_model(self, **about: Any) -> None:
        """Leave a model that `MLSAE.from_pretrained` loads, and its card; `about` goes into
        config.json."""
        if self.state.data.rank > 0:
            return
        mlsae = self.state.mlsae
        mlsae.save_pretrained(
            self.config.out,
            training=settings_of(self.config),
            dropped=self.drop.as_dict(),
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
            **about,
        )
        if self.log is not None:
            card = str(mlsae.generate_model_card())  # also over that of a stop before the end
            write_file(self.config.out / "README.md", card.encode())

    def finish(self, validation: Validation, **about: Any) -> None:
        """Leave a folder that stands alone, with the last `validation`; for `about` see
        `save_model`."""
        self.save_model(heldout=validation.as_dict(), **about)
        if self.log is None:
            return
        latents = {
            "totals": validation.totals.float().contiguous().cpu(),
            "counts": validation.counts.long().contiguous().cpu(),
        }
        path = self.config.out / "latents.safetensors"
        write_file(path, safetensors.torch.save(latents))
        try:
            write_report(self.config.out)
        except InputError as error:  # a file of an earlier measurement; the training is whole
            log_rank0(
                f"the run is whole, and {self.config.out / 'report.html'} could not be drawn: "
                f"{error}"
            )

    def close(self) -> None:
        """End the log."""
        if self.log:
            self.log.close()


@contextmanager
def held(configs: Sequence[TrainConfig]) -> Iterator[None]:
    """Hold the folder of the run in this block, and put back what a killed process was moving.

    Raises InputError if another process trains in it; or in a folder of the sweep in it, or in the
    sweep that it is a folder of.
    """
    out = shared_folder(configs)
    with locked(out):
        others = [folder for pattern in RUN_FOLDERS for folder in out.glob(pattern)]
        if any(fnmatch(out.absolute().name, pattern) for pattern in RUN_FOLDERS):
            others.append(out.absolute().parent)
        for other in others:
            if (other / LOCK).exists():
                with locked(other):
                    pass
        previous.recover(out)
        yield


def newest_checkpoint(configs: Sequence[TrainConfig]) -> Path | None:
    """The newest checkpoint of the run, or None if none has been saved yet. Raises InputError if
    starting over would discard a trained model."""
    out = shared_folder(configs)
    path = checkpoint.newest(out, log_rank0)
    if path:
        return path
    folders = (out, *(config.out for config in configs))
    if checkpoint.any_written(out) or any((f / "model.safetensors").exists() for f in folders):
        raise InputError(
            f"--resume needs an undamaged checkpoint, and {out} has none; choose another --out, or "
            "start over with --overwrite"
        )
    log_rank0(f"there is no checkpoint in {out} yet; starting at the beginning")
    return None


def load_checkpoint(
    path: Path, configs: Sequence[TrainConfig], inputs: Fingerprints
) -> dict[str, Any]:
    """The state in a checkpoint that rank 0 has checked for damage. Raises InputError if this
    process cannot see it, or it was saved with other settings or `inputs`."""
    if not path.exists():
        raise InputError(f"--out must be a folder that every node has, and {path} is not there")
    state = checkpoint.load(path)
    check_same(configs, state["settings"])
    check_inputs(configs[0], state["settings"], state.get("inputs"), inputs)
    return state


def check_folders(
    configs: Sequence[TrainConfig], saes: Iterable[MLSAEConfig], seq_len: int
) -> None:
    """Raise InputError if the folder cannot take a run on rows of `seq_len` tokens, or something
    would be lost. For what the disk must hold see `needs.disk_of`."""
    config, out = configs[0], shared_folder(configs)
    for each in configs:
        check_folder(each.out, files=() if config.overwrite else PUSHED_FILES)
    own = (*RUN_FILES, "runs.csv", *RUN_FOLDERS)
    needed = disk_of(configs, saes, seq_len).most
    check_out(out, config.overwrite, config.resume, own, needed)
    for pattern in RUN_FOLDERS:
        for folder in out.glob(pattern):
            check_out(folder, config.overwrite, config.resume, RUN_FILES, 0)
