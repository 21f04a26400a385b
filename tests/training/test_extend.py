"""A run that is extended: --resume with more --tokens."""

import json

import pytest

from mlsae.config import SAEConfig, TrainConfig
from mlsae.data import dtypes
from mlsae.data.config import DataConfig
from mlsae.errors import InputError
from mlsae.training.loop import TrainLoop
from mlsae.training.run import train
from mlsae.training.settings import model_dtype_of

BATCH = 128
WARMUP, DECAY = 0.1, 0.25


def settings(out, tokens, **options):
    chosen = {
        "batch_tokens": BATCH, "eval_tokens": 64, "log_tokens": 64, "checkpoint_tokens": 256,
        "warmup": WARMUP, "decay": DECAY, "optimizer": "adam",
    } | options  # fmt: skip
    data = DataConfig(seq_len=64, layers=(0,))
    return TrainConfig(data, sae=SAEConfig(expansion=1, k=4), tokens=tokens, out=out, **chosen)


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in found]


def rates(folder):
    """The learning rate of each step, and the tokens before it."""
    before, found = 0, []
    for line in lines(folder):
        if "lr" in line:
            found.append((before, line["lr"]))
            before = line["tokens"]
    return found


def rate(tokens, first, total):
    """The law with the first number, the warm-up of the first number, the decay of the last."""
    peak = 2e-4 / (192 / 16384) ** 0.5 * (1e9 / first) ** 0.32
    middle = tokens + BATCH / 2
    return peak * max(0, min(1, middle / (WARMUP * first), (total - middle) / (DECAY * total)))


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A run of 1000 tokens, extended to 2000 once it was finished."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(settings(out, 1000))
    first = lines(out)
    train(settings(out, 2000, resume=True))
    return out, first


def test_the_rate_keeps_its_peak_and_falls_at_the_new_end(extended):
    out, first = extended
    end = first[-1]["tokens"]
    found = rates(out)
    assert found[-1][0] < 2000 <= lines(out)[-1]["tokens"]
    for tokens, lr in found:
        assert lr == pytest.approx(rate(tokens, 1000, 1000 if tokens < end else 2000), rel=1e-9)
    assert lines(out)[: len(first) - 1] == first[:-1], "what was logged before stays"


def test_an_extension_is_told_and_recorded(extended, capsys, tmp_path):
    out, first = extended
    about = json.loads((out / "config.json").read_text())
    assert about["extensions"] == [{"at": first[-1]["tokens"], "from": 1000, "to": 2000}]
    assert about["training"]["tokens"] == 2000
    train(settings(tmp_path / "run", 500))
    capsys.readouterr()
    train(settings(tmp_path / "run", 900, resume=True))
    said = capsys.readouterr().err
    assert "extending the run from 500 to 900 tokens" in said
    assert "warm-up stay those of 500 tokens; the rate falls over the last 25% of 900" in said
    end = json.loads((tmp_path / "run" / "config.json").read_text())["extensions"][0]["at"]
    told = (
        f"learning rate of x1-k4: {rate(end, 500, 500):.2e} until here, {rate(end, 500, 900):.2e}"
    )
    assert told in said


def test_a_run_that_was_not_extended_says_nothing_of_it(tmp_path, capsys):
    train(settings(tmp_path / "run", 500))
    train(settings(tmp_path / "run", 500, resume=True))
    assert "extending" not in capsys.readouterr().err
    assert "extensions" not in json.loads((tmp_path / "run" / "config.json").read_text())


def test_fewer_tokens_are_refused(extended):
    out, _ = extended
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for tokens in (1000, 1999):
        with pytest.raises(InputError, match=rf"--tokens must be at least 2000 .* got {tokens}"):
            train(settings(out, tokens, resume=True))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


class PowerCutError(Exception):
    pass


@pytest.mark.parametrize("first_save", [1, 3])
def test_an_extension_that_is_cut_and_extended_again_ends_with_the_same_bits(
    extended, tmp_path, monkeypatch, first_save
):
    """Cut before it has a checkpoint, and after; extended to 3000 then, and once more."""
    out, _ = extended
    train(settings(tmp_path / "cut", 1000))
    save, saved = TrainLoop.save, []

    def cut(loop):
        saved.append(1)
        if len(saved) == first_save:
            raise PowerCutError
        save(loop)

    with monkeypatch.context() as patch:
        patch.setattr(TrainLoop, "save", cut)
        with pytest.raises(PowerCutError):
            train(settings(tmp_path / "cut", 2000, resume=True))
    train(settings(tmp_path / "cut", 2000, resume=True))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "cut")]
    assert weights[0] == weights[1]
    assert lines(out) == lines(tmp_path / "cut")
    train(settings(tmp_path / "cut", 2600, resume=True))
    extensions = json.loads((tmp_path / "cut" / "config.json").read_text())["extensions"]
    assert [(each["from"], each["to"]) for each in extensions] == [(1000, 2000), (2000, 2600)]
    tokens, lr = rates(tmp_path / "cut")[-1]
    assert lr == pytest.approx(rate(tokens, 1000, 2600), rel=1e-9)


def test_a_run_keeps_the_dtype_of_the_transformer_it_began_with(tmp_path, capsys, monkeypatch):
    """On a CPU without the units that it chose bfloat16 for; and one of an earlier version in
    float32, on a CPU that has them."""
    told = []
    for tokens, units in ((128, True), (256, False)):
        monkeypatch.setattr(dtypes, "multiplies_bfloat16", lambda units=units: units)
        train(settings(tmp_path / "run", tokens, resume=tokens > 128))
        told += [line for line in capsys.readouterr().err.splitlines() if "computes in" in line]
    begun, resumed = told
    assert "computes in bfloat16, for which this CPU has matrix units (else --model_dtype" in begun
    assert resumed.endswith("computes in bfloat16")
    config, earlier = settings(tmp_path, 256), {}
    assert model_dtype_of(config, earlier, "cpu") == "float32"
    assert model_dtype_of(config, earlier, "cuda") == "auto"
    assert model_dtype_of(config, None, "cpu") == "auto"
