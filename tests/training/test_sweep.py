"""Several SAEs that train side by side, against each trained alone."""

import dataclasses
import json
import math
import signal

import pytest

from mlsae import MLSAE
from mlsae.config import SAEConfig, TrainConfig, check_config, runs_of
from mlsae.data.residuals import ResidualReader
from mlsae.data.stream import DataStream
from mlsae.errors import InputError
from mlsae.train import parse, train
from mlsae.training import checkpoint
from mlsae.training import sae_run as run
from mlsae.training.state import NonFiniteError

GRID = SAEConfig(expansion=(2, 3), k=(4, 8), dead_tokens=1000)
FILES = ("model.safetensors", "latents.safetensors")


def settings(out, sae=GRID, **options):
    chosen = {
        "tokens": 3000, "batch_tokens": 512, "micro_tokens": 256, "seq_len": 64,
        "max_grad_norm": 1.0, "eval_tokens": 512, "eval_every": 1000, "log_tokens": 1000,
        "checkpoint_tokens": 512,
    } | options  # fmt: skip
    return TrainConfig(sae=sae, out=out, **chosen)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """The folder of a grid, and how often the transformer ran."""
    out = tmp_path_factory.mktemp("runs") / "grid"
    return out, *count_passes(settings(out))


def count_passes(config):
    """Train: the MLSAEs, and how often the transformer ran."""
    passes, call = [], ResidualReader.__call__

    def counted(reader, input_ids):
        passes.append(input_ids)
        return call(reader, input_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResidualReader, "__call__", counted)
        return train(config), len(passes)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def differences(one, other):
    """Of two runs; times do differ, and where they are."""
    found = [name for name in FILES if (one / name).read_bytes() != (other / name).read_bytes()]
    if metrics(one) != metrics(other):
        found.append("metrics.jsonl")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    for config in configs:
        for name in ("out", "resume"):
            del config["training"][name]
    return found + ["config.json"] * (configs[0] != configs[1])


@pytest.mark.parametrize(("expansion", "k"), [(2, 8), (3, 4)])
def test_each_ends_as_it_would_alone(grid, tmp_path, expansion, k):
    out, mlsaes, passes = grid
    alone = dataclasses.replace(GRID, expansion=expansion, k=k)
    found, passes_alone = count_passes(settings(tmp_path / "alone", alone))
    folder = out / f"x{expansion}-k{k}"
    assert differences(folder, tmp_path / "alone") == []
    assert found.keys() == {tmp_path / "alone"}, "a single one has the folder to itself"
    assert mlsaes[folder].config == MLSAE.from_pretrained(folder).config
    assert mlsaes[folder].config.n_latents == expansion * 192
    assert passes == passes_alone, "the transformer runs once for all"


def test_the_folder_holds_each_run_one_kind_of_checkpoint_and_the_table(grid):
    out, *_ = grid
    folders = {"x2-k4", "x2-k8", "x3-k4", "x3-k8"}
    assert {path.name for path in out.iterdir()} == folders | {"checkpoints", "runs.csv"}
    for name in folders:
        assert {path.name for path in (out / name).iterdir()} == {
            *FILES, "config.json", "README.md", "metrics.jsonl", "report.html",
        }  # fmt: skip
    header, *rows = (out / "runs.csv").read_text().splitlines()
    for row in rows:
        shown = dict(zip(header.split(","), row.split(","), strict=True))
        heldout = metrics(out / shown["run"])[-1]["heldout"]
        assert float(shown["fvu"]) == heldout["fvu"]
        assert shown["run"] == f"x{int(shown['n_latents']) // 192}-k{shown['k']}"
    assert len(rows) == 4


def test_measuring_does_not_touch_training(grid, tmp_path):
    """Nor where it logs and saves."""
    out, *_ = grid
    other = settings(
        tmp_path / "run", dataclasses.replace(GRID, expansion=2, k=8), eval_every=None,
        eval_tokens=1024, log_tokens=500, checkpoint_tokens=None, keep_checkpoints=1,
    )  # fmt: skip
    train(other)
    weights = (out / "x2-k8" / "model.safetensors", other.out / "model.safetensors")
    assert weights[0].read_bytes() == weights[1].read_bytes()


class PowerCutError(Exception):
    pass


def test_a_grid_resumes_to_the_same_bits(grid, tmp_path, monkeypatch):
    """Cut in the middle, where some runs' logs are ahead of the checkpoint."""
    out, *_ = grid
    write, written = run.Run.write_line, []

    def cut(*arguments):
        written.append(1)
        if len(written) == 2 * 4 - 1:  # at the second log step, before the last run's line
            raise PowerCutError
        return write(*arguments)

    monkeypatch.setattr(run.Run, "write_line", cut)
    with pytest.raises(PowerCutError):
        train(settings(tmp_path / "cut"))
    monkeypatch.undo()
    assert len(metrics(tmp_path / "cut" / "x2-k4")) > len(metrics(tmp_path / "cut" / "x3-k8"))
    train(settings(tmp_path / "cut", resume=True))
    for name in runs_of(settings(out)):
        assert differences(out / name, tmp_path / "cut" / name) == []


def test_a_signal_leaves_a_checkpoint_and_a_model_of_each(tmp_path, monkeypatch, capsys):
    residuals = DataStream.residuals

    def signalled(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return residuals(*arguments)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # while the first batch is surveyed
    monkeypatch.setattr(DataStream, "residuals", signalled)
    try:
        with pytest.raises(SystemExit) as stopped:
            train(settings(tmp_path / "run"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in capsys.readouterr().err
    state = checkpoint.load(checkpoint.newest(tmp_path / "run", print))
    for name, config in runs_of(settings(tmp_path / "run")).items():
        weights = MLSAE.from_pretrained(config.out).sae.W_enc
        assert weights.equal(state["runs"][name]["trainer"]["weights"]["W_enc"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [(1e38, "W_enc|W_dec|the reconstruction of layer"), (math.inf, "W_enc is not finite after")],
)
def test_what_is_not_finite_stops_all_and_names_whose_it_is(tmp_path, monkeypatch, bad, message):
    """A rate that ruins the weights of one: they never become a checkpoint."""
    rate = run.learning_rate

    def too_high(config, n_latents, tokens):
        high = config.sae.expansion == 3 and config.sae.k == 4 and tokens > 1000
        return bad if high else rate(config, n_latents, tokens)

    monkeypatch.setattr(run, "learning_rate", too_high)
    with pytest.raises(NonFiniteError, match=f"in .*x3-k4, ({message})") as stopped:
        train(settings(tmp_path / "run"))
    path = checkpoint.newest(tmp_path / "run", print)
    state = checkpoint.load(path)
    assert str(stopped.value).endswith(f"; the last good checkpoint is {path}")
    for name in runs_of(settings(tmp_path / "run")):
        for weight in state["runs"][name]["trainer"]["weights"].values():
            assert weight.isfinite().all()


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (SAEConfig(k=(8, 0)), "--sae.k must be at least 1, got 0"),
        (SAEConfig(k=(8, 4, 8)), "--sae.k must have one value or several different ones"),
        (SAEConfig(k=()), "--sae.k must have one value .* got none"),
        (SAEConfig(n_latents=512, expansion=(2, 3)), "--sae.n_latents is instead of"),
    ],
)
def test_a_grid_that_is_none_is_named(tmp_path, sae, message):
    with pytest.raises(InputError, match=message):
        check_config(settings(tmp_path, sae))


def test_the_command_line_takes_one_value_or_several(tmp_path):
    one = parse(["--sae.k", "16", "--out", "runs/a"])
    assert [(name, str(c.out), c.sae.k) for name, c in runs_of(one).items()] == [
        ("x16-k16", "runs/a", 16)
    ]
    several = parse("--sae.k 16 32 --sae.n_latents 512 1024 --out runs/a".split())
    assert {name: str(c.out) for name, c in runs_of(several).items()} == {
        f"n{n}-k{k}": f"runs/a/n{n}-k{k}" for n in (512, 1024) for k in (16, 32)
    }
    assert parse(["--preset", "paper"]).sae.expansion == 64


def test_another_grid_does_not_continue_it(grid):
    out, *_ = grid
    fewer = dataclasses.replace(GRID, k=4)
    with pytest.raises(InputError, match=r"--sae.k must be 4 8 to resume .* got 4;"):
        train(settings(out, fewer, resume=True))


def test_what_is_no_run_in_a_run_s_folder_is_not_lost(grid):
    out, *_ = grid
    note = out / "x2-k4" / "note.txt"
    note.write_text("kept")
    try:
        with pytest.raises(InputError, match=r"x2-k4 has note\.txt in it"):
            train(settings(out, overwrite=True))
        assert note.exists()
    finally:
        note.unlink()
