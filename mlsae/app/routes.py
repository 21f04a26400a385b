"""What is served, and how requests wait for the one thread that works.

/                                   leads to the page of the first run
/runs/N/                            the page of the N-th run
/runs/N/data/{latents,plots,examples-I}
/runs/N/status                      answers once the models are loaded
/runs/N/{prompt,next,trace}         POST, see `requests`
/runs/N/generate                    the same, answered with a line of JSON for each event, as they
                                    come
/runs/N/labels, labels.json, labels.csv, PUT labels/LATENT
/plotly.js
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from ..errors import InputError, first_line
from ..report.labels import labels_csv, read_labels, shown_labels, write_label
from ..report.pack import json_text, plotly_js
from . import requests
from .pages import page
from .runs import Run, Runs

_LOOK_SECONDS = 0.1  # how often a request that waits looks whether anybody still waits for it


def make_app(runs: Runs) -> Starlette:
    """The application that serves `runs`."""
    served = _Served(runs)
    return Starlette(
        routes=[
            Route("/", served.first),
            Route("/plotly.js", served.plotly),
            Route("/runs/{run:int}/", served.page),
            Route("/runs/{run:int}/data/{name}", served.data),
            Route("/runs/{run:int}/status", served.status),
            Route("/runs/{run:int}/prompt", served.prompt, methods=["POST"]),
            Route("/runs/{run:int}/next", served.next_tokens, methods=["POST"]),
            Route("/runs/{run:int}/trace", served.trace, methods=["POST"]),
            Route("/runs/{run:int}/generate", served.generate, methods=["POST"]),
            Route("/runs/{run:int}/labels", served.labels),
            Route("/runs/{run:int}/labels.{form}", served.exported_labels),
            Route("/runs/{run:int}/labels/{latent:int}", served.label, methods=["PUT"]),
        ],
        exception_handlers={
            InputError: _tell(400), HTTPException: _tell_http, Exception: _tell(500),
        },
    )  # fmt: skip


class _Served:
    """The answers to requests."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs

    async def first(self, _request: Request) -> Response:
        return RedirectResponse("/runs/0/")

    async def plotly(self, _request: Request) -> Response:
        code = await run_in_threadpool(plotly_js)
        keep = {"Cache-Control": "private, max-age=86400"}  # 4.8 MB, always the same
        return Response(code, media_type="text/javascript", headers=keep)

    async def page(self, request: Request) -> Response:
        run = self._run(request)
        run.files()  # begin to open it
        run.session()
        return Response(page(self.runs, self.runs.all.index(run)), media_type="text/html")

    async def data(self, request: Request) -> Response:
        """A part of the run's files, as JSON."""
        files = await self._wait(request, self._run(request).files())
        name = request.path_params["name"]
        chunk = name.removeprefix("examples-")
        if name in ("latents", "plots"):
            text = await run_in_threadpool(lambda: getattr(files, name))
        elif name != chunk and chunk.isascii() and chunk.isdigit() and len(chunk) < 9:
            text = await run_in_threadpool(files.examples, int(chunk))
        else:
            text = None
        if text is None:
            raise HTTPException(404, "the run has no such data")
        return Response(text, media_type="application/json")

    async def status(self, request: Request) -> Response:
        session = await self._wait(request, self._run(request).session())
        return JSONResponse({"layers": session.layers})

    async def prompt(self, request: Request) -> Response:
        body = await requests.read_body(request)
        text, run = requests.get(body, "text", str), self._run(request)
        session = await self._wait(request, run.session())
        reading = await self._work(request, lambda _: session.read(text))
        return Response(json_text(reading), media_type="application/json")

    async def next_tokens(self, request: Request) -> Response:
        body = await requests.read_body(request)
        text, at = requests.get(body, "text", str), requests.get(body, "position", int)
        edits = await run_in_threadpool(requests.read_edits, body)
        session = await self._wait(request, self._run(request).session())
        found = await self._work(
            request, lambda stopped: session.next_tokens(text, at, edits, stopped)
        )
        return Response(json_text(found), media_type="application/json")

    async def trace(self, request: Request) -> Response:
        body = await requests.read_body(request)
        text, target = requests.get(body, "text", str), requests.read_target(body)
        session = await self._wait(request, self._run(request).session())
        found = await self._work(request, lambda _: session.trace(text, target))
        return Response(json_text(found), media_type="application/json")

    async def generate(self, request: Request) -> Response:
        """The text that follows, with and without changes: {"waiting": jobs before this one};
        {"side", "text": so far, "tokens"}, as they come; {"side", "text", "done": true}."""
        body = await requests.read_body(request)
        text = requests.get(body, "text", str)
        sides, sampling = requests.read_sides(body), requests.read_sampling(body)
        edits = await run_in_threadpool(requests.read_edits, body)
        session = await self._wait(request, self._run(request).session())
        new = sampling["max_new_tokens"]
        check = lambda _: session.check(text, edits, new)  # noqa: E731
        # If it has to wait, the page is told, and what is wrong comes as an event.
        ahead = self.runs.worker.unfinished
        checked = None if ahead else await self._work(request, check)

        def job(side: str, emit: Callable[[Any], None], stopped: Callable[[], bool]) -> None:
            show = lambda so_far, n: emit({"side": side, "text": so_far, "tokens": n})  # noqa: E731
            changes = edits if side == "steered" else []
            whole = session.generate(checked, changes, sampling, show, stopped)
            emit({"side": side, "text": whole, "done": True})

        async def lines() -> AsyncIterator[str]:
            nonlocal checked
            try:
                if ahead:
                    yield json_text({"waiting": ahead}) + "\n"
                    checked = await self._work(request, check)
                for side in sides:
                    async for event in self._events(job, side):
                        yield json_text(event) + "\n"
            except Exception as error:  # the status is sent already
                if not isinstance(error, InputError):
                    traceback.print_exception(error, file=sys.stderr)
                yield json_text({"error": _sentence(error)}) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def labels(self, request: Request) -> Response:
        labels = await run_in_threadpool(read_labels, self._run(request).folder)
        return JSONResponse(shown_labels(labels))

    async def exported_labels(self, request: Request) -> Response:
        run, form = self._run(request), request.path_params["form"]
        if form not in ("json", "csv"):
            raise HTTPException(404, "labels are there as labels.json and labels.csv")
        labels = await run_in_threadpool(read_labels, run.folder)
        if form == "csv":
            answer: Response = PlainTextResponse(labels_csv(labels), media_type="text/csv")
        else:
            answer = JSONResponse({str(latent): entry for latent, entry in labels.items()})
        name = self.runs.names[self.runs.all.index(run)]
        safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in name)
        answer.headers["Content-Disposition"] = f'attachment; filename="labels-{safe}.{form}"'
        return answer

    async def label(self, request: Request) -> Response:
        run, latent = self._run(request), request.path_params["latent"]
        body = await requests.read_body(request)
        label, notes = (requests.get(body, name, str, "").strip() for name in ("label", "notes"))
        if latent >= run.about["n_latents"]:
            raise InputError(f"latent must be in [0, {run.about['n_latents'] - 1}], got {latent}")
        labels = await run_in_threadpool(write_label, run.folder, latent, label, notes)
        return JSONResponse(shown_labels(labels))

    def _run(self, request: Request) -> Run:
        number = request.path_params["run"]
        if number >= len(self.runs.all):
            raise HTTPException(404, f"there are {len(self.runs.all)} runs, counted from 0")
        return self.runs.all[number]

    async def _work(self, request: Request, job: Callable[[Callable[[], bool]], Any]) -> Any:
        """The result of a job in the one thread, which is told when nobody waits for it."""
        gone = False
        future = self.runs.worker.submit(lambda: job(lambda: gone or self.runs.closing.is_set()))
        try:
            return await self._wait(request, future, cancel=True)
        finally:
            gone = True

    async def _wait(self, request: Request, future: Future[Any], cancel: bool = False) -> Any:
        """The result of a future, for as long as the browser waits for it and the program runs."""
        result = asyncio.ensure_future(asyncio.wrap_future(future))
        while not result.done():
            await asyncio.wait({result}, timeout=_LOOK_SECONDS)
            if self.runs.closing.is_set() or await request.is_disconnected():
                break
        if result.done():
            return result.result()
        result.add_done_callback(lambda each: each.cancelled() or each.exception())  # nobody's now
        if cancel:
            future.cancel()
        raise HTTPException(503, "the program ends, or nobody waits for the answer")

    async def _events(self, job: Callable[..., None], side: str) -> AsyncIterator[dict[str, Any]]:
        """The events of a job in the one thread, as it emits them. It is stopped when they are not
        read any more."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()
        gone = False
        emit = lambda event: loop.call_soon_threadsafe(events.put_nowait, event)  # noqa: E731

        def whole() -> None:
            try:
                job(side, emit, lambda: gone or self.runs.closing.is_set())
            finally:
                emit(None)

        ahead = self.runs.worker.unfinished
        future = self.runs.worker.submit(whole)
        try:
            if ahead:
                yield {"waiting": ahead}
            while (event := await events.get()) is not None:
                yield event
            await asyncio.wrap_future(future)  # raises what the job has raised
        finally:
            gone = True
            future.cancel()


def _sentence(error: BaseException) -> str:
    """What the page says of an error."""
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    return f"mlsae.app has failed: {type(error).__name__}: {first_line(error)}"


def _tell(status: int) -> Any:
    async def tell(_request: Request, error: Exception) -> Response:
        return JSONResponse({"error": _sentence(error)}, status)

    return tell


async def _tell_http(_request: Request, error: Any) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code)
