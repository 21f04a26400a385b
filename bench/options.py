"""The command line of `bench.step` and `bench.tune`. It is apart from them because it must not
import Triton: whether kernels are interpreted depends on the device asked for."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .results import FOLDER


def options(name: str, doc: str | None, seconds: float) -> argparse.ArgumentParser:
    """The parser of the options that `bench.step` and `bench.tune` share."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=doc)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=seconds, help="time to take at most")
    return parser


def chosen_device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device asked for. Ends the program if there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu runs the program on tiny sizes")
    return torch.device(name)
