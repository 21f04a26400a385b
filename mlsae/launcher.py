"""What a launcher such as `torchrun` told this process: which of several it is, so that one prints.

Nothing here needs torch: programs that only parse their arguments do not wait for it.
"""

from __future__ import annotations

import os
import sys


class LostContactError(RuntimeError):
    """Another process of the run has ended, or does not answer within the timeout."""


def launched() -> bool:
    """Whether a launcher started this process as one of several: `torchrun`, or Slurm with RANK
    and WORLD_SIZE set."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_rank() -> int | None:
    """The number of this process on its node; None if no launcher started it."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else None


def is_rank0() -> bool:
    """Whether this process is the one that writes files and prints."""
    return not launched() or os.environ["RANK"] == "0"


def log_rank0(message: str) -> None:
    """Print to stderr, which keeps stdout for results. Only rank 0 prints."""
    if is_rank0():
        print(message, file=sys.stderr, flush=True)
