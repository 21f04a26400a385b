"""The runs that are served, each opened when its page is first asked for."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, first_line
from .worker import Worker

if TYPE_CHECKING:
    from .__main__ import AppConfig
    from .files import RunFiles
    from .session import Session


class Run:
    """A run that is served: what its files hold, and its models, once they are loaded."""

    def __init__(
        self, folder: Path, config: AppConfig, worker: Worker, opened: list[Session]
    ) -> None:
        self.folder = folder
        self.about = _read_about(folder)
        """config.json, of which only d_in, n_latents and layers are checked yet."""
        self.analyzed = (folder / "analysis.json").is_file()
        self._config, self._worker, self._opened = config, worker, opened
        self._lock = threading.Lock()
        self._files: Future[RunFiles] | None = None
        self._session: Future[Session] | None = None

    def files(self) -> Future[RunFiles]:
        """What its files hold."""

        def read() -> RunFiles:
            from .files import RunFiles  # with torch

            return RunFiles(self.folder)

        with self._lock:
            if self._files is None or _failed(self._files):
                self._files = self._worker.submit(read)
            return self._files

    def session(self) -> Future[Session]:
        """Its models. What has failed, such as a download, is tried again."""

        def load() -> Session:
            from .session import Session  # with torch and transformers

            session = Session(self.folder, self.about, self._config, self._opened)
            self._opened.append(session)
            return session

        with self._lock:
            if self._session is None or _failed(self._session):
                self._session = self._worker.submit(load)
            return self._session


class Runs:
    """All of them, and the thread that works for them.

    Raises InputError if a folder holds no run.
    """

    def __init__(self, config: AppConfig) -> None:
        self.worker = Worker()
        self.closing = threading.Event()
        """Set when the program ends: what is running stops."""
        opened: list[Session] = []  # of all runs
        self.all = [Run(folder, config, self.worker, opened) for folder in config.runs]
        names = [run.folder.absolute().name for run in self.all]
        self.names = [
            name if names.count(name) == 1 else str(run.folder)
            for name, run in zip(names, self.all, strict=True)
        ]


def _failed(future: Future[Any]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)


def _read_about(folder: Path) -> dict[str, Any]:
    """What config.json says. Raises InputError if it is none of a run."""
    try:
        about = json.loads((folder / "config.json").read_text("utf-8"))
        for name in ("d_in", "n_latents", "k"):
            if not isinstance(about[name], int):
                raise TypeError(f"{name} is no integer")
        if not isinstance(about["layers"], list):
            raise TypeError("layers is no list")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"config.json has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise InputError(
            f"RUN must be the folder of a finished training run, and {folder} cannot be read: "
            f"{what}; give the folder that mlsae.train left"
        ) from error
    return dict(about)
