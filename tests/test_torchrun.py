"""`torchrun … -m mlsae.train`, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch

from mlsae.config import SAEConfig, TrainConfig
from mlsae.train import train

SETTINGS = {
    "tokens": 6000, "batch_tokens": 512, "micro_tokens": 256, "seq_len": 64, "eval_tokens": 512,
    "log_tokens": 1000, "checkpoint_tokens": 512, "max_grad_norm": 1.0,
}  # fmt: skip
SAE = {"expansion": 2, "k": 8, "dead_tokens": 1500}


def torchrun(out, *arguments, processes=2):
    """The program on two processes, its settings as above; `arguments` come last."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), "-m", "mlsae.train", "--out", str(out)]
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
    """The process id of a rank that the launcher has started, on Linux."""
    tasks = Path(f"/proc/{launcher.pid}/task").glob("*/children")
    for child in (child for task in tasks for child in task.read_text().split()):
        if f"\0RANK={rank}\0" in f"\0{Path(f'/proc/{child}/environ').read_text()}":
            return int(child)
    raise LookupError(f"no process of rank {rank}")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_rank_is_killed_and_the_run_goes_on_as_one_process_would(tmp_path):
    """On two shards: all end with the cause, and resuming leads to the run of one process."""
    out = tmp_path / "two"
    killed = torchrun(out, "--shard_latents", 2)
    while not list(out.glob("checkpoints/*.sha256")):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.02)
    os.kill(process_of(killed, 1), signal.SIGKILL)
    output, _ = killed.communicate(timeout=30)
    assert killed.returncode != 0
    cause = output.split("Root Cause")[1]
    assert "rank      : 1" in cause
    assert "SIGKILL" in cause

    resumed = torchrun(out, "--shard_latents", 2, "--resume")
    output, _ = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, output
    assert output.count("going on from") == output.count("Held-out figures") == 1
    assert "2 processes: 1 × tokens, 2 × latents" in output

    one = tmp_path / "one"
    train(TrainConfig(sae=SAEConfig(**SAE), out=one, **SETTINGS))
    assert {path.name for path in one.iterdir()} == {path.name for path in out.iterdir()}
    for name in ("model.safetensors", "latents.safetensors"):
        tensors, others = (safetensors.torch.load_file(folder / name) for folder in (one, out))
        assert (one / name).stat().st_size == (out / name).stat().st_size
        assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in others.items()}
    # Figures only: in float32 Adam's first steps make much of rounding. See test_distributed.
    for line, other in zip(metrics(one), metrics(out), strict=True):
        assert line["tokens"] == other["tokens"]
        figures, expected = other.get("heldout", other), line.get("heldout", line)
        assert figures["fvu_layers"] == pytest.approx(expected["fvu_layers"], rel=1e-2)
    assert metrics(out)[-2]["dead"] > 0, "AuxK was not tried"


def test_bad_input_is_said_once(tmp_path):
    launcher = torchrun(tmp_path / "run", "--shard_latents", 3)
    output, _ = launcher.communicate(timeout=120)
    assert output.count("--shard_latents must divide the number of processes, 2, got 3") == 1
    assert "exitcode  : 2" in output
    assert not (tmp_path / "run").exists()
