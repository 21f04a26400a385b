"""A resumed run has the model and the text it began with, wherever they are."""

import dataclasses
import json
import shutil
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsae import builtin
from mlsae.config import SAEConfig, TrainConfig
from mlsae.data.config import DataConfig
from mlsae.data.fingerprint import _spread, fingerprint
from mlsae.errors import InputError
from mlsae.training import checkpoint
from mlsae.training.inputs import check_inputs, fingerprints
from mlsae.training.run import train

TEXTS = [f"def function_{i}(x):\n    return x + {i} * {i}\n" * 4 for i in range(60)]


def write(path, texts=TEXTS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def settings(model, dataset, out, **options):
    data = DataConfig(str(model), str(dataset), seq_len=64, layers=(0,))
    chosen = {"tokens": 600, "batch_tokens": 128, "eval_tokens": 64} | options
    return TrainConfig(data, sae=SAEConfig(expansion=1, k=4), out=out, **chosen)


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory):
    """A run that was cut, of a local model and a local folder of text, and how it ends."""
    folder = tmp_path_factory.mktemp("moved")
    shutil.copytree(builtin.MODEL_DIR, folder / "here" / "model")
    write(folder / "here" / "text" / "a.jsonl", TEXTS[:30])
    write(folder / "here" / "text" / "b.jsonl", TEXTS[30:])
    where = (folder / "here" / "model", folder / "here" / "text")
    train(settings(*where, folder / "straight", checkpoint_tokens=256, keep_checkpoints=9))
    shutil.copytree(folder / "straight", folder / "cut")
    _, _, *later = sorted((folder / "cut" / "checkpoints").iterdir())  # the first and its checksum
    assert later
    for path in later:
        path.unlink()
    return folder


@pytest.fixture
def cut(half_trained, tmp_path):
    """A copy of the run, with its inputs."""
    shutil.copytree(half_trained / "cut", tmp_path / "cut")
    shutil.copytree(half_trained / "here", tmp_path / "there")
    return tmp_path


def test_moved_files_are_the_same_and_the_run_ends_with_the_same_bits(half_trained, cut, capsys):
    """With logs, validations and checkpoints at other times."""
    (cut / "there" / "text" / "README.md").write_text("where it is from")
    (cut / "there" / "text" / ".cache").write_text("of a download")
    moved = settings(cut / "there" / "model", cut / "there" / "text", cut / "cut", resume=True)
    watched = {"log_tokens": 128, "eval_every": 200, "eval_tokens": 128, "checkpoint_tokens": 128}
    train(dataclasses.replace(moved, **watched))
    assert "resuming from" in capsys.readouterr().err
    weights = [folder / "model.safetensors" for folder in (half_trained / "straight", cut / "cut")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert json.loads((cut / "cut" / "config.json").read_text())["training"]["dataset"] == str(
        cut / "there" / "text"
    )


@pytest.mark.parametrize("change", ["a byte", "a file more", "a file less", "a name", "the model"])
def test_other_content_is_refused_and_the_run_untouched(cut, change):
    text, model = cut / "there" / "text", cut / "there" / "model"
    if change == "a byte":
        content = bytearray((text / "b.jsonl").read_bytes())
        content[-10] ^= 1
        (text / "b.jsonl").write_bytes(content)
    elif change == "a file more":
        write(text / "c.jsonl", TEXTS[:1])
    elif change == "a file less":
        (text / "b.jsonl").unlink()
    elif change == "a name":
        (text / "b.jsonl").rename(text / "c.jsonl")
    else:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"rope_theta": 5000}))
    argument = "MODEL" if change == "the model" else "DATASET"
    before = {path: path.stat().st_mtime_ns for path in (cut / "cut").rglob("*")}
    with pytest.raises(InputError, match=rf"^{argument} must be .* has other content; .*--moved"):
        train(settings(model, text, cut / "cut", resume=True))
    assert {path: path.stat().st_mtime_ns for path in (cut / "cut").rglob("*")} == before


def test_moved_takes_other_content_on_trust(cut):
    text = cut / "there" / "text"
    write(text / "c.jsonl", TEXTS[:1])
    where = (cut / "there" / "model", text, cut / "cut")
    train(settings(*where, resume=True, moved=True))
    found = checkpoint.load(checkpoint.newest(cut / "cut", pytest.fail))
    assert found["inputs"]["dataset"] == fingerprint(text), "from now on, it is this one"
    with pytest.raises(InputError, match="--moved is for a run that is resumed"):
        train(settings(*where, moved=True))


def test_names_of_the_hub_must_be_equal_and_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = settings("user/model", "user/text", tmp_path / "run", resume=True)
    none = {"model": None, "dataset": None}
    saved = {"model": "user/model", "dataset": "user/text"}
    assert fingerprints(config) == none
    check_inputs(config, saved, none, none)
    with pytest.raises(InputError, match=r"DATASET must be user/other to resume .* got user/text"):
        check_inputs(config, saved | {"dataset": "user/other"}, none, none)
    write(tmp_path / "user" / "text" / "a.jsonl")  # what the name means now
    with pytest.raises(InputError, match="DATASET must be what this run began with"):
        check_inputs(config, saved, none, fingerprints(config))
    here = fingerprints(config)
    (tmp_path / "user" / "text" / "a.jsonl").unlink()
    (tmp_path / "user" / "text").rmdir()
    with pytest.raises(InputError, match="user/text is no file or folder here"):
        check_inputs(config, saved, here, none)


def test_an_earlier_version_s_checkpoint_tells_the_path_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here, copy = write(tmp_path / "a" / "x.jsonl"), write(tmp_path / "b" / "x.jsonl")
    saved = {"model": "builtin", "dataset": "a/x.jsonl"}

    def check(dataset, **options):
        config = settings("builtin", dataset, tmp_path / "run", resume=True, **options)
        check_inputs(config, saved, None, fingerprints(config))

    check("a/x.jsonl")
    check(here)
    check("b/../a/x.jsonl")
    with pytest.raises(InputError, match=r"DATASET must be a/x.jsonl .*give --moved"):
        check(copy)
    check(copy, moved=True)


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl")

    def refused(path, *_args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(path), "open", refused)
    with pytest.raises(InputError, match=r"DATASET .*x.jsonl cannot be read: Permission denied"):
        fingerprints(settings("builtin", path, tmp_path / "run"))


def test_a_fingerprint_tells_the_first_and_the_last_byte_of_a_large_file(tmp_path):
    """Most of which is not read; one in the middle of what is not goes unnoticed."""
    size = 16 * 2**20
    for flip in (None, 0, size - 1, size // 2):
        with (tmp_path / "a.bin").open("wb") as file:
            file.truncate(size)
            if flip is not None:
                file.seek(flip)
                file.write(b"x")
        (tmp_path / f"{flip}").write_text(fingerprint(tmp_path / "a.bin"))
    marks = [(tmp_path / f"{flip}").read_text() for flip in (None, 0, size - 1)]
    assert len(set(marks)) == 3


@given(n=st.integers(0, 5000), at_most=st.integers(2, 64))
def test_samples_are_spread_from_the_first_to_the_last(n, at_most):
    chosen = sorted(_spread(n, at_most))
    assert len(chosen) == min(n, at_most)
    if n:
        assert (chosen[0], chosen[-1]) == (0, n - 1)
        steps = [b - a for a, b in pairwise(chosen)]
        assert not steps or max(steps) - min(steps) <= 1
