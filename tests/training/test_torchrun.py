"""`torchrun … -m mlsae.train`, as a user runs it."""

import os
import signal
import sys
import time

import pytest
import safetensors.torch

from mlsae.config import SAEConfig, TrainConfig
from mlsae.data.config import DataConfig
from mlsae.training.run import train
from tests.helpers.torchrun import SAE, SETTINGS, metrics, process_of, torchrun


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
    assert output.count("resuming from") == output.count("Validation: ") == 1
    assert "2 processes: 1 × tokens, 2 × latents" in output

    one = tmp_path / "one"
    settings = dict(SETTINGS)
    data = DataConfig(seq_len=settings.pop("seq_len"), model_dtype="float32")
    train(TrainConfig(data, sae=SAEConfig(**SAE), out=one, **settings))
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
