"""Run the programs as a user does, but for the imports: those are of one process, and each program
is a fork of it."""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch.multiprocessing

from mlsae.data import dtypes

SMALL = (
    "--tokens 4000 --batch_tokens 512 --seq_len 64 --sae.expansion 2 --sae.k 8 "
    "--eval_tokens 512 --log_tokens 1000"
).split()
SECONDS = 240  # that a program may take

# What all programs import takes most of a small one's time.
PRELOADED = [
    "mlsae.cli", "mlsae.training.run", "mlsae.evaluation.run", "mlsae.analysis.run",
    "mlsae.report.page", "torch._dynamo",
]  # fmt: skip


def program(*arguments, module="mlsae.train", before=None):
    """Run `python -m module arguments` offline, after `before()` if given, and return the finished
    process."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        given = command, {**os.environ, "COLUMNS": "200"}, os.getcwd(), files, before
        process = fork_context().Process(target=_run, args=given)
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, SECONDS)
        printed = [file.read_text() if file.exists() else "" for file in files]
    return subprocess.CompletedProcess(command, process.exitcode, *printed)


def fork_context():
    """The context whose processes are forks of one that has imported PRELOADED: there is one such
    process for all tests of a process."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _run(command, environment, cwd, files, before):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    dtypes.multiplies_bfloat16 = lambda: False  # as in the tests' own process, by conftest
    if before is not None:
        before()
    _, _, module, *arguments = command
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
