"""What the programs do with damaged files, and with places that they cannot write to."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from mlsae.analysis.run import AnalyzeConfig, analyze, show_prompt
from mlsae.analyze import analyze_and_print
from mlsae.config import SAEConfig, TrainConfig
from mlsae.convert import ConvertConfig, convert
from mlsae.data.config import DataConfig
from mlsae.errors import InputError
from mlsae.evaluate import evaluate_and_print
from mlsae.evaluation.run import EvaluateConfig, evaluate
from mlsae.report.__main__ import ReportConfig, draw
from mlsae.training.run import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a small text, analyzed: its settings."""
    base = tmp_path_factory.mktemp("damaged")
    text = " ".join(f"the cat sat on mat {i} and saw the house" for i in range(20_000))
    (base / "text.txt").write_text(text)
    data = DataConfig(dataset=str(base / "text.txt"), layers=(0, 1), seq_len=16)
    config = TrainConfig(
        data, tokens=128, batch_tokens=64, eval_tokens=32, out=base / "run",
        sae=SAEConfig(expansion=1, k=4),
    )  # fmt: skip
    train(config)
    analyze(AnalyzeConfig(config.out, tokens=64, resamples=5))
    return config


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, to damage."""
    return shutil.copytree(trained.out, tmp_path / "run")


def set_in_config(run, **changes):
    config = json.loads((run / "config.json").read_text())
    for name, value in changes.items():
        *at, last = name.split("__")
        place = config
        for key in at:
            place = place[key]
        place[last] = value
    (run / "config.json").write_text(json.dumps(config))


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"k": "4"}, "k must be in"),
        ({"k": True}, "k must be in"),
        ({"k": 10**30}, "k must be in"),
        ({"layers": "01"}, "layers in .*config.json must be a list of integers"),
        ({"layers": [0, None]}, "layers must be integers, 0 or more"),
        ({"layers": [-1]}, "layers must be integers, 0 or more"),
        ({"layers": [0, 99]}, "--layers must be in"),
        ({"model": [[]]}, "model must be a name"),
        ({"model": None}, "model must be a name"),
        ({"standardize": "no"}, "standardize must be true or false"),
        ({"training": []}, "training in .*config.json must be an object"),
        ({"training__seq_len": "16"}, "training.seq_len in .*config.json must be of type int"),
        ({"training__dataset": 3}, "training.dataset in .*config.json must be of type str"),
        ({"training__seed": 10**30}, "--seed must be in"),
        ({"training__model_dtype": "float8"}, "training.model_dtype .* must be auto or float32"),
        ({"training__model_quantize": "2bit"}, "training.model_quantize .* must be None or 8bit"),
        ({"d_in": None}, "d_in in .*config.json must be"),
    ],
)
def test_a_setting_that_is_damaged_is_named(run, changes, told):
    set_in_config(run, **changes)
    before = contents(run)
    with pytest.raises(InputError, match=told):
        evaluate(EvaluateConfig(run, tokens=32, resamples=2))
    assert contents(run) == before


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_sae_that_is_not_finite_is_refused(run, bad):
    path = run / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["W_dec"][3, 1] = bad
    safetensors.torch.save_file(weights, path)
    for do in (
        lambda: evaluate(EvaluateConfig(run, tokens=32)),
        lambda: convert(ConvertConfig(run, run.parent / "new", to="saelens")),
    ):
        with pytest.raises(InputError, match=r"W_dec in .* must be finite"):
            do()
    assert not (run.parent / "new").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_sae_in_half_precision_is_measured(run, dtype):
    path = run / "model.safetensors"
    halves = {name: w.to(dtype) for name, w in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(halves, path)
    result = evaluate(EvaluateConfig(run, tokens=32, resamples=2))
    assert result.metrics["fvu"].value.isfinite().all()


def test_what_is_measured_is_shown_where_the_report_cannot_be_redrawn(run, capsys):
    """Another program's file is damaged: nothing that was computed is lost."""
    (run / "analysis.json").write_text("{")
    with pytest.raises(InputError, match=r"results are written, and .*again with mlsae\.analyze"):
        evaluate_and_print(EvaluateConfig(run, tokens=32, resamples=2))
    assert "Residuals reconstructed" in capsys.readouterr().out
    assert json.loads((run / "evaluation.json").read_text())["tokens"] > 0
    analyze_and_print(AnalyzeConfig(run, tokens=32, resamples=2))  # which repairs it


def test_training_ends_although_an_earlier_measurement_is_damaged(trained, run, capsys):
    (run / "analysis.json").write_text("{")
    train(replace(trained, out=run, resume=True))
    assert "the run is whole, and" in capsys.readouterr().err
    assert (run / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["analysis.safetensors", "latents.safetensors"])
def test_a_prompt_is_not_shown_beside_a_damaged_analysis(run, name):
    (run / "analysis.safetensors").unlink()
    (run / name).write_bytes(b"\x00" * 20)
    before = contents(run)
    with pytest.raises(InputError, match=f"{name} must be a readable safetensors file"):
        show_prompt(AnalyzeConfig(run), "the cat")
    assert contents(run) == before


def test_a_prompt_is_shown_beside_an_analysis_without_a_profile(run):
    safetensors.torch.save_file({"other": torch.ones(2)}, run / "analysis.safetensors")
    _, source = show_prompt(AnalyzeConfig(run), "the cat")
    assert "totals of" in source  # of the training's validation


def places(base):
    """Paths that no folder can be made at."""
    (base / "file").write_text("mine")
    (base / "loop").symlink_to("loop")
    return {"file": "is no folder", "file/inside": "is no folder", "loop": "is no folder",
            "x" * 300: "name too long"}  # fmt: skip


@pytest.mark.parametrize("program", ["train", "evaluate", "analyze", "prompt", "convert"])
def test_a_place_that_cannot_be_written_to_is_told_at_once(trained, run, program):
    for name, told in places(run.parent).items():
        out = run.parent / name
        do = {
            "train": lambda out=out: train(replace(trained, out=out)),
            "evaluate": lambda out=out: evaluate(EvaluateConfig(run, out=out)),
            "analyze": lambda out=out: analyze(AnalyzeConfig(run, out=out)),
            "prompt": lambda out=out: show_prompt(AnalyzeConfig(run, out=out), "the"),
            "convert": lambda out=out: convert(ConvertConfig(run, out)),
        }[program]
        with pytest.raises(InputError, match=rf"(--out|DST) must be a folder.*(?i:{told})"):
            do()
    assert (run.parent / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "do"),
    [
        ("evaluation.csv", lambda _, run: evaluate(EvaluateConfig(run, tokens=32))),
        ("analysis.safetensors", lambda _, run: analyze(AnalyzeConfig(run, tokens=32))),
        ("prompt.html", lambda _, run: show_prompt(AnalyzeConfig(run), "the")),
        ("config.json", lambda config, run: train(replace(config, out=run, resume=True))),
    ],
)
def test_a_folder_in_the_place_of_a_result_is_told_before_anything_is_computed(
    trained, run, name, do
):
    if name == "evaluation.csv" or not (run / name).exists():
        (run / name).mkdir()
    else:
        (run / name).unlink()
        (run / name).mkdir()
    before = contents(run)
    with pytest.raises(InputError, match=f"{name} is itself a folder|{name} must be"):
        do(trained, run)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("*.sha256", lambda path: path.write_bytes(b"\xff\xfe")),
        ("*.safetensors", lambda path: (path.unlink(), path.mkdir())),
        ("*.safetensors", lambda path: (path.unlink(), path.symlink_to(path.name))),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_damaged(trained, run, pattern, damage):
    for path in list((run / "checkpoints").glob(pattern)):
        damage(path)
    with pytest.raises(InputError, match="--resume needs an undamaged checkpoint"):
        train(replace(trained, out=run, resume=True))


def test_a_home_that_is_nobodys_is_no_text(trained, run):
    data = replace(trained.data, dataset="~no-such-user/text.txt")
    with pytest.raises(InputError, match="DATASET must be a path or a name"):
        train(replace(trained, data=data, out=run.parent / "new"))


def test_no_folder_is_left_where_the_text_is_wrong(run):
    out = run.parent / "new"
    with pytest.raises(InputError, match="DATASET"):
        evaluate(EvaluateConfig(run, str(run.parent / "nothing.txt"), out=out))
    assert not out.exists()


def test_no_folder_is_left_where_the_memory_ends(run):
    out = run.parent / "new"
    with pytest.raises(RuntimeError, match=r"memory|Storage size"):
        analyze(AnalyzeConfig(run, tokens=32, examples=2**50, out=out))
    assert not out.exists()


def test_a_report_replaces_no_device(run):
    """As root, it would: a file of the same name would be renamed over it."""
    fifo = run.parent / "pipe"
    os.mkfifo(fifo)
    with pytest.raises(InputError, match="--out must be a file"):
        draw(ReportConfig((run,), out=fifo))
    assert fifo.is_fifo()


def test_settings_too_large_for_the_machine_are_told_at_once(run):
    with pytest.raises(InputError, match="--resamples must be at most 1,000,000"):
        evaluate(EvaluateConfig(run, resamples=2**40))
    with pytest.raises(InputError, match="--seed must be in"):
        evaluate(EvaluateConfig(run, seed=2**64))
    result = evaluate(EvaluateConfig(run, tokens=10**40, resamples=2))  # all that the text has
    assert result.provenance.tokens > 32


def test_a_conversion_that_does_not_fit_leaves_nothing(run, monkeypatch):
    written = []

    def full(path, content):
        if written:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        path.write_bytes(content)

    monkeypatch.setattr("mlsae.formats.write_file", full)
    for made in (False, True):
        out = run.parent / f"new-{made}"
        if made:
            out.mkdir()
        written.clear()
        with pytest.raises(OSError, match="No space left"):
            convert(ConvertConfig(run, out))
        assert written
        assert out.exists() == made
        assert not made or not list(out.iterdir())


def test_output_that_nobody_reads_is_no_traceback(run):
    """`python -m mlsae.convert … | true`, and `> /dev/full`."""
    command = f"{sys.executable} -m mlsae.convert {run} {run.parent}"
    for end, code, told in (
        ("/new | true; exit ${PIPESTATUS[0]}", 1, ""),
        ("/other > /dev/full", 2, "error: cannot write the output: No space left on device"),
    ):
        result = subprocess.run(
            ["bash", "-c", command + end], capture_output=True, text=True, check=False, timeout=240,
            env={**os.environ, "PYTHONUNBUFFERED": ""},  # as a shell's: written at the end
        )  # fmt: skip
        assert result.returncode in (0, code), result.stderr  # 0: read before `true` ended
        assert "Traceback" not in result.stderr
        assert "Exception ignored" not in result.stderr
        assert result.stderr.strip().startswith(told)
