"""Checkpoints: what is read is what was written, or it is refused."""

import subprocess
import threading

import pytest
import torch

from mlsae.config import SAEConfig, TrainConfig, heldout_tokens
from mlsae.data.config import DataConfig
from mlsae.training import checkpoint
from mlsae.training.run import train

STATE = {
    "tokens": 12,
    "text": "ℓ",
    "none": None,
    "inner": {"weights": torch.arange(6.0).view(2, 3), "deeper": {"count": torch.tensor(7)}},
    "empty": {},
    "half": torch.ones(3, dtype=torch.bfloat16),
}


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def test_a_state_comes_back_as_it_was(tmp_path):
    path = checkpoint.save(tmp_path, 12, STATE, keep=2)
    found_path = checkpoint.newest(tmp_path, pytest.fail)
    found = checkpoint.load(found_path)
    assert found_path == path
    assert equal(found, STATE)
    checked = subprocess.run(
        ["sha256sum", "--check", path.with_suffix(".sha256").name], cwd=path.parent, check=False
    )
    assert checked.returncode == 0


def test_the_last_ones_are_kept(tmp_path):
    for tokens in (5, 100, 20_000, 1_000_000):
        checkpoint.save(tmp_path, tokens, {**STATE, "tokens": tokens}, keep=2)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {
        f"{tokens:015}{ending}"
        for tokens in (20_000, 1_000_000)
        for ending in (".safetensors", ".sha256")
    }
    assert checkpoint.load(checkpoint.newest(tmp_path, pytest.fail))["tokens"] == 1_000_000


@pytest.mark.parametrize("damage", ["one bit", "cut short", "no checksum", "empty checksum"])
def test_a_damaged_one_is_reported_and_the_one_before_it_used(tmp_path, damage):
    checkpoint.save(tmp_path, 10, {**STATE, "tokens": 10}, keep=2)
    path = checkpoint.save(tmp_path, 20, {**STATE, "tokens": 20}, keep=2)
    content = path.read_bytes()
    if damage == "one bit":
        middle = len(content) - 3
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "cut short":
        path.write_bytes(content[:-5])
    elif damage == "no checksum":
        path.with_suffix(".sha256").unlink()
    else:
        path.with_suffix(".sha256").write_text("")
    said = []
    found = checkpoint.load(checkpoint.newest(tmp_path, said.append))
    assert found["tokens"] == 10
    (line,) = said
    assert str(path) in line


def test_there_may_be_none(tmp_path):
    assert checkpoint.newest(tmp_path, pytest.fail) is None


def test_a_failed_write_leaves_the_older_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 10, STATE, keep=1)

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 20, STATE, keep=1)
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        f"{10:015}.safetensors",
        f"{10:015}.sha256",
    }


def test_training_goes_on_while_one_is_written(tmp_path, monkeypatch):
    """What is written is the state as it was, whatever happens to it meanwhile."""
    save, may_go_on, events = checkpoint.save, threading.Event(), []

    def slow(*arguments):
        assert may_go_on.wait(10)
        events.append("written")
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow)
    weight, nested = torch.ones(3, 2), {"list": [1]}
    writer = checkpoint.CheckpointWriter(tmp_path, keep=2, then=lambda: events.append("then"))
    writer.save(10, {"weight": weight.T, "nested": nested})
    weight.zero_()
    nested["list"].append(2)
    assert writer.saved is None
    writer.check()
    assert events == []
    may_go_on.set()
    writer.wait()
    assert events == ["written", "then"]
    assert writer.saved == checkpoint.newest(tmp_path, pytest.fail)
    found = checkpoint.load(writer.saved)
    assert equal(found, {"weight": torch.ones(2, 3), "nested": {"list": [1]}})
    writer.close()


@pytest.mark.parametrize("call", ["save", "check", "wait"])
def test_a_write_that_failed_is_told_by_the_next_call(tmp_path, monkeypatch, call):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    writer = checkpoint.CheckpointWriter(tmp_path, keep=2)
    monkeypatch.setattr(checkpoint.os, "fsync", full)
    writer.save(10, STATE)
    writer.close()
    with pytest.raises(OSError, match="No space"):
        getattr(writer, call)(*((20, STATE) if call == "save" else ()))
    assert writer.saved is None
    assert checkpoint.newest(tmp_path, pytest.fail) is None


@pytest.mark.parametrize(
    ("options", "written"),
    [({"checkpoint_minutes": 1e-9}, 5), ({}, 1), ({"checkpoint_tokens": 256}, 3)],
)
def test_checkpoints_are_written_by_the_clock_unless_by_tokens(tmp_path, options, written):
    """In a run of five steps of 128 tokens and a few seconds; one at the end in any case."""
    config = TrainConfig(
        DataConfig(layers=(0,), seq_len=64), sae=SAEConfig(expansion=1, k=4), tokens=600,
        batch_tokens=128, eval_tokens=64, keep_checkpoints=9, out=tmp_path / "run", **options,
    )  # fmt: skip
    train(config)
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.safetensors"))) == written


@pytest.mark.parametrize(
    ("tokens", "given", "expected"),
    [(30_000, None, 4096), (800_000, None, 16_000), (10**9, None, 65_536), (30_000, 512, 512)],
)
def test_a_short_run_validates_on_few_tokens(tokens, given, expected):
    assert heldout_tokens(TrainConfig(tokens=tokens, eval_tokens=given)) == expected
