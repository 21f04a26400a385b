"""How fast a training is here: its own code, for about ten seconds, on its own text.

Nothing is written to the disk.

Legend: L layers, B rows, T positions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from ..config import TrainConfig, heldout_tokens
from ..data.config import DataConfig
from ..data.documents import is_local
from ..data.stream import DataStream, Residuals, Shape
from ..data.tokens import Rows
from ..data.transformer import load_tokenizer
from ..distributed import ALONE
from ..model import MLSAEConfig
from ..training.loop import train_step
from ..training.needs import Needs
from ..training.start import initialize, lens_of, new_state
from ..training.state import TrainState
from ..training.validation import validate
from .gpus import DISK_RATE
from .times import NOTHING, Span, StepTime, Times, n_validations

_FINISH = Span(1.0, 0.6)  # of the report: measured on 2 cores of a CPU, 2026-11-27
_WARM, _LEAST = 1, 2  # steps that do not count, and that do at least
_SHARE = 4  # a step of the probe takes a quarter of its time at most


def check_text(config: DataConfig, seq_len: int) -> None:
    """Raise InputError if the dataset cannot be read, or has not one row to train on."""
    next(Rows(config, load_tokenizer(config), seq_len, "train"))


class _Clock:
    """Times what runs in its block, once the device is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Span:
        """The time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return Span(time.perf_counter(), time.process_time())

    @contextmanager
    def timed(self, into: dict[str, Span], name: str) -> Iterator[None]:
        """Add what the block takes to `into[name]`."""
        before = self.now()
        yield
        into[name] = into.get(name, NOTHING) + since(before, self.now())


class _Queue:
    """What this process's threads wait for a processor, from now on."""

    def __init__(self) -> None:
        self._before = self._now()

    def share(self) -> float:
        """Of the time that they could have run, that in which others had it. 0 where the system
        does not tell: Linux does, in `schedstat`."""
        (waited, ran), (waited_before, ran_before) = self._now(), self._before
        waited, ran = max(0.0, waited - waited_before), ran - ran_before
        return waited / (waited + ran) if waited + ran > 0 else 0.0

    def _now(self) -> tuple[float, float]:
        """Seconds that threads have waited, and that they have run."""
        waited = 0
        for file in Path("/proc/self/task").glob("*/schedstat"):
            with suppress(OSError):  # the thread has ended
                waited += int(file.read_text().split()[1])
        return waited / 1e9, time.process_time()


def since(before: Span, now: Span) -> Span:
    """The time from one to the other."""
    return Span(now.wall - before.wall, now.cpu - before.cpu)


def probe(
    configs: Sequence[TrainConfig],
    saes: Sequence[MLSAEConfig],
    shape: Shape,
    needs: Needs,
    device: torch.device,
    micro_rows: int,
    seconds: float,
) -> Times:
    """Measure a training of `configs` for about `seconds` after its start, and say what all of it
    takes. Raises InputError for what is wrong with the model or the text."""
    config, clock = configs[0], _Clock(device)
    once = {"start of Python": Span(_age(), time.process_time())}
    with clock.timed(once, "load the model"):
        stream = DataStream(
            config.data, shape, device, micro_rows=micro_rows, seed=config.seed, whole=False
        )
    batch_rows = needs.step_tokens // shape.seq_len
    rests_on = [f"measured on {device.type}, by the training's own steps"]
    if is_local(config.data):
        rests_on.append("on the run's own text")
        with clock.timed(once, "held-out text"):
            heldout = stream.heldout(heldout_tokens(config))
        with closing(stream.batches(batch_rows)) as batches, clock.timed(once, "first text"):
            first = next(batches)
    else:
        rests_on.append("on random token ids, as the text is not on this machine")
        check_text(config.data, shape.seq_len)
        heldout, first = _random_rows(stream, config, batch_rows)
    lens = lens_of(config, shape, None)
    states = [
        new_state(each, sae, device, ALONE, config.tokens, lens=lens and lens.to(device))
        for each, sae in zip(configs, saes, strict=True)
    ]
    small = first[:micro_rows]  # a part: a whole batch may take minutes
    with clock.timed(once, "first batch"):
        initialize(configs, states, stream, small)
    once["first batch"] *= len(first) / len(small)
    queued = _Queue()
    step, n_steps = _steps(states, stream, first, clock, seconds)
    queued_share = queued.share()
    rests_on.append(f"{n_steps} steps timed, after {_WARM} to warm up")
    once |= _validations(configs, states, stream, heldout, needs, clock)
    written = needs.disk.checkpoint / DISK_RATE  # the others, while training goes on
    once["last checkpoint"] = Span(written, written)
    rests_on.append(f"a checkpoint at {DISK_RATE / 1e9:.1f} GB/s, which is no measurement of here")
    once["report"] = _FINISH
    return Times("probe", step, needs.steps, needs.step_tokens, once, rests_on, queued_share)


def _steps(
    states: Sequence[TrainState],
    stream: DataStream,
    first: Tensor,
    clock: _Clock,
    seconds: float,
) -> tuple[StepTime, int]:
    """The time of a step on the batch `first` (B, T), and how many were timed: of as many of its
    parts as fit in a quarter of `seconds`, one at least."""
    spans: dict[str, Span] = {}
    mark = [clock.now()]

    def lap(stage: str) -> None:
        now = clock.now()
        spans[stage] = spans.get(stage, NOTHING) + since(mark[0], now)
        mark[0] = now

    def run(rows: Tensor) -> None:
        mark[0] = clock.now()
        n_tokens = stream.count(rows)
        parts: Iterator[Residuals] = stream.masked_residuals(rows)
        train_step(states, parts, n_tokens, lap)

    rows = first[: stream.micro_rows]
    run(rows)
    before = clock.now()
    run(rows)  # warm: how long a part takes
    part = since(before, clock.now()).wall
    n_parts = max(1, int(seconds / _SHARE / max(part, 1e-9)))
    rows = first[: n_parts * stream.micro_rows]
    spans.clear()
    started, n_steps = clock.now(), 0
    while n_steps < _LEAST or since(started, clock.now()).wall < seconds:
        run(rows)
        n_steps += 1
    once, whole = 1 / n_steps, len(first) / len(rows) / n_steps
    sae = (spans["encode"] + spans["rest of the SAE"]) * whole
    model = spans["model"] * whole
    return StepTime(model, sae, spans["optimizer"] * once), n_steps


def _validations(
    configs: Sequence[TrainConfig],
    states: Sequence[TrainState],
    stream: DataStream,
    heldout: Tensor,
    needs: Needs,
    clock: _Clock,
) -> dict[str, Span]:
    """The time of all validations, from that of two parts of the held-out rows."""
    config, spans = configs[0], dict[str, Span]()
    rows = heldout[: 2 * stream.micro_rows]
    with states[0].autocast(), clock.timed(spans, "validation"):
        validate([state.mlsae for state in states], stream.kept_and_dropped(rows))
    times = n_validations(config, needs.steps)
    n_rows = max(1, heldout_tokens(config) // stream.seq_len)
    n_rows = min(n_rows, len(heldout)) if is_local(config.data) else n_rows
    return {"validation": spans["validation"] * (times * n_rows / len(rows))}


def _random_rows(stream: DataStream, config: TrainConfig, batch_rows: int) -> tuple[Tensor, Tensor]:
    """Rows to validate on, at most two parts, and a batch (B, T), of random token ids."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (2 * stream.micro_rows + batch_rows, stream.seq_len)
    ids = torch.randint(len(stream.tokenizer), shape, generator=generator)
    return ids[: 2 * stream.micro_rows], ids[2 * stream.micro_rows :]


def _age() -> float:
    """Seconds since this process began; its processor time where the system does not tell."""
    try:
        started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return time.process_time()
    return up - started / os.sysconf("SC_CLK_TCK")
