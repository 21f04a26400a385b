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
