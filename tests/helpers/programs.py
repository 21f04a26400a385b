"""Run the programs as a user does."""

import os
import subprocess
import sys

SMALL = (
    "--tokens 4000 --batch_tokens 512 --seq_len 64 --sae.expansion 2 --sae.k 8 "
    "--eval_tokens 512 --log_tokens 1000"
).split()


def program(*arguments, module="mlsae.train", **options):
    """Run `python -m module arguments` offline, and return the finished process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=240, check=False, **options,
    )  # fmt: skip
