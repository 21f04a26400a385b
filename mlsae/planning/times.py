"""How long a training takes: what it does once, and what it does how often."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ..config import TrainConfig


class Span(NamedTuple):
    """A time, by the clock and by the processor."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds of all threads of the process: other processes hardly change them."""

    def __add__(self, other: Span) -> Span:  # type: ignore[override]
        return Span(self.wall + other.wall, self.cpu + other.cpu)

    def __mul__(self, factor: float) -> Span:  # type: ignore[override]
        return Span(self.wall * factor, self.cpu * factor)


NOTHING = Span(0.0, 0.0)
_BUSY = 0.1  # of the time: then torch's threads also wait for one another


class StepTime(NamedTuple):
    """A step: parts of a batch, then the optimizer."""

    model: Span
    """The transformer's forward pass of the whole batch."""
    sae: Span
    """Forward and backward of the SAEs, of the whole batch."""
    optimizer: Span

    @property
    def total(self) -> Span:
        """All of it."""
        return self.model + self.sae + self.optimizer


@dataclass(frozen=True)
class Times:
    """What a run takes, by part; `basis` says what the figures rest on."""

    basis: str
    """"probe": measured here; "model": computed."""
    step: StepTime
    steps: int
    step_tokens: int
    once: dict[str, Span]
    """By name, beside the steps."""
    rests_on: list[str] = field(default_factory=list)
    """In words, a line each."""
    queued: float = 0.0
    """Of the time that threads of the probe could have run, the share in which other processes had
    the processor; 0 where the system does not tell."""

    @property
    def parts(self) -> dict[str, Span]:
        """Seconds by name, in the order of the run."""
        named = {"transformer": self.step.model, "SAE": self.step.sae}
        steps = {name: span * self.steps for name, span in named.items()}
        return {**steps, "optimizer": self.step.optimizer * self.steps, **self.once}

    @property
    def total(self) -> Span:
        """From the start of the program to its end."""
        return sum(self.parts.values(), NOTHING)

    @property
    def busy(self) -> bool:
        """Whether other processes make the times by the clock a guess."""
        return self.queued > _BUSY

    @property
    def tokens_per_second(self) -> float:
        """While it trains, and waits for text."""
        waiting = self.once.get("waiting for text", NOTHING).wall
        return self.step_tokens / (self.step.total.wall + waiting / self.steps)


def n_validations(config: TrainConfig, steps: int) -> int:
    """How often a run validates: at intervals, and at its end."""
    if config.eval_every is None:
        return 1
    return 1 + min(steps - 1, (config.tokens - 1) // config.eval_every)
