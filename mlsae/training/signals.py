"""SIGINT and SIGTERM: remembered, so that a step can end first."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

_WATCHED = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """A context in which the first SIGINT or SIGTERM only sets `caught`, and a second one
    terminates the process. With `only_remember` it does not, because launchers forward a signal
    of their own. Outside the main thread, where Python has no signals, it does nothing."""

    def __init__(self, only_remember: bool = False) -> None:
        self.only_remember = only_remember
        self.caught: signal.Signals | None = None

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._catch) for number in _WATCHED}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = signal.Signals(number)
        if not self.only_remember:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
