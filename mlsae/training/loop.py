"""The training loop: one optimizer step after another; at intervals a log line, a validation, a
checkpoint.

Several SAEs train side by side on the same residuals. None knows of the others, so each ends as it
would alone, to the same bits on a CPU.

Legend: L layers, N tokens, D width of the residual stream, B rows, T positions.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import TrainConfig, shared_folder
from ..data.stream import DataStream, Residuals
from ..data.tokens import Batches, BroadcastBatches
from ..distributed import is_rank0, log_rank0
from ..errors import NonFiniteError
from . import checkpoint, previous
from .gradients import forward_backward
from .run_dir import RunDir
from .settings import History, joint_settings
from .signals import Signals
from .state import TrainState
from .step import Step, StepMetrics
from .timer import Every, StageTimer
from .validation import Validation, validate


def train_step(
    states: Sequence[TrainState],
    parts: Iterable[Residuals],
    n_tokens: int,
    lap: Callable[[str], None] = lambda stage: None,
) -> list[StepMetrics]:
    """One optimizer step of each SAE on the same batch: residuals (L, N, D) and their masks (N,) in
    parts, of `n_tokens` tokens in all parts of all processes. With a lens, the losses are in its
    basis. `lap` is told when a stage ends.
    Returns each SAE's metrics of the step.

    Raises NonFiniteError, in every process, if a loss is not finite; no weight has changed then.
    """
    steps = [state.begin_step(n_tokens) for state in states]
    mlsae = states[0].mlsae  # all have one lens
    for residuals, mask in parts:
        x = residuals if mlsae.lens is None else mlsae.carry(residuals, mlsae.config.layers).z
        lap("model")
        for state, step in zip(states, steps, strict=True):
            forward_backward(state, step, x, mask, lap)
    for state, step in zip(states, steps, strict=True):
        all_reduce_grads(state)
        if state.data.size > 1:
            step.metrics.all_reduce_(state.data)
            state.data.max_(state.last_active)
    for state, step in zip(states, steps, strict=True):
        raise_if_nonfinite(state, step)
    for state, step in zip(states, steps, strict=True):
        set_lr(state.optimizer, state.schedule(state.tokens))
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.end_step(step)
    lap("optimizer")
    return [step.metrics for step in steps]


def all_reduce_grads(state: TrainState) -> None:
    """Add up the gradients of all processes.

    Once per step, and not beside the backward pass: the gradients of both weights come last, one
    after the other, so there is little left to hide the messages behind.
    """
    if state.data.size == 1:
        return
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    for p in parameters:
        if p.grad is None:  # in a process that has no tokens of this step
            p.grad = torch.zeros_like(p)
    state.data.sum_all_([p.grad for p in parameters if p.grad is not None])


def raise_if_nonfinite(state: TrainState, step: Step) -> None:
    """Raise NonFiniteError if the step's loss is not finite, which names the layer and the way
    out; the gradients are dropped."""
    loss = state.fetch(step)
    if math.isfinite(loss):
        return
    state.optimizer.zero_grad()
    layers = state.mlsae.config.layers
    at = f"at step {state.steps}, after {state.tokens:,} tokens; the weights are untouched"
    message = f"the loss is {loss} {at}. Lower --lr"
    for layer, sq_error in zip(layers, step.metrics.sq_error, strict=True):
        if not sq_error.isfinite():
            message = f"the reconstruction of layer {layer} is not finite {at}. Lower --lr"
            break
    for layer, mean in zip(layers, step.metrics.moments.mean, strict=True):
        if not mean.isfinite().all():
            message = (
                f"the residuals of layer {layer} are not finite {at}. Leave that layer out "
                "with --layers, or give a dtype of larger range with --model_dtype"
            )
            break
    raise NonFiniteError(state.where() + message)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all parameter groups the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class TrainLoop:
    """The loop over batches, and what it carries from step to step beside the SAEs' states."""

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        states: Sequence[TrainState],
        run_dirs: Sequence[RunDir],
        stream: DataStream,
        batches: Batches | BroadcastBatches,
        heldout: Tensor,
        history: History,
    ) -> None:
        self.configs, self.states, self.run_dirs = configs, states, run_dirs
        self.config = configs[0]  # for what all of them share
        self.out = shared_folder(configs)
        self.stream, self.batches, self.heldout, self.mesh = stream, batches, heldout, stream.mesh
        self.history = history
        self.timer = StageTimer(stream.device)
        self.seconds = 0.0
        self.passes = 1  # over the text: which one the last batch ended in
        keep, out = self.config.keep_checkpoints, self.out
        self.checkpoints = checkpoint.CheckpointWriter(out, keep, lambda: previous.discard(out))

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.states[0].tokens

    def resume(self, state: dict[str, Any], path: Path) -> None:
        """Restore the loop's own part of the checkpoint at `path`."""
        self.seconds, self.checkpoints.saved = state["seconds"], path
        self.passes = state.get("passes", 1)  # not in the files of 0.2
        self.timer.add(state["stages"])

    def run(self, batches: Iterable[Tensor]) -> None:
        """Train on batches (B, T) up to the tokens asked for; then, or at a signal, save."""
        config, timer = self.config, self.timer
        log_every = Every(config.log_tokens or math.ceil(config.tokens / 100), self.tokens)
        eval_every = Every(config.eval_every or math.inf, self.tokens)
        save_every = Every(config.checkpoint_tokens or math.inf, self.tokens)
        started = time.perf_counter() - self.seconds
        self._saved_at = time.perf_counter()
        self._mark = (self.tokens, time.perf_counter())
        world, batches = self.mesh.world, iter(batches)
        remember = Signals(only_remember=world.size > 1)
        with remember as signals, self._progress() as bar, self._last_good_named():
            while self.tokens < config.tokens:
                input_ids = next(batches)
                timer.lap("waiting for text")
                self._count_passes(bar)
                n_tokens = self.stream.count(input_ids)
                train_step(
                    self.states, self.stream.masked_residuals(input_ids), n_tokens, timer.lap
                )

                self.seconds = time.perf_counter() - started
                done = self.tokens >= config.tokens
                bar.update(n_tokens)
                if log_every.passed(self.tokens) or done:
                    bar.set_postfix_str(self.log())
                if eval_every.passed(self.tokens) and not done:
                    self.validate()
                # In any process; the clock is that of rank 0.
                caught, late = divmod(world.max_int(2 * (signals.caught or 0) + self._late()), 2)
                if save_every.passed(self.tokens) or done or caught or late:
                    self.save()
                self.checkpoints.check()
                timer.lap("logs and checkpoints")
                if caught and not done:
                    bar.close()
                    self._stop(caught)

    def log(self) -> str:
        """Log a line of metrics of each SAE; what the progress bar shows of them."""
        (tokens, then), now = self._mark, time.perf_counter()
        self._mark = (self.tokens, now)
        speed = (self.tokens - tokens) / (now - then)
        told = (speed, self.seconds, self.passes)
        lines = [run_dir.log_metrics(*told) for run_dir in self.run_dirs]
        again = f", pass {self.passes}" if self.passes > 1 else ""
        if len(lines) == 1:
            return f"fvu={lines[0]['fvu']:.3f}, dead={lines[0]['dead']:.1%}{again}"
        named = zip(self.run_dirs, lines, strict=True)
        fvus = ", ".join(f"{run_dir.name}={line['fvu']:.3f}" for run_dir, line in named)
        return f"fvu {fvus}{again}"

    def validate(self) -> list[Validation]:
        """Measure each SAE on held-out rows, and log it. Nothing else changes."""
        with self.states[0].autocast():
            mlsaes = [state.mlsae for state in self.states]
            residuals = self.stream.kept_and_dropped(self.heldout)
            validations = validate(mlsaes, residuals, self.mesh.data)
        for run_dir, validation in zip(self.run_dirs, validations, strict=True):
            run_dir.log_validation(validation)
        self.timer.lap("validation")
        return validations

    def save(self) -> None:
        """Begin to write a checkpoint: one file for all SAEs, so that they are of the same moment.
        Rank 0 writes it; the processes with the same rows send it their shards of the latents."""
        if self.mesh.data.rank > 0:
            return
        lens = self.states[0].mlsae.lens
        state = {
            "settings": joint_settings(self.configs),
            **self.history._asdict(),
            "seconds": self.seconds,
            "passes": self.passes,
            "stages": self.timer.seconds(),
            "batches": self.batches.state_dict(),
            "dropped": self.stream.drop.as_dict(),
            "lens": lens and lens.digest,
            "model_dtype": str(self.stream.dtype).removeprefix("torch."),
            "processes": self.mesh.data.size,
            "runs": {run_dir.name: run_dir.state_dict() for run_dir in self.run_dirs},
        }
        if is_rank0():
            self.checkpoints.save(self.tokens, state)
        self._saved_at = time.perf_counter()

    def about(self) -> dict[str, Any]:
        """What config.json says of the training beside its settings."""
        extensions = self.history.extensions
        return {"passes": self.passes} | ({"extensions": extensions} if extensions else {})

    def _late(self) -> bool:
        """Whether rank 0 finds that the last checkpoint was long ago."""
        config = self.config
        if config.checkpoint_tokens is not None or not is_rank0():
            return False
        return time.perf_counter() - self._saved_at > 60 * config.checkpoint_minutes

    def _count_passes(self, bar: tqdm[None]) -> None:
        """Note the pass of the batch, and warn once, when the second begins."""
        before, self.passes = self.passes, self.batches.passes
        if before == 1 < self.passes and is_rank0():
            bar.write(
                f"DATASET is at its end after {self.tokens:,} of --tokens {self.config.tokens:,}: "
                "the run goes on with the same text, in another order; for new text to the end, "
                "give a larger dataset or fewer tokens",
                file=sys.stderr,
            )

    def _stop(self, caught: int) -> None:
        """End the program after a signal, with models that load."""
        for run_dir in self.run_dirs:
            run_dir.save_model(**self.about())
        self.checkpoints.wait()
        log_rank0(
            f"stopped by {signal.Signals(caught).name} after {self.tokens:,} tokens; "
            f"saved {self.checkpoints.saved}; resume with the same command and --resume"
        )
        sys.exit(128 + caught)

    def _progress(self) -> tqdm[None]:
        quiet: dict[str, Any] = {} if is_rank0() else {"disable": True}  # {}: as TQDM_DISABLE says
        return tqdm(
            total=self.config.tokens,
            initial=self.tokens,
            unit=" tokens",
            unit_scale=True,
            desc="training",
            dynamic_ncols=True,
            **quiet,
        )

    @contextmanager
    def _last_good_named(self) -> Iterator[None]:
        """Name the last good checkpoint in a NonFiniteError."""
        try:
            yield
        except NonFiniteError as error:
            self.checkpoints.wait()
            saved = self.checkpoints.saved
            good = f"the last good checkpoint is {saved}" if saved else "none saved yet"
            raise NonFiniteError(f"{error}; {good}") from error
