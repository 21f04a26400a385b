"""What a training will take, told before it runs; and what one then took, by its files."""

import argparse
import io
import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import safetensors
import torch
from huggingface_hub import constants

from mlsae import memory, plan
from mlsae.config import TrainConfig
from mlsae.data import dtypes
from mlsae.data.transformer import load_transformer
from mlsae.errors import InputError
from mlsae.planning import cost_model, gpus, show
from mlsae.planning import plan as planning
from mlsae.planning import probe as probing
from mlsae.planning.suggestions import suggestions
from mlsae.planning.times import Span, StepTime, Times
from mlsae.planning.transformer import size_of
from mlsae.train import parse
from mlsae.training import needs
from mlsae.training.run import train
from sparse_topk import costs
from tests.helpers.models import CONFIGS, saved
from tests.helpers.programs import SMALL

CPU = torch.device("cpu")


def told(capsys, *arguments):
    """What the program prints as JSON."""
    plan.run([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def planned(*arguments, free=None, seconds=None):
    """The plan of a command line on the CPU, with the times `seconds` if given."""
    configs = parse([*map(str, arguments)])
    setting = planning.setting_of(configs, CPU, free)
    return planning.plan_of(setting, "cpu", CPU, 10**8, seconds)


@pytest.fixture(scope="module")
def little_text(tmp_path_factory):
    """The arguments of a short run on a text that takes no time to read."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(argparse.__file__).read_text())
    return ["builtin", str(path), "--heldout_share", "0.3", *SMALL, "--tokens", "2000"]


@pytest.fixture(scope="module", params=["normuon", "adam"])
def run(request, little_text, tmp_path_factory):
    """A run's folder, its arguments, and what it wrote to stderr; it keeps all checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    arguments = [*little_text, "--optimizer", request.param, "--out", str(folder)]
    arguments += ["--keep_checkpoints", "99", "--checkpoint_tokens", "1100"]
    with redirect_stderr(io.StringIO()) as printed, redirect_stdout(io.StringIO()):
        train(*parse(arguments))
    return folder, arguments, printed.getvalue()


def test_the_files_of_a_run_are_those_that_were_told(run):
    folder, arguments, _ = run
    told = planned(*arguments).setting.needs
    *lines, _ = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert told.steps == lines[-1]["steps"]
    assert told.checkpoints == "every 1,100 tokens and at the end"
    model = (folder / "model.safetensors").stat().st_size
    assert told.disk.models <= model <= told.disk.models + 1000  # the header
    files = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    others = sum(size for path, size in files.items() if path.suffix != ".safetensors")
    assert others + files[folder / "latents.safetensors"] < told.disk.rest


def test_a_checkpoint_has_the_size_that_was_told(run):
    """But for the rows that wait for their turn: as many as the text has, and 4,096 at most."""
    folder, arguments, _ = run
    path = max((folder / "checkpoints").glob("*.safetensors"))
    with safetensors.safe_open(path, "pt") as file:
        held = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    text = sum(n_bytes for name, n_bytes in held.items() if name.startswith("batches/"))
    most = 4 * (64 * needs._BUFFER_ROWS + 512 + needs._REST)
    told = planned(*arguments).setting.needs.disk.checkpoint
    assert text <= most
    # a few sums per layer are not told
    assert sum(held.values()) - text == pytest.approx(told - most - needs._HEADER, abs=200)
    assert path.stat().st_size - sum(held.values()) < 2 * needs._HEADER


def test_training_tells_memory_steps_and_files_in_two_lines(run):
    _, _, printed = run
    lines = printed.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("training on cpu"))
    assert lines[at + 1].startswith("memory beside the model's 14 MB: ")
    for part in ("weights and optimizer", "residuals", "activations", "validation", "are free"):
        assert part in lines[at + 1]
    assert lines[at + 2].startswith("4 steps of 512 tokens; a checkpoint of ")


def test_the_parts_add_up(capsys):
    told_ = told(capsys, "--gpu", "h100", *SMALL)
    assert sum(told_["memory"]["parts"].values()) == told_["memory"]["peak"]
    assert sum(told_["time"]["parts"].values()) == pytest.approx(told_["time"]["seconds"])
    disk = told_["disk"]
    kept = (disk["checkpoints_kept"] + 1) * disk["checkpoint"]
    assert disk["most"] == kept + disk["models"] + disk["rest"]
    assert told_["saes"][0]["parameters"] == 2 * 384 * 192 + 192
    assert told_["transformer"]["parameters"] == 3_456_000
    assert told_["transformer"]["dtype"] == "bfloat16"  # as saved, since it is a GPU


def test_blocks_above_the_last_layer_do_not_count():
    whole, two = planned(*SMALL), planned(*SMALL, "--layers", 0, 1)
    assert two.setting.transformer.blocks == 2
    dropped = whole.memory["transformer"] - two.memory["transformer"]
    assert dropped == 4 * 4 * whole.setting.transformer.in_blocks // 6


@pytest.mark.parametrize(("device", "units"), [("cuda", False), ("cpu", True), ("cpu", False)])
def test_a_plan_counts_the_dtype_that_training_computes_in(device, units, tmp_path, monkeypatch):
    """Of a checkpoint in float32: bfloat16 on a GPU and on matrix units."""
    monkeypatch.setattr(dtypes, "multiplies_bfloat16", lambda: units)
    _, data = saved(CONFIGS["gpt2"], tmp_path)
    counted = size_of(data, 0, device)
    assert counted.dtype == (torch.float32 if (device, units) == ("cpu", False) else torch.bfloat16)
    assert counted.bytes == counted.parameters * counted.dtype.itemsize
    if device == "cpu":
        model = load_transformer(data, CPU, 1)
        assert model.dtype == counted.dtype
        assert sum(p.nbytes for p in model.parameters()) == counted.bytes


def test_a_probe_tells_what_it_measured_and_writes_nothing(
    capsys, little_text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    told_ = told(capsys, *little_text, "--probe_seconds", 0.1)
    assert list(tmp_path.iterdir()) == []
    time = told_["time"]
    assert time["basis"] == "probe"
    assert any("the run's own text" in line for line in time["rests_on"])
    assert 10 < time["tokens_per_second"] < 10**6
    assert 0 < time["parts"]["SAE"] < time["seconds"] < 600
    plan.run([*little_text, "--probe_seconds", "0.1"])
    shown = capsys.readouterr().out
    assert "Time, measured here by a probe" in shown
    assert "tokens/s while it trains" in shown


@pytest.mark.parametrize(("waited", "guess"), [(1.0, True), (0.1, False)])
def test_a_busy_machine_makes_the_clock_a_guess(waited, guess, monkeypatch):
    """Two seconds of the processor, beside which threads waited in the queue."""
    readings = iter([(5.0, 3.0), (5.0 + waited, 5.0)])
    monkeypatch.setattr(probing._Queue, "_now", lambda self: next(readings))
    share = probing._Queue().share()
    assert share == pytest.approx(waited / (waited + 2))
    times = Times("probe", StepTime(*3 * [Span(1, 1)]), 1, 10, {}, [], share)
    said = "a guess, for this machine is busy: other processes had the processor for 33%"
    assert (said in show._spoken(times)) == guess


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_that_share_a_processor_wait_for_it():
    """Two that spin on one core: each has it half of the time."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # of this thread, and of what it starts
    try:
        loop = ["sh", "-c", "echo begun; while :; do :; done"]
        with subprocess.Popen(loop, stdout=subprocess.PIPE) as spinning:
            spinning.stdout.readline()
            queue, end = probing._Queue(), time.monotonic() + 0.5
            while time.monotonic() < end:
                pass
            share = queue.share()
            spinning.kill()
    finally:
        os.sched_setaffinity(0, cores)
    assert 0.2 < share < 1


def test_what_does_not_fit_is_not_probed_and_every_suggestion_saves_memory(capsys, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 5 * 10**7)
    arguments = ["--sae.expansion", 128, "--batch_tokens", 8192]
    told_ = told(capsys, *arguments)
    assert told_["time"] is None
    assert not told_["memory"]["fits"]
    saved = [each["saves_bytes"] for each in told_["suggestions"]]
    assert saved == sorted(saved, reverse=True)
    assert min(saved) > 0
    flags = {each["flag"].split()[0] for each in told_["suggestions"]}
    assert {"--micro_tokens", "--sae.expansion", "--layers"} <= flags


def test_each_suggestion_saves_what_it_says():
    """Planned again, with the flag on the command line."""
    arguments = ["--sae.expansion", "128", "--batch_tokens", "8192"]
    before = planned(*arguments)
    found = suggestions(before, CPU)
    assert len(found) >= 3
    for suggestion in found:
        flag = suggestion.flag.split(",")[0].split()
        after = planned(*arguments, *flag)
        assert before.peak - after.peak == suggestion.saves_bytes > 0


def test_a_suggestion_of_time_is_in_the_ratio_of_the_work():
    second = Span(1.0, 1.0)
    times = Times("probe", StepTime(second, second, second), 10, 8192, {"validation": second})
    before = planned("--batch_tokens", 8192, seconds=times)
    of = {each.flag: each.saves_seconds for each in suggestions(before, CPU)}
    half = of["--sae.expansion 8"]
    # Half of the encoder's product, and of the optimizer; not of the sparse products.
    assert 9 < half < 10.5
    assert of["--layers 1 3 5"] > half / 2


def test_the_model_gives_the_steps_that_were_timed():
    for shape, seconds in gpus.STEPS:
        of = gpus.roofline(costs.training_step(shape, 2), gpus.H100)
        assert of / gpus.efficiency(shape.d) == pytest.approx(seconds)
    assert gpus.efficiency(64) == gpus.efficiency(512) < gpus.efficiency(1024)
    assert gpus.efficiency(1024) < gpus.efficiency(2048) == gpus.efficiency(8192)


@pytest.mark.parametrize(
    ("tokens", "d_in", "n_latents", "k", "ms"),
    [
        (8192, 512, 32768, 32, 4.8),
        (8192, 2048, 131072, 32, 17.4),
        (8192, 1024, 131072, 32, 9.5),
        (8192, 1024, 65536, 256, 9.7),
        (65536, 512, 32768, 32, 10.6),
    ],
)
def test_the_model_is_as_far_off_as_it_says(tokens, d_in, n_latents, k, ms):
    """Steps of one SAE that were timed too (docs/speed.md), and that the model does not rest on."""
    shape = costs.TrainShape("", 1, tokens, d_in, n_latents, k)
    config = TrainConfig(optimizer="adam")
    part, update = cost_model._sae_seconds(config, shape, gpus.PEAKS["h100"])
    assert 0.795 < (part + update) / (ms / 1e3) < 1.485


def test_a_gpu_that_was_not_measured_is_said_to_be_extrapolated(capsys):
    h100, l4 = (told(capsys, "--gpu", name, *SMALL) for name in ("h100", "L4"))
    assert not any("extrapolated" in line for line in h100["time"]["rests_on"])
    assert any("extrapolated" in line for line in l4["time"]["rests_on"])
    assert h100["time"]["basis"] == l4["time"]["basis"] == "model"
    assert l4["time"]["parts"]["transformer"] > h100["time"]["parts"]["transformer"]
    assert l4["memory"]["free"] == 24 * 10**9


def test_an_unknown_gpu_is_refused_with_the_names():
    with pytest.raises(InputError, match=r"--gpu must be one of h100, .*rtx4090, got 'tpu'"):
        plan.run(["--gpu", "tpu"])


@pytest.mark.parametrize("gpu", [[], ["--gpu", "h100"]])
@pytest.mark.parametrize("names", [["nosuchmodel"], ["builtin", "nosuchdata"]])
def test_what_is_not_there_is_refused_as_in_training(names, gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as expected:
        train(*parse([*names, *SMALL, "--out", str(tmp_path / "run")]))
    with pytest.raises(InputError) as got:
        plan.run([*names, *SMALL, *gpu])
    assert str(got.value) == str(expected.value)
