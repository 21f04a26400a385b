"""What a run says: metrics.jsonl, TensorBoard, Weights & Biases, trackio."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from contextvars import ContextVar

import pytest

from mlsae.errors import InputError, check_installed
from mlsae.training.logs import MetricsLog

LINE = {"tokens": 100, "fvu": 0.5, "fvu_layers": [0.4, 0.6]}
HELDOUT = {"tokens": 200, "heldout": {"fvu": 0.3, "l0_layers": [8.0]}}


def test_a_resumed_log_cuts_off_what_came_after_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path, (), {}, "id")
    log.write(LINE)
    position = log.position()
    log.write(HELDOUT)
    log.write({**LINE, "tokens": 300})
    log.close()
    log = MetricsLog(tmp_path, (), {}, "id", position)
    log.write({**LINE, "tokens": 200})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [LINE, {**LINE, "tokens": 200}]


class FakeWandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options["id"], options["resume"], options["config"]))
        return self

    def log(self, scalars, step):
        self.calls.append(("log", scalars, step))

    def finish(self):
        self.calls.append(("finish",))


def test_wandb_gets_every_number_at_its_tokens(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = MetricsLog(tmp_path, ["wandb"], {"tokens": 1000}, "run-id")
    log.write(LINE)
    log.write(HELDOUT)
    log.close()
    assert wandb.calls == [
        ("init", "run-id", "allow", {"tokens": 1000}),
        ("log", {"fvu": 0.5, "fvu_layers/0": 0.4, "fvu_layers/1": 0.6}, 100),
        ("log", {"heldout/fvu": 0.3, "heldout/l0_layers/0": 8.0}, 200),
        ("finish",),
    ]


def test_a_logger_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as import sees a package that is not there
    with pytest.raises(InputError, match=r"--log wandb needs .* pip install wandb"):
        check_installed("wandb", "--log wandb")


def test_a_folder_with_the_name_of_a_logger_is_not_the_logger(monkeypatch, tmp_path):
    (tmp_path / "wandb_of_a_run").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"--log it needs .* pip install wandb_of_a_run"):
        check_installed("wandb_of_a_run", "--log it")


def test_a_logger_that_is_damaged_is_named(monkeypatch, tmp_path):
    (tmp_path / "wandb.py").write_text("raise AttributeError('numpy has no attribute float_')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match=r"cannot be imported: numpy has no attribute float_"):
        check_installed("wandb", "--log wandb")
    (tmp_path / "wandb.py").write_text("import a_package_that_is_missing")
    with pytest.raises(InputError, match=r"cannot be imported: No module named 'a_package"):
        check_installed("wandb", "--log wandb")


class FailingWandb(FakeWandb):
    def log(self, scalars, step):
        if self.calls[-1][0] == "log":
            raise ConnectionError("the network is gone")
        super().log(scalars, step)


def test_a_logger_that_fails_later_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    wandb = FailingWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = MetricsLog(tmp_path, ["wandb"], {}, "run-id")
    for tokens in (100, 200, 300):
        log.write({**LINE, "tokens": tokens})
    log.close()
    assert [call[0] for call in wandb.calls] == ["init", "log"]
    assert capsys.readouterr().err.count("--log wandb failed and is no longer used: the net") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_logger_that_does_not_start_leaves_the_file(tmp_path, monkeypatch):
    """What is after the checkpoint is cut off only once the run goes on."""

    def init(**_options):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    (tmp_path / "metrics.jsonl").write_text("1234567890")
    with pytest.raises(InputError, match="does not: no network"):
        MetricsLog(tmp_path, ["wandb"], {}, "run-id", position=5)
    assert (tmp_path / "metrics.jsonl").read_text() == "1234567890"


def test_a_log_that_is_missing_is_not_made(tmp_path):
    with pytest.raises(InputError, match=r"must have the 9 bytes .* and has 0; put it back"):
        MetricsLog(tmp_path, (), {}, "id", 9)
    assert not list(tmp_path.iterdir())


class FakeTrackio(types.ModuleType):
    """As trackio, it has one run at a time, which the next one ends; see `trackio.init`."""

    def __init__(self):
        super().__init__("trackio")
        self.current = ContextVar("current", default=None)
        self.runs = []

    def init(self, project, name, config, resume, embed):
        print("* Created new run")
        if self.current.get() is not None:
            self.current.get().finish()
        run = FakeRun(project, name, config, resume)
        self.current.set(run)
        self.runs.append(run)
        return run


class FakeRun:
    def __init__(self, *options):
        self.options, self.lines, self.finished = options, [], False

    def log(self, scalars, step):
        assert not self.finished
        self.lines.append((step, scalars))

    def finish(self):
        self.finished = True


def test_saes_that_train_together_have_a_run_of_trackio_each(tmp_path, monkeypatch, capsys):
    trackio = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    logs = []
    for name in ("x2-k4", "x4-k4"):
        (tmp_path / name).mkdir()
        logs.append(MetricsLog(tmp_path / name, ["trackio"], {"k": 4}, "0123456789"))
    for log in logs:
        log.write(LINE)
    assert [run.finished for run in trackio.runs] == [False, False]
    for log in logs:
        log.close()
    assert [run.options for run in trackio.runs] == [
        ("mlsae", "x2-k4-01234567", {"k": 4}, "allow"),
        ("mlsae", "x4-k4-01234567", {"k": 4}, "allow"),
    ]
    line = {"fvu": 0.5, "fvu_layers/0": 0.4, "fvu_layers/1": 0.6}
    assert all(run.finished and run.lines == [(100, line)] for run in trackio.runs)
    assert capsys.readouterr().out == ""  # which is for results


def test_several_loggers_get_every_line_once(tmp_path, monkeypatch):
    wandb, trackio = FakeWandb(), FakeTrackio()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    log = MetricsLog(tmp_path, ["wandb", "trackio", "wandb"], {}, "run-id")
    log.write(LINE)
    log.close()
    assert [call[0] for call in wandb.calls] == ["init", "log", "finish"]
    assert len(trackio.runs) == 1
    assert len(trackio.runs[0].lines) == 1


def test_the_real_loggers_work_without_a_network(tmp_path):
    """All three at once, and resumed, in a process whose home is empty."""
    for name in ("wandb", "trackio", "tensorboard"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mlsae.training.logs import MetricsLog\n"
        "names = ['tensorboard', 'wandb', 'trackio']\n"
        "position = 0\n"
        "for tokens in (100, 200):\n"
        "    log = MetricsLog(Path(sys.argv[1]), names, {'k': 4}, '0123456789', position, tokens)\n"
        "    log.write({'tokens': tokens, 'fvu': 1 / tokens, 'fvu_layers': [0.4, 0.6]})\n"
        "    position = log.position()\n"
        "    log.close()\n"
        "import trackio\n"
        "(run,) = trackio.Api().runs('mlsae')\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "lines = SQLiteStorage.get_logs('mlsae', run.name)\n"
        "print(run.name, [(line['step'], line['fvu']) for line in lines])\n"
    )
    environment = {
        **os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path), "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", code, str(run)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "no longer used" not in result.stderr
    assert result.stdout == "run-01234567 [(100, 0.01), (200, 0.005)]\n"
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert list(run.glob("tensorboard/events.*"))
