"""One thread that does all work with models, one job after another.

Changes of a model are hooks on it, which every pass of it would see. So passes of different
requests cannot run at once, and requests wait for one another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


class Worker:
    """A thread and its jobs, in the order in which they come."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._lock = threading.Lock()
        self._unfinished = 0
        # A daemon, so that Ctrl-C ends the program while a model loads.
        threading.Thread(target=self._run, name="mlsae-app-worker", daemon=True).start()

    @property
    def unfinished(self) -> int:
        """Jobs that run or wait."""
        return self._unfinished

    def submit(self, job: Callable[[], Result]) -> Future[Result]:
        """Do `job()` once those before it are done. A future that is cancelled before never
        begins."""
        future: Future[Result] = Future()
        with self._lock:
            self._unfinished += 1
        self._jobs.put((future, job))
        return future

    def _run(self) -> None:
        while True:
            future, job = self._jobs.get()
            if future.set_running_or_notify_cancel():
                result, error = None, None
                try:
                    result = job()
                except BaseException as caught:  # whatever it is, the request tells it
                    error = caught
                self._done()
                future.set_exception(error) if error else future.set_result(result)
            else:
                self._done()
            del future, job

    def _done(self) -> None:
        with self._lock:
            self._unfinished -= 1
