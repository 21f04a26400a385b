"""The training loop: steps, metrics, held-out figures, checkpoints, signals.

Legend: B rows, T positions.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from . import checkpoint
from .config import TrainConfig, learning_rate, settings_of
from .data import Batches
from .logs import MetricsLog
from .measure import Evaluation, evaluate
from .signals import Signals
from .source import Source
from .stopwatch import Stopwatch
from .trainer import NonFiniteError, Trainer


class Fit:
    """The training loop, and what it carries from step to step beside the trainer's state."""

    def __init__(
        self,
        trainer: Trainer,
        source: Source,
        batches: Batches,
        heldout: Tensor,
        log: MetricsLog,
        run_id: str,
        state: dict[str, Any] | None = None,
        saved: Path | None = None,
    ) -> None:
        self.trainer, self.source, self.batches = trainer, source, batches
        self.heldout, self.log, self.run_id = heldout, log, run_id
        self.config = source.config
        self.window = trainer.sums()  # since the last line of metrics
        self.seconds = 0.0
        self.saved = saved  # the newest checkpoint
        if state:
            self.window.load_state_dict(state["window"])
            self.seconds = state["seconds"]
            trainer.watch.add(state["stages"])

    def run(self, stream: Iterable[Tensor]) -> None:
        """Train on the batches (B, T) of `stream` up to the tokens asked for; then, or at a
        signal, save a checkpoint."""
        config, trainer = self.config, self.trainer
        log_every = Every(config.log_tokens or math.ceil(config.tokens / 100), trainer.tokens)
        eval_every = Every(config.eval_every or math.inf, trainer.tokens)
        save_every = Every(
            config.checkpoint_tokens or math.ceil(config.tokens / 20), trainer.tokens
        )
        started = time.perf_counter()
        self._mark = (trainer.tokens, started)
        before = self.seconds
        bar = tqdm(
            total=config.tokens,
            initial=trainer.tokens,
            unit=" tokens",
            unit_scale=True,
            desc="training",
        )
        with Signals() as signals, bar:
            batches = iter(stream)
            while trainer.tokens < config.tokens:
                lr, n_tokens = self.step(next(batches))
                self.seconds = before + time.perf_counter() - started
                done = trainer.tokens >= config.tokens
                bar.update(n_tokens)
                if log_every.passed(trainer.tokens) or done:
                    line = self.line(lr)
                    self.log.write(line)
                    bar.set_postfix(fvu=f"{line['fvu']:.3f}", dead=f"{line['dead']:.1%}")
                if eval_every.passed(trainer.tokens) and not done:
                    self.measure()
                if save_every.passed(trainer.tokens) or done or signals.caught:
                    self.save()
                trainer.watch.lap("logs and checkpoints")
                if signals.caught and not done:
                    bar.close()
                    save_model(config, trainer)
                    say(
                        f"stopped by {signals.caught.name} after {trainer.tokens:,} tokens; saved "
                        f"{self.saved}; go on with the same command and --resume"
                    )
                    sys.exit(128 + signals.caught)

    def step(self, input_ids: Tensor) -> tuple[float, int]:
        """One optimizer step on rows (B, T): its learning rate and number of tokens."""
        self.trainer.watch.lap("waiting for text")
        n_tokens = self.source.count(input_ids)
        lr = learning_rate(self.config, self.trainer.mlsae.config.n_latents, self.trainer.tokens)
        try:
            sums = self.trainer.step(self.source.residuals(input_ids), n_tokens, lr)
        except NonFiniteError as error:
            good = f"the last good checkpoint is {self.saved}" if self.saved else "none saved yet"
            raise NonFiniteError(f"{error}; {good}") from error
        self.window.add(sums)
        return lr, n_tokens

    def line(self, lr: float) -> dict[str, Any]:
        """A line of metrics of the steps since the last one."""
        trainer, window = self.trainer, self.window
        (tokens, then), now = self._mark, time.perf_counter()
        line = {
            "tokens": trainer.tokens,
            "steps": trainer.steps,
            "loss": window.loss.item() / window.steps,
            "fvu": window.fvu().mean().item(),
            "fvu_layers": window.fvu().tolist(),
            "aux": window.aux.item() / window.steps,
            "dead": trainer.dead().double().mean().item(),
            "lr": lr,
            "tokens_per_second": (trainer.tokens - tokens) / (now - then),
            "seconds": self.seconds,
        }
        self.window, self._mark = trainer.sums(), (trainer.tokens, now)
        return line

    def measure(self) -> Evaluation:
        """Measure on held-out rows, and log it. It changes nothing else."""
        with self.trainer.autocast():
            figures = evaluate(self.trainer.mlsae, self.source.residuals(self.heldout))
        self.log.write({"tokens": self.trainer.tokens, "heldout": figures.as_dict()})
        self.trainer.watch.lap("held-out figures")
        return figures

    @torch.no_grad()
    def encode_seconds(self) -> float:
        """How long encoding took in the run, from how long it takes now on a part of the
        held-out text: within a step it cannot be told from the rest of the SAE."""
        x = next(self.source.residuals(self.heldout))
        watch = Stopwatch(self.source.device)
        with self.trainer.autocast():
            for stage in ("first", "second"):  # the first one compiles and allocates
                self.trainer.mlsae.encode(x)
                watch.lap(stage)
        return watch.seconds()["second"] * self.trainer.tokens / x.shape[1]

    def save(self) -> None:
        """Write a checkpoint."""
        state = {
            "settings": settings_of(self.config),
            "run_id": self.run_id,
            "metrics_position": self.log.position(),
            "seconds": self.seconds,
            "stages": self.trainer.watch.seconds(),
            "window": self.window.state_dict(),
            "trainer": self.trainer.state_dict(),
            "batches": self.batches.state_dict(),
        }
        tokens, keep = self.trainer.tokens, self.config.keep_checkpoints
        self.saved = checkpoint.save(self.config.out, tokens, state, keep)


class Every:
    """Whether another `interval` of tokens has been passed since it last was."""

    def __init__(self, interval: float, tokens: int) -> None:
        self._interval, self._count = interval, tokens // interval

    def passed(self, tokens: int) -> bool:
        """Whether `tokens` lies in another interval than at the last call."""
        before, self._count = self._count, tokens // self._interval
        return self._count > before


def save_model(config: TrainConfig, trainer: Trainer) -> None:
    """Leave a model that `MLSAE.from_pretrained` loads in the run's folder."""
    trainer.mlsae.save_pretrained(
        config.out,
        training=settings_of(config),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )


def say(message: str) -> None:
    """Print to the terminal, not among the results."""
    print(message, file=sys.stderr, flush=True)
