"""A run in --out is lost to nothing: neither to a second process nor to a new run that fails."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import types

import pytest

from mlsae import files
from mlsae.compare import compare
from mlsae.config import SAESweep, TrainArguments
from mlsae.data.config import DataConfig
from mlsae.data.stream import DataStream
from mlsae.errors import InputError, NonFiniteError
from mlsae.files import locked
from mlsae.training import checkpoint, previous, run
from mlsae.training.run import train

SETTINGS = {
    "tokens": 600, "batch_tokens": 128, "eval_tokens": 64, "log_tokens": 128,
    "checkpoint_tokens": 256,
}  # fmt: skip


def settings(out, k=(4,), **options):
    data = DataConfig(seq_len=64, layers=(0,))
    chosen = SETTINGS | options
    return TrainArguments(data, sae=SAESweep(expansion=(1,), k=k), out=out, **chosen).configs()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    train(*settings(out))
    return out


@pytest.fixture
def old(finished, tmp_path):
    """A copy of the finished run, which a test may replace."""
    out = tmp_path / "run"
    for path, content in contents(finished).items():
        target = out / path.relative_to(finished)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return out


@pytest.fixture
def no_wandb(monkeypatch):
    """A Weights & Biases without a key."""

    def init(**_options):
        raise RuntimeError("No API key configured")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))


# Two processes with the same --out.


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_that_another_process_trains_in_is_refused(old, options):
    before = contents(old)
    with locked(old):
        with pytest.raises(InputError, match=r"another process is writing to .*/run; wait"):
            train(*settings(old, **options))
        assert contents(old) | {} == {**before, old / files.LOCK: b""}
    assert contents(old) == before


def test_of_two_that_start_together_one_trains(tmp_path):
    command = [sys.executable, "-m", "mlsae.train", "--out", str(tmp_path / "run"), "--seq_len"]
    command += "64 --layers 0 --sae.expansion 1 --sae.k 4 --eval_tokens 64".split()
    command += [text for name, value in SETTINGS.items() for text in (f"--{name}", str(value))]
    options = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    both = [subprocess.Popen(command, env=environment, **options) for _ in range(2)]
    said = [process.communicate(timeout=240)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], said
    assert "--out must be a" in said[codes.index(2)].splitlines()[-1]
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / files.LOCK).exists()


def test_a_killed_process_holds_nothing(tmp_path):
    code = (
        "import sys, time, pathlib; from mlsae.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="another process is writing"), locked(tmp_path / "run"):
        pytest.fail("two processes hold the folder")
    holder.kill()
    holder.communicate()
    assert (tmp_path / "run" / files.LOCK).exists(), "it was not killed while it held the folder"
    with locked(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_sweep_and_a_run_in_it_exclude_each_other(tmp_path):
    sweep, one = settings(tmp_path / "grid", k=(4, 8)), settings(tmp_path / "grid" / "x1-k4")
    with locked(tmp_path / "grid" / "x1-k4"), pytest.raises(InputError, match="another process"):
        train(*sweep)
    with locked(tmp_path / "grid"), pytest.raises(InputError, match="another process"):
        train(*one)
    (config,) = settings(tmp_path / "compare")
    with locked(tmp_path / "compare"), pytest.raises(InputError, match="another process"):
        compare(config)


def test_bad_input_leaves_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out, options, message in (
        (tmp_path / "a" / "b", {"tokens": 0}, "--tokens must be at least 1"),
        (tmp_path / "file", {}, r"--out must be a folder to write to, got .*file is no folder"),
        (
            tmp_path / "file" / "run",
            {},
            r"--out must be a folder to write to, got .*run, and .*file is no folder",
        ),
    ):
        with pytest.raises(InputError, match=message):
            train(*settings(out, **options))
    assert contents(tmp_path) == {tmp_path / "file": b"mine"}
    assert not (tmp_path / "a").exists()


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    class NoLock(files.FileLock):
        def acquire(self, *_args, **_options):
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "FileLock", NoLock)
    with locked(tmp_path / "run"):
        assert "has no locks (No locks available)" in capsys.readouterr().err


def test_what_appears_while_all_is_loaded_is_not_lost(old, monkeypatch):
    batches = DataStream.batches

    def noted(*arguments):
        (old / "note.txt").write_text("mine")
        return batches(*arguments)

    monkeypatch.setattr(DataStream, "batches", noted)
    before = contents(old)
    with pytest.raises(InputError, match=r"has note\.txt in it"):
        train(*settings(old, overwrite=True))
    assert contents(old) == {**before, old / "note.txt": b"mine"}


# A new run that fails before it has a checkpoint.


@pytest.mark.parametrize("k", [(4,), (4, 8)])
def test_a_logger_that_does_not_start_costs_nothing(old, no_wandb, k):
    before = contents(old)
    with pytest.raises(InputError, match=r"--log wandb .* No API key configured; run"):
        train(*settings(old, k, overwrite=True, log=("wandb",)))
    assert contents(old) == before
    with pytest.raises(InputError, match="--log wandb"):
        train(*settings(old, resume=True, log=("wandb",)))
    assert contents(old) == before


def test_a_logger_that_does_not_start_leaves_no_folder(tmp_path, no_wandb):
    with pytest.raises(InputError, match="--log wandb"):
        train(*settings(tmp_path / "run", log=("wandb",)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("failure", [NonFiniteError, KeyboardInterrupt, OSError])
def test_the_run_before_is_back_if_the_new_one_has_no_checkpoint(old, monkeypatch, capsys, failure):
    before = contents(old)

    def fails(*_args):
        assert not (old / "model.safetensors").exists()
        assert (old / previous.PREVIOUS / "model.safetensors").exists()
        raise failure("as asked")

    monkeypatch.setattr("mlsae.training.loop.train_step", fails)
    with pytest.raises(failure):
        train(*settings(old, overwrite=True))
    assert contents(old) == before
    assert "the one before is back" in capsys.readouterr().err


def test_the_run_before_is_gone_once_the_new_one_has_a_checkpoint(old, monkeypatch):
    save, seen = checkpoint.save, []

    def saved(*arguments):
        seen.append((old / previous.PREVIOUS / "model.safetensors").exists())
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", saved)
    before = contents(old)
    train(*settings(old, overwrite=True, seed=1))
    assert seen[0]
    assert not any(seen[1:])
    assert contents(old).keys() == before.keys()
    assert json.loads((old / "config.json").read_text())["training"]["seed"] == 1


class KilledError(BaseException):
    """What stands for SIGKILL: nothing after it runs, not even what should on an error."""


@pytest.mark.parametrize("number", range(12))
def test_a_kill_at_any_rename_loses_nothing(old, monkeypatch, number):
    """On the way aside and back: what is then in the folder, the next command puts back."""
    before = contents(old)
    rename, left = type(old).rename, [number]

    def killed(path, target):
        if left[0] == 0:
            raise KilledError
        left[0] -= 1
        return rename(path, target)

    monkeypatch.setattr(type(old), "rename", killed)
    try:
        previous.set_aside(old)
        (old / "metrics.jsonl").write_text("of the new run")
        previous.restore(old)
    except KilledError:
        pass
    monkeypatch.undo()
    previous.recover(old)
    if (old / previous.PREVIOUS).exists():
        previous.restore(old)
    assert contents(old) == before


def test_a_new_run_that_was_killed_begins_again_and_the_old_one_waits(old, monkeypatch):
    """With --resume, as a scheduler gives it: it is not the old run that is resumed."""
    before = contents(old)
    previous.set_aside(old)
    (old / "metrics.jsonl").write_text("of the new run")
    step = run.TrainLoop.run

    def seen(loop, batches):
        kept = old / previous.PREVIOUS
        assert {
            old / path.relative_to(kept): text for path, text in contents(kept).items()
        } == before
        step(loop, batches)

    monkeypatch.setattr(run.TrainLoop, "run", seen)
    train(*settings(old, resume=True, seed=1))
    assert contents(old).keys() == before.keys()
    assert json.loads((old / "config.json").read_text())["training"]["seed"] == 1


def test_a_sweep_in_place_of_a_run_and_back(old, monkeypatch):
    train(*settings(old, (4, 8), overwrite=True))
    assert {path.name for path in old.iterdir()} == {"x1-k4", "x1-k8", "checkpoints", "runs.csv"}
    before = contents(old)
    with monkeypatch.context() as patch:
        patch.setattr("mlsae.training.loop.train_step", lambda *_args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(*settings(old, overwrite=True))
    assert contents(old) == before
    (config,) = settings(old, overwrite=True)
    train(dataclasses.replace(config, keep_checkpoints=1))
    assert (old / "model.safetensors").exists()
    assert not (old / "x1-k4").exists()
