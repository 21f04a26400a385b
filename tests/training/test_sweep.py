"""Several SAEs that train side by side, against each trained alone."""

import dataclasses
import json
import math
import signal

import pytest

from mlsae import MLSAE
from mlsae.config import SAESweep, TrainArguments
from mlsae.data.config import DataConfig
from mlsae.data.residuals import ResidualReader
from mlsae.data.stream import DataStream
from mlsae.errors import InputError, NonFiniteError
from mlsae.train import parse
from mlsae.training import checkpoint, start
from mlsae.training.run import train
from mlsae.training.run_dir import RunDir

SWEEP = SAESweep(expansion=(2, 3), k=(4, 8), dead_tokens=1000)
NAMES = ["x2-k4", "x2-k8", "x3-k4", "x3-k8"]
FILES = ("model.safetensors", "latents.safetensors")


def settings(out, sae=SWEEP, **options):
    chosen = {
        "tokens": 3000, "batch_tokens": 512, "micro_tokens": 256,
        "max_grad_norm": 1.0, "eval_tokens": 512, "eval_every": 1000, "log_tokens": 1000,
        "checkpoint_tokens": 512,
    } | options  # fmt: skip
    return TrainArguments(DataConfig(seq_len=64), sae=sae, out=out, **chosen).configs()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The folder of a sweep, and how often the transformer ran."""
    out = tmp_path_factory.mktemp("runs") / "sweep"
    return out, *count_passes(settings(out))


def count_passes(configs):
    """Train: the MLSAEs, and how often the transformer ran."""
    passes, call = [], ResidualReader.__call__

    def counted(reader, input_ids):
        passes.append(input_ids)
        return call(reader, input_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResidualReader, "__call__", counted)
        return train(*configs), len(passes)


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
def test_each_ends_as_it_would_alone(sweep, tmp_path, expansion, k):
    out, mlsaes, passes = sweep
    alone = dataclasses.replace(SWEEP, expansion=(expansion,), k=(k,))
    found, passes_alone = count_passes(settings(tmp_path / "alone", alone))
    folder = out / f"x{expansion}-k{k}"
    assert differences(folder, tmp_path / "alone") == []
    assert found.keys() == {tmp_path / "alone"}, "a single one has the folder to itself"
    assert mlsaes[folder].config == MLSAE.from_pretrained(folder).config
    assert mlsaes[folder].config.n_latents == expansion * 192
    assert passes == passes_alone, "the transformer runs once for all"


def test_the_folder_holds_each_run_one_kind_of_checkpoint_and_the_table(sweep):
    out, *_ = sweep
    folders = set(NAMES)
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


def test_measuring_does_not_touch_training(sweep, tmp_path):
    """Nor where it logs and saves."""
    out, *_ = sweep
    other = settings(
        tmp_path / "run", dataclasses.replace(SWEEP, expansion=(2,), k=(8,)), eval_every=None,
        eval_tokens=1024, log_tokens=500, checkpoint_tokens=None, keep_checkpoints=1,
    )  # fmt: skip
    train(*other)
    weights = (out / "x2-k8" / "model.safetensors", tmp_path / "run" / "model.safetensors")
    assert weights[0].read_bytes() == weights[1].read_bytes()


class PowerCutError(Exception):
    pass


def test_a_sweep_resumes_to_the_same_bits(sweep, tmp_path, monkeypatch):
    """Cut in the middle, where some runs' logs are ahead of the checkpoint."""
    out, *_ = sweep
    write, written = RunDir.log_metrics, []

    def cut(*arguments):
        written.append(1)
        if len(written) == 2 * 4 - 1:  # at the second log step, before the last run's line
            raise PowerCutError
        return write(*arguments)

    monkeypatch.setattr(RunDir, "log_metrics", cut)
    with pytest.raises(PowerCutError):
        train(*settings(tmp_path / "cut"))
    monkeypatch.undo()
    assert len(metrics(tmp_path / "cut" / "x2-k4")) > len(metrics(tmp_path / "cut" / "x3-k8"))
    train(*settings(tmp_path / "cut", resume=True))
    for name in NAMES:
        assert differences(out / name, tmp_path / "cut" / name) == []


def test_a_signal_leaves_a_checkpoint_and_a_model_of_each(tmp_path, monkeypatch, capsys):
    residuals = DataStream.masked_residuals

    def signalled(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return residuals(*arguments)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # while the first batch is measured
    monkeypatch.setattr(DataStream, "masked_residuals", signalled)
    try:
        with pytest.raises(SystemExit) as stopped:
            train(*settings(tmp_path / "run"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in capsys.readouterr().err
    state = checkpoint.load(checkpoint.newest(tmp_path / "run", print))
    for name in NAMES:
        weights = MLSAE.from_pretrained(tmp_path / "run" / name).sae.W_enc
        assert weights.equal(state["runs"][name]["trainer"]["weights"]["W_enc"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [(1e38, "W_enc|W_dec|the reconstruction of layer"), (math.inf, "W_enc is not finite after")],
)
def test_what_is_not_finite_stops_all_and_names_whose_it_is(tmp_path, monkeypatch, bad, message):
    """A rate that ruins the weights of one: they never become a checkpoint."""
    rate = start.learning_rate

    def too_high(config, n_latents, tokens, first_tokens):
        high = config.sae.expansion == 3 and config.sae.k == 4 and tokens > 1000
        return bad if high else rate(config, n_latents, tokens, first_tokens)

    monkeypatch.setattr(start, "learning_rate", too_high)
    with pytest.raises(NonFiniteError, match=f"in .*x3-k4, ({message})") as stopped:
        # A checkpoint at every step, however many tokens the text of this Python gives one.
        train(*settings(tmp_path / "run", checkpoint_tokens=256))
    path = checkpoint.newest(tmp_path / "run", print)
    state = checkpoint.load(path)
    assert str(stopped.value).endswith(f"; the last good checkpoint is {path}")
    for name in NAMES:
        for weight in state["runs"][name]["trainer"]["weights"].values():
            assert weight.isfinite().all()


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (SAESweep(k=(8, 0)), "--sae.k must be at least 1, got 0"),
        (SAESweep(k=(8, 4, 8)), "--sae.k must have one value or several different ones"),
        (SAESweep(k=()), "--sae.k must have one value .* got none"),
        (SAESweep(n_latents=(512,), expansion=(2, 3)), "--sae.n_latents is instead of"),
    ],
)
def test_a_sweep_that_is_none_is_named(tmp_path, sae, message):
    with pytest.raises(InputError, match=message):
        train(*settings(tmp_path, sae))


def test_the_command_line_takes_one_value_or_several(tmp_path):
    (one,) = parse(["--sae.k", "16", "--out", "runs/a"])
    assert (one.sae.name, str(one.out), one.sae.k) == ("x16-k16", "runs/a", 16)
    several = parse("--sae.k 16 32 --sae.n_latents 512 1024 --out runs/a".split())
    assert {config.sae.name: str(config.out) for config in several} == {
        f"n{n}-k{k}": f"runs/a/n{n}-k{k}" for n in (512, 1024) for k in (16, 32)
    }
    (paper,) = parse(["--preset", "paper"])
    assert paper.sae.expansion == 64


def test_each_seed_ends_as_it_would_alone(tmp_path):
    """Alone by --seeds, and as a run whose --seed is that of its weights, on the same rows."""
    small = dataclasses.replace(SWEEP, expansion=(2,), k=(4,))
    two = settings(tmp_path / "two", small, seeds=(0, 1))
    _, passes = count_passes(two)
    alone = settings(tmp_path / "alone", small, seeds=(1,))
    _, passes_alone = count_passes(alone)
    assert alone[0].out == tmp_path / "alone"
    assert differences(tmp_path / "two" / "x2-k4-s1", tmp_path / "alone") == []
    assert passes == passes_alone
    train(*settings(tmp_path / "plain", small))
    weights = [
        (tmp_path / run / "model.safetensors").read_bytes()
        for run in ("two/x2-k4-s0", "plain", "alone")
    ]
    assert weights[0] == weights[1] != weights[2]
    header, *rows = (tmp_path / "two" / "runs.csv").read_text().splitlines()
    shown = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    assert [(row["run"], row["seed"]) for row in shown] == [("x2-k4-s0", "0"), ("x2-k4-s1", "1")]


def test_several_seeds_resume_to_the_same_bits(tmp_path, monkeypatch):
    small = dataclasses.replace(SWEEP, expansion=(2,), k=(4, 8))
    train(*settings(tmp_path / "whole", small, seeds=(3, 1)))
    save, saved = checkpoint.save, []

    def cut(*arguments):
        saved.append(save(*arguments))
        if len(saved) == 3:
            raise PowerCutError
        return saved[-1]

    monkeypatch.setattr(checkpoint, "save", cut)
    with pytest.raises(PowerCutError):
        train(*settings(tmp_path / "cut", small, seeds=(3, 1)))
    monkeypatch.undo()
    for seeds in ((), (3,), (3, 2)):
        given = " ".join(map(str, seeds)) or "None"
        with pytest.raises(InputError, match=f"--seeds must be 3 1 to resume .* got {given};"):
            train(*settings(tmp_path / "cut", small, seeds=seeds, resume=True))
    train(*settings(tmp_path / "cut", small, seeds=(3, 1), resume=True))
    for name in ("x2-k4-s3", "x2-k4-s1", "x2-k8-s3", "x2-k8-s1"):
        assert differences(tmp_path / "whole" / name, tmp_path / "cut" / name) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (0, 1, 0)}, "--seeds must have one value or several different ones, got 0 1 0"),
        ({"seeds": (2, -1)}, "--seeds must be at least 0, got -1"),
        ({"seeds": (2**63,)}, r"--seeds must be in \[-2\^63, 2\^63\), got 9223372036854775808"),
        ({"seeds": (0, 1), "init_from": "runs/a"}, "--init_from runs/a gives all SAEs the same"),
    ],
)
def test_seeds_that_are_none_are_named(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        train(*settings(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_seeds_combine_with_sizes_on_the_command_line():
    several = parse("--seeds 0 7 --sae.k 16 32 --out runs/a --seed 5".split())
    assert [(config.sae.name, config.seed, config.weights_seed) for config in several] == [
        (f"x16-k{k}-s{seed}", 5, seed) for k in (16, 32) for seed in (0, 7)
    ]
    (one,) = parse("--seeds 3 --out runs/a".split())
    assert (str(one.out), one.sae.name, one.weights_seed) == ("runs/a", "x16-k32-s3", 3)
    (none,) = parse(["--seed", "4"])
    assert (none.sae.seed, none.weights_seed) == (None, 4)


def test_another_sweep_does_not_continue_it(sweep):
    out, *_ = sweep
    fewer = dataclasses.replace(SWEEP, k=(4,))
    with pytest.raises(InputError, match=r"--sae.k must be 4 8 to resume .* got 4;"):
        train(*settings(out, fewer, resume=True))


def test_what_is_no_run_in_a_run_s_folder_is_not_lost(sweep):
    out, *_ = sweep
    note = out / "x2-k4" / "note.txt"
    note.write_text("kept")
    try:
        with pytest.raises(InputError, match=r"x2-k4 has note\.txt in it"):
            train(*settings(out, overwrite=True))
        assert note.exists()
    finally:
        note.unlink()
