"""Which text an MLSAE is measured on."""

import dataclasses
import json
import os

import datasets
import pytest
import torch
import transformers

from mlsae import MLSAE, MLSAEConfig, builtin
from mlsae.analysis.run import AnalyzeConfig
from mlsae.data.config import DataConfig
from mlsae.data.heldout_split import HeldoutSplit
from mlsae.errors import InputError
from mlsae.evaluation import heldout
from mlsae.evaluation.heldout import open_run
from mlsae.evaluation.run import EvaluateConfig, evaluate
from tests.helpers.texts import write

TEXTS = [f"x{i} = {i}\n" * 9 for i in range(200)]
OF_A_HUB = {
    "column": "content",
    "dataset_config": "en",
    "dataset_split": "test",
    "dataset_revision": "v1",
}


@pytest.fixture
def dataset(tmp_path):
    return write(tmp_path / "text.jsonl", TEXTS)


@pytest.fixture
def make_run(tmp_path):
    """Save an MLSAE that was trained with the given settings; how to measure it."""

    def make(**training):
        d_in = transformers.AutoConfig.from_pretrained(builtin.MODEL_DIR).hidden_size
        mlsae = MLSAE(MLSAEConfig(d_in, 8, 2, (0,), model=builtin.NAME))
        mlsae.about = {"training": {"seed": 0, "seq_len": 32, **training}}
        mlsae.save_pretrained(tmp_path / "run")
        return EvaluateConfig(tmp_path / "run", tokens=10**6)

    return make


def measured_text(config, **changes):
    """The settings of the text, and the number of tokens held out in all."""
    _, stream = open_run(dataclasses.replace(config, **changes), torch.device("cpu"))
    return stream.config, stream.heldout(config.tokens).numel()


def settings_of(config, trained, **changes):
    """The settings of the text, which need not exist."""
    mlsae = MLSAE(MLSAEConfig(8, 16, 2, (0,), model="lab/model"))
    data = heldout._data_config(dataclasses.replace(config, **changes), mlsae, trained)
    return {name: getattr(data, name) for name in (*OF_A_HUB, "heldout_share")}


def n_tokens(texts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(builtin.MODEL_DIR)
    return sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts) // 32 * 32


@pytest.mark.parametrize("program", [EvaluateConfig, AnalyzeConfig])
def test_the_parts_of_the_run_s_dataset_are_not_those_of_another(program, tmp_path):
    config = program(tmp_path / "run")
    trained = {"dataset": "lab/text", "heldout_share": 0.25, **OF_A_HUB}
    for own in (None, "lab/text"):
        found = settings_of(config, trained, dataset=own)
        assert found == {**OF_A_HUB, "heldout_share": 0.25}
    found = settings_of(config, trained, dataset="lab/other")
    assert found == {name: getattr(DataConfig, name) for name in OF_A_HUB} | {"heldout_share": 0.25}
    given = {"dataset_config": "de", "dataset_split": "dev", "dataset_revision": "v2"}
    for dataset, column in ((None, "content"), ("lab/other", "text")):
        found = settings_of(config, trained, dataset=dataset, **given)
        assert found == {**given, "column": column, "heldout_share": 0.25}


def test_a_local_dataset_is_the_run_s_by_whatever_path(make_run, dataset, monkeypatch):
    config = make_run(dataset=dataset, heldout_share=0.25)
    monkeypatch.chdir(os.path.dirname(dataset))
    with pytest.raises(InputError, match=r"--heldout_share must be at most 0\.25"):
        measured_text(config, dataset="text.jsonl", heldout_share=1.0)


def test_a_run_is_measured_on_the_share_that_it_held_out(make_run, dataset, capsys):
    config = make_run(dataset=dataset, heldout_share=0.25)
    split = HeldoutSplit("heldout", 0.25)
    held_out = n_tokens(text for text in TEXTS if split.has_text(text))
    assert measured_text(config)[1] == held_out
    assert measured_text(config, heldout_share=0.1)[1] < held_out
    assert "earlier version" not in capsys.readouterr().err
    with pytest.raises(InputError, match=r"--heldout_share must be at most 0.25 .* got 0.3"):
        measured_text(config, heldout_share=0.3)


def test_all_of_another_text_can_be_measured_on(make_run, dataset, tmp_path):
    config = make_run(dataset="lab/other", heldout_share=0.05)
    assert measured_text(config, dataset=dataset, heldout_share=1.0)[1] == n_tokens(TEXTS)
    assert measured_text(config, dataset=dataset)[0].heldout_share == 0.05
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(InputError, match=r"--heldout_share must be .* 0 and at most 1, got"):
            measured_text(config, dataset=dataset, heldout_share=share)
    short = write(tmp_path / "short.txt", ["short"])
    with pytest.raises(InputError, match="give --heldout_share 1 to evaluate"):
        measured_text(config, dataset=short)


def test_another_split_of_the_run_s_dataset_is_another_text(tmp_path):
    config = EvaluateConfig(tmp_path / "run", heldout_share=1.0)
    trained = {"dataset": "lab/text", "dataset_split": "train", "heldout_share": 0.05}
    assert settings_of(config, trained, dataset_split="test")["heldout_share"] == 1
    assert settings_of(config, trained | OF_A_HUB, dataset_config="de")["heldout_share"] == 1
    # The same text, or some of it.
    for changes in ({}, {"dataset_split": "train"}, {"dataset_revision": "v2"}, {"column": "x"}):
        with pytest.raises(InputError, match=r"--heldout_share must be at most 0.05 .* got 1"):
            settings_of(config, trained, **changes)


def test_the_result_says_which_text_was_measured(make_run, tmp_path):
    splits = {name: datasets.Dataset.from_list([{"text": t} for t in TEXTS]) for name in "ab"}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    text = {"dataset": str(tmp_path / "saved"), "dataset_split": "b", "heldout_share": 1.0}
    evaluate(dataclasses.replace(make_run(), tokens=64, resamples=2, **text))
    told = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert told.items() >= {**text, "dataset_config": None, "dataset_revision": None}.items()


def test_the_built_in_corpus_has_no_share(make_run):
    config = make_run(dataset=builtin.NAME)
    with pytest.raises(InputError, match=r"--heldout_share .* builtin, .* got 0.5; leave"):
        measured_text(config, heldout_share=0.5)


def test_an_older_run_held_out_other_text_of_its_own_only(make_run, dataset, capsys):
    config = make_run(dataset=dataset)
    assert measured_text(config)[0].heldout_share == 0.05
    assert capsys.readouterr().err.count("trained by an earlier version") == 1
    measured_text(make_run(dataset="lab/other"), dataset=dataset)
    measured_text(make_run(dataset=builtin.NAME))
    measured_text(make_run(), dataset=dataset)
    assert "earlier version" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [*OF_A_HUB, "heldout_share", "max_bad_records"])
def test_a_damaged_setting_of_the_text_is_named(make_run, dataset, name):
    config = make_run(dataset=dataset, **{name: ["x"]})
    with pytest.raises(InputError, match=rf"training.{name} in .* must be of type (str|float)"):
        measured_text(config)
