"""Explore trained MLSAEs in a browser: a page that this program serves on your own machine.

    python -m mlsae.app runs/demo                     # then open the address that it prints
    python -m mlsae.app runs/x16 runs/x64 --open      # several runs, and a browser with them
    python -m mlsae.app runs/demo --host 0.0.0.0      # for other machines: its address has a token

On the page: type a prompt, and see at which layers latents are active at each token, and what the
model says next, also with reconstructions in the residual's place. Change latents, and see the text
that follows, with and without. Browse the latents, and write labels and notes, which are kept in
labels.json in the run's folder. It needs `pip install 'mlsae[app]'` and no network. Ctrl-C ends it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..cli import parse, run_program
from ..errors import InputError, check_installed


@dataclass(frozen=True)
class AppConfig:
    """Which runs to explore, and where to serve the page."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN …]")]
    """The folder of a run. Of several, the page lets you choose."""
    port: int = 8765
    """Port to listen at; 0: any that is free."""
    host: str = "127.0.0.1"
    """Address to listen at. One that other machines reach needs a token, and nothing is encrypted.
    A tunnel is better: ssh -L 8765:127.0.0.1:8765 HOST."""
    token: str | None = None
    """What a browser must show to be served. None: none on this machine, a random one elsewhere."""
    open: tyro.conf.FlagCreatePairsOff[bool] = False
    """Open the page in a browser."""
    model: str | None = None
    """The transformer. None: the one that each run was trained on."""
    lens: Path | None = None
    """The lens of released checkpoints whose files do not hold it, as for mlsae.evaluate. None:
    each run's own, if it has one."""
    revision: str | None = None
    """The model's branch, tag or commit on the hub. None: as in the run, or the newest with
    --model."""
    trust_remote_code: bool = False
    """Whether to run Python code from the model's repository. It can do anything that you can, so
    read it before."""
    device: str = "auto"
    """auto: CUDA if available, else the CPU."""


def run_app(config: AppConfig) -> None:
    """Serve the page until Ctrl-C.

    Raises InputError for bad input, before anything is served.
    """
    if not config.runs:
        raise InputError("RUN must be given at least once, got none; name the folder of a run")
    for package in ("starlette", "uvicorn"):
        check_installed(package, "mlsae.app")
    from .serve import serve  # needs both

    serve(config)


def main() -> None:
    """Run the program."""
    config = parse(AppConfig, __doc__, sys.argv[1:], "python -m mlsae.app")
    run_program(lambda: run_app(config))


if __name__ == "__main__":
    main()
