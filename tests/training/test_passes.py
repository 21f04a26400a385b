"""A dataset that is shorter than the training is read again, and that is told."""

import json

import pytest
from transformers import AutoTokenizer

from mlsae import builtin
from mlsae.config import SAESweep, TrainArguments
from mlsae.data.config import DataConfig
from mlsae.data.tokens import Rows
from mlsae.training.loop import TrainLoop
from mlsae.training.run import train

WARNING = "DATASET is at its end after"


def settings(dataset, out, **options):
    data = DataConfig(dataset=str(dataset), seq_len=64, layers=(0,))
    chosen = {"batch_tokens": 128, "eval_tokens": 64, "log_tokens": 128} | options
    sae = SAESweep(expansion=(1,), k=chosen.pop("k", (4,)))
    return TrainArguments(data, sae=sae, out=out, **chosen).configs()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A text, and how many tokens of it a pass trains on."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    texts = [f"def function_{i}(x):\n    return x + {i} * {i}\n" * 4 for i in range(40)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokenizer = AutoTokenizer.from_pretrained(builtin.MODEL_DIR)
    rows = list(Rows(DataConfig(dataset=str(path)), tokenizer, 64, "train"))
    return path, 64 * len(rows)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("k", [(4,), (4, 8)])
def test_each_pass_is_told(dataset, tmp_path, capsys, k):
    path, size = dataset
    configs = settings(path, tmp_path / "run", tokens=int(2.5 * size), k=k)
    train(*configs)
    said = capsys.readouterr()
    assert said.err.count(WARNING) == 1, "once, when the second pass begins"
    assert "; in 3 passes over the text" in said.out
    assert ", pass 3" in said.err
    for config in configs:
        assert json.loads((config.out / "config.json").read_text())["passes"] == 3
        *lines, _ = metrics(config.out)
        # Special tokens are left out of "tokens", so a pass has fewer than the rows hold.
        steps_per_pass = size / 128
        for line in lines:
            assert line["passes"] == -(-line["steps"] // steps_per_pass)
        assert {line["passes"] for line in lines} == {1, 2, 3}


def test_one_pass_is_not_worth_a_word(dataset, tmp_path, capsys):
    path, size = dataset
    train(*settings(path, tmp_path / "run", tokens=size // 2))
    said = capsys.readouterr()
    assert "pass" not in said.err
    assert "passes" not in said.out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["passes"] == 1


class PowerCutError(Exception):
    pass


def test_a_resumed_run_knows_its_passes_and_warns_no_second_time(
    dataset, tmp_path, capsys, monkeypatch
):
    path, size = dataset
    options = {"tokens": int(2.5 * size), "checkpoint_tokens": 128}
    train(*settings(path, tmp_path / "straight", **options))
    log, logged = TrainLoop.log, []

    def cut(loop):
        logged.append(loop.passes)
        if logged.count(2) == 3:
            raise PowerCutError
        return log(loop)

    monkeypatch.setattr(TrainLoop, "log", cut)
    with pytest.raises(PowerCutError):
        train(*settings(path, tmp_path / "cut", **options))
    monkeypatch.undo()
    capsys.readouterr()
    train(*settings(path, tmp_path / "cut", **options, resume=True))
    assert WARNING not in capsys.readouterr().err
    found, expected = (
        [line.get("passes") for line in metrics(tmp_path / name)] for name in ("cut", "straight")
    )
    assert found == expected
