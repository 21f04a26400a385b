"""One SAE in training: its trainer, its metrics, and the folder that it leaves.

A training may have several, side by side on the same residuals. None knows of the others, so each
ends as it would alone, to the same bits on a CPU.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch
import transformers

from ..config import TrainConfig, learning_rate, settings_of
from ..files import write_file
from ..report import write_report
from .logs import MetricsLog
from .state import NonFiniteError, Step, Trainer
from .validation import Evaluation


class Run:
    """An SAE in training, in its folder `config.out`, which exists. `config` are its own settings,
    see `config.runs_of`. With a saved `state` it goes on from there. Of several processes, the
    one that `writes` leaves the files; all must make the same calls."""

    def __init__(
        self,
        name: str,
        config: TrainConfig,
        trainer: Trainer,
        state: dict[str, Any] | None = None,
        writes: bool = True,
    ) -> None:
        self.name, self.config, self.trainer = name, config, trainer
        self.id = state["id"] if state else uuid.uuid4().hex
        self.window = trainer.sums()  # since the last line of metrics
        position = 0
        if state:
            trainer.load_state_dict(state["trainer"])
            self.window.load_state_dict(state["window"])
            position = state["metrics_position"]
        self.log = (
            MetricsLog(
                config.out, config.log, settings_of(config), self.id, position, trainer.tokens
            )
            if writes
            else None
        )

    def check(self, step: Step) -> None:
        """Raise NonFiniteError, which names the run, if the loss is not finite."""
        with self._named():
            step.check()

    def end(self, step: Step) -> None:
        """Update the weights, at the rate that is due."""
        self.lr = learning_rate(
            self.config, self.trainer.mlsae.config.n_latents, self.trainer.tokens
        )
        self.window.add(step.end(self.lr))

    def write_line(self, tokens_per_second: float, seconds: float) -> dict[str, Any]:
        """Log a line of metrics of the steps since the last one."""
        trainer, window = self.trainer, self.window
        line = {
            "tokens": trainer.tokens,
            "steps": trainer.steps,
            "loss": window.loss.item() / window.steps,
            "fvu": window.fvu().mean().item(),
            "fvu_layers": window.fvu().tolist(),
            "aux": window.aux.item() / window.steps,
            "dead": trainer.dead_share(),
            "lr": self.lr,
            "tokens_per_second": tokens_per_second,
            "seconds": seconds,
        }
        self.window = trainer.sums()
        if self.log:
            self.log.write(line)
        return line

    def write_heldout(self, figures: Evaluation) -> None:
        """Log figures on held-out text."""
        if self.log:
            self.log.write({"tokens": self.trainer.tokens, "heldout": figures.as_dict()})

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on: tensors, and values as JSON has them.

        Raises NonFiniteError, which names the run, if a weight is not finite."""
        with self._named():
            self.trainer.check_weights()
        return {
            "id": self.id,
            "metrics_position": self.log.position() if self.log else 0,
            "window": self.window.state_dict(),
            "trainer": self.trainer.state_dict(),
        }

    def save_model(self, **known: Any) -> None:
        """Leave a model that `MLSAE.from_pretrained` loads, and its card, in the run's folder;
        what else is `known` of it goes into config.json."""
        if self.trainer.data.rank > 0:
            return
        mlsae = self.trainer.mlsae
        mlsae.save_pretrained(
            self.config.out,
            training=settings_of(self.config),
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
            **known,
        )
        if self.log is not None:
            card = str(mlsae.generate_model_card())  # also over that of a stop before the end
            write_file(self.config.out / "README.md", card.encode())

    def finish(self, figures: Evaluation) -> None:
        """Leave a folder that stands alone, with the last `figures` on held-out text."""
        self.save_model(heldout=figures.as_dict())
        self.dead = self.trainer.dead_share()
        if self.log is None:
            return
        latents = {
            "totals": figures.totals.float().contiguous().cpu(),
            "counts": figures.counts.long().contiguous().cpu(),
        }
        path = self.config.out / "latents.safetensors"
        write_file(path, safetensors.torch.save(latents))
        write_report(self.config.out)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteError as error:
            raise NonFiniteError(f"in {self.config.out}, {error}") from error

    def close(self) -> None:
        """End the log."""
        if self.log:
            self.log.close()
