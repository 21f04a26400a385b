"""The training program in several processes, as `torchrun` starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

SETTINGS = {
    "tokens": 6000, "batch_tokens": 512, "micro_tokens": 256, "seq_len": 64, "eval_tokens": 512,
    "log_tokens": 1000, "checkpoint_tokens": 512, "max_grad_norm": 1.0,
}  # fmt: skip
SAE = {"expansion": 2, "k": 8, "dead_tokens": 500}


def torchrun(out, *arguments, processes=2):
    """Start the program with SETTINGS and SAE; `arguments` come last and override them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), "-m", "mlsae.train", "--out", str(out)]
    command += ["--model_dtype", "float32"]  # on every CPU
    for name, value in SETTINGS.items():
        command += [f"--{name}", str(value)]
    for name, value in SAE.items():
        command += [f"--sae.{name}", str(value)]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def process_of(launcher, rank):
    """The process id of a rank that the launcher has started. Linux only."""
    tasks = Path(f"/proc/{launcher.pid}/task").glob("*/children")
    for child in (child for task in tasks for child in task.read_text().split()):
        if f"\0RANK={rank}\0" in f"\0{Path(f'/proc/{child}/environ').read_text()}":
            return int(child)
    raise LookupError(f"the launcher has no process of rank {rank}")


def metrics(folder):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
