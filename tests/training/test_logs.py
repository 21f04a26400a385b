"""What a run says: metrics.jsonl, TensorBoard, Weights & Biases."""

import json
import sys
import types

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
