"""A run that is stopped and resumed is the run that was never stopped."""

import json
import signal
import subprocess
import time

import pytest

from mlsae import MLSAE
from scripts import kill_and_resume


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    """One folder for all runs, as the text beside a run is among its settings."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def straight(tmp):
    kill_and_resume.finish(tmp / "straight")
    return tmp / "straight"


@pytest.fixture
def out(tmp, request):
    return tmp / request.node.name


def test_killed_runs_end_with_the_same_bits(straight, out):
    """In the write of a checkpoint, and elsewhere; with the newest checkpoint damaged after it."""
    assert kill_and_resume.kill_once(out, 0.1, while_writing=True).startswith("killed")
    assert kill_and_resume.kill_once(out, 0.05, while_writing=False).startswith("killed")
    path = out / "checkpoints" / kill_and_resume.newest(out).replace("sha256", "safetensors")
    content = bytearray(path.read_bytes())
    content[-10] ^= 4
    path.write_bytes(content)
    process = kill_and_resume.start(out)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"checkpoint {path} is damaged" in output
    assert kill_and_resume.differences(straight, out) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_where_and_leaves_a_model(straight, out, number, code):
    process = kill_and_resume.start(out)
    while not kill_and_resume.newest(out):
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert f"stopped by {number.name}" in output
    assert str(out / "checkpoints" / kill_and_resume.newest(out)[:15]) in output
    assert "--resume" in output
    MLSAE.from_pretrained(out)
    if number == signal.SIGINT:
        kill_and_resume.finish(out)
        assert kill_and_resume.differences(straight, out) == []


def test_resuming_a_finished_run_changes_nothing(straight):
    before = (straight / "model.safetensors").read_bytes()
    lines = kill_and_resume.metrics(straight)
    kill_and_resume.finish(straight)
    assert (straight / "model.safetensors").read_bytes() == before
    assert kill_and_resume.metrics(straight) == lines


def resume(out, *arguments):
    process = kill_and_resume.start(out)
    process.kill()
    process.communicate()
    return subprocess.run(
        [*process.args, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_other_settings_are_refused_by_name(straight):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    result = resume(straight, "--sae.k", "9")
    assert result.returncode == 2
    assert "--sae.k must be 8 to resume this run, as it began, got 9" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


def test_a_run_whose_checkpoints_are_lost_is_not_begun_anew(straight, out):
    out.mkdir()
    (out / "model.safetensors").write_bytes((straight / "model.safetensors").read_bytes())
    result = resume(out)
    assert result.returncode == 2
    assert "--resume needs an undamaged checkpoint" in result.stderr
    assert (out / "model.safetensors").exists()


def test_metrics_have_held_out_figures_as_asked(straight):
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    tokens = [line["tokens"] for line in lines if "heldout" in line]
    assert len(tokens) == 4  # after 3, 6 and 9 thousand tokens, and at the end
    assert tokens[-1] >= 10_000
