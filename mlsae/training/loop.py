"""The training loop: steps, metrics, held-out figures, checkpoints, signals.

Legend: B rows, T positions.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import TrainConfig, settings_of
from ..data.stream import DataStream
from ..data.tokens import Batches, BroadcastBatches
from ..distributed import is_rank0, log_rank0
from . import checkpoint
from .sae_run import Run
from .signals import Signals
from .state import NonFiniteError, Step
from .timer import StageTimer
from .validation import Evaluation, evaluate


class Fit:
    """The training loop of `runs`, side by side on the same residuals, and what it carries from
    step to step beside their states."""

    def __init__(
        self,
        config: TrainConfig,
        runs: Sequence[Run],
        stream: DataStream,
        batches: Batches | BroadcastBatches,
        heldout: Tensor,
        state: dict[str, Any] | None = None,
        saved: Path | None = None,
    ) -> None:
        self.config, self.runs, self.stream, self.mesh = config, runs, stream, stream.mesh
        self.batches, self.heldout = batches, heldout
        self.watch = StageTimer(stream.device)
        self.seconds = 0.0
        self.saved = saved  # the newest checkpoint
        if state:
            self.seconds = state["seconds"]
            self.watch.add(state["stages"])

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.runs[0].trainer.tokens

    def train(self, stream: Iterable[Tensor]) -> None:
        """Train on the batches (B, T) of `stream` up to the tokens asked for; then, or at a
        signal, save a checkpoint."""
        config = self.config
        log_every = Every(config.log_tokens or math.ceil(config.tokens / 100), self.tokens)
        eval_every = Every(config.eval_every or math.inf, self.tokens)
        save_every = Every(config.checkpoint_tokens or math.ceil(config.tokens / 20), self.tokens)
        started = time.perf_counter()
        self._mark = (self.tokens, started)
        before = self.seconds
        bar = tqdm(
            total=config.tokens,
            initial=self.tokens,
            unit=" tokens",
            unit_scale=True,
            desc="training",
            dynamic_ncols=True,
            disable=not is_rank0(),
        )
        world = self.mesh.world
        remember = Signals(only_remember=world.size > 1)
        with remember as signals, bar, self._last_good_named():
            batches = iter(stream)
            while self.tokens < config.tokens:
                n_tokens = self.step(next(batches))
                self.seconds = before + time.perf_counter() - started
                done = self.tokens >= config.tokens
                bar.update(n_tokens)
                if log_every.passed(self.tokens) or done:
                    bar.set_postfix_str(self.write_lines())
                if eval_every.passed(self.tokens) and not done:
                    self.measure()
                caught = world.max_int(signals.caught or 0)  # in any of them
                if save_every.passed(self.tokens) or done or caught:
                    self.save()
                self.watch.lap("logs and checkpoints")
                if caught and not done:
                    bar.close()
                    for run in self.runs:
                        run.save_model()
                    log_rank0(
                        f"stopped by {signal.Signals(caught).name} after {self.tokens:,} tokens; "
                        f"saved {self.saved}; go on with the same command and --resume"
                    )
                    sys.exit(128 + caught)

    def step(self, input_ids: Tensor) -> int:
        """One optimizer step of each run on rows (B, T): the number of tokens. The transformer
        reads them once for all; no weights change where one of the losses is not finite."""
        self.watch.lap("waiting for text")
        n_tokens = self.stream.count(input_ids)
        steps = [Step(run.trainer, n_tokens) for run in self.runs]
        for x in self.stream.residuals(input_ids):
            self.watch.lap("model")
            for step in steps:
                step.add(x)
            self.watch.lap("SAE")
        for run, step in zip(self.runs, steps, strict=True):
            run.check(step)
        for run, step in zip(self.runs, steps, strict=True):
            run.end(step)
        self.watch.lap("optimizer")
        return n_tokens

    @contextmanager
    def _last_good_named(self) -> Iterator[None]:
        """Name the last good checkpoint in a NonFiniteError."""
        try:
            yield
        except NonFiniteError as error:
            good = f"the last good checkpoint is {self.saved}" if self.saved else "none saved yet"
            raise NonFiniteError(f"{error}; {good}") from error

    def write_lines(self) -> str:
        """Log a line of metrics of each run, of the steps since the last one; what the progress
        bar shows of them."""
        (tokens, then), now = self._mark, time.perf_counter()
        self._mark = (self.tokens, now)
        speed = (self.tokens - tokens) / (now - then)
        lines = {run.name: run.write_line(speed, self.seconds) for run in self.runs}
        if len(lines) == 1:
            return "".join(f"fvu={x['fvu']:.3f}, dead={x['dead']:.1%}" for x in lines.values())
        return "fvu " + ", ".join(f"{name}={line['fvu']:.3f}" for name, line in lines.items())

    def measure(self) -> list[Evaluation]:
        """Measure each run on held-out rows, and log it. It changes nothing else."""
        with self.runs[0].trainer.autocast():
            mlsaes = [run.trainer.mlsae for run in self.runs]
            evaluations = evaluate(mlsaes, self.stream.residuals(self.heldout), self.mesh.data)
        for run, figures in zip(self.runs, evaluations, strict=True):
            run.write_heldout(figures)
        self.watch.lap("held-out figures")
        return evaluations

    @torch.no_grad()
    def encode_seconds(self) -> float:
        """How long encoding took in the training, from how long it takes now on a part of the
        held-out text: within a step it cannot be told from the rest of the SAE. In the first
        process, which always has some of the text; the others take part."""
        x = next(self.stream.residuals(self.heldout), None)
        if x is None:
            return 0.0
        watch = StageTimer(self.stream.device)
        for run in self.runs:
            with run.trainer.autocast():
                for stage in ("first", "second"):  # the first one compiles and allocates
                    run.trainer.mlsae.encode(x)
                    watch.lap(stage)
        return watch.seconds()["second"] * self.tokens / self.mesh.data.size / x.shape[1]

    def save(self) -> None:
        """Write a checkpoint: one file for all runs, so that they are of the same moment. The
        first process writes it; it has shards of the latents from those with the same rows."""
        if self.mesh.data.rank > 0:
            return
        state = {
            "settings": settings_of(self.config),
            "seconds": self.seconds,
            "stages": self.watch.seconds(),
            "batches": self.batches.state_dict(),
            "runs": {run.name: run.state_dict() for run in self.runs},
        }
        config = self.config
        if is_rank0():
            self.saved = checkpoint.save(config.out, self.tokens, state, config.keep_checkpoints)


class Every:
    """Whether another `interval` of tokens has been passed since it last was."""

    def __init__(self, interval: float, tokens: int) -> None:
        self._interval, self._count = interval, tokens // interval

    def passed(self, tokens: int) -> bool:
        """Whether `tokens` lies in another interval than at the last call."""
        before, self._count = self._count, tokens // self._interval
        return self._count > before
