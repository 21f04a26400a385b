"""Serve the page: the socket, the address that is printed, and the end."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import socket
import webbrowser
from typing import TYPE_CHECKING, Any

import uvicorn

from ..errors import InputError, first_line
from .guard import LOOPBACK, Guard
from .pages import content_policy
from .routes import make_app
from .runs import Runs

if TYPE_CHECKING:
    from .__main__ import AppConfig

_CLOSING_SECONDS = 2


def serve(config: AppConfig) -> None:
    """Serve the page of `config` until Ctrl-C.

    Raises InputError if a run cannot be served, or the address is not there or not free.
    """
    runs = Runs(config)
    is_local = config.host in LOOPBACK
    token = config.token or (None if is_local else secrets.token_urlsafe(24))
    if config.token is not None and not (config.token.isascii() and config.token.isalnum()):
        raise InputError("--token must be ASCII letters and digits, got others; choose another")
    listener = _listen(config.host, config.port)
    port = listener.getsockname()[1]
    guarded = Guard(make_app(runs), LOOPBACK if is_local else None, token, content_policy())
    server = _Server(guarded, runs)
    # An address of all of a machine's is none that a browser can open.
    name = socket.gethostname() if config.host in ("0.0.0.0", "::", "") else config.host
    address = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
    address += f"?token={token}" if token else ""
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    if config.open:
        webbrowser.open(address)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises it again once all is closed
        pass
    finally:
        listener.close()


class _Server(uvicorn.Server):
    def __init__(self, app: Any, runs: Runs) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=_CLOSING_SECONDS,
            )
        )
        self._runs = runs

    def handle_exit(self, sig: int, frame: Any) -> None:
        """On a signal, end what runs, so that the server can close. On SIGTERM, too."""
        self._runs.closing.set()
        super().handle_exit(signal.SIGINT, frame)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address. Raises InputError if it is not there, or not free."""
    if not 0 <= port < 65_536:
        raise InputError(f"--port must be in [0, 65535], got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--host must be an address of this machine, got {host!r}: {first_line(error)}"
        ) from error
    try:
        if os.name == "posix":  # elsewhere it lets two programs listen at one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            rule = f"--port must be free, and {port} is in use; give another, or 0 to take any"
        elif error.errno == errno.EACCES:
            rule = f"--port must be one that you may use, and {port} is not; give one above 1023"
        else:
            rule = f"--host must be an address of this machine, got {host!r}: {first_line(error)}"
        raise InputError(rule) from error
    return listener
