"""Documents, from whatever holds them."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from mlsae.data import documents
from mlsae.data.config import DataConfig
from mlsae.data.documents import Documents
from mlsae.errors import InputError
from tests.helpers.texts import write

TEXTS = ["def f():\n    return 1\n", "second, with ünïcode", "third\n\nparagraph"]


@pytest.fixture(autouse=True)
def forget():
    documents._log_once.cache_clear()


def read(dataset, split="train", **options):
    """The texts of a dataset, none of them held out."""
    config = DataConfig(dataset=str(dataset), heldout_share=1e-9, **options)
    return [piece.text for piece in Documents(config, split)]


def write_as(path, texts=TEXTS):
    """Write the texts in the format of the path's name, in the column "text"."""
    records = [{"text": text, "id": i} for i, text in enumerate(texts)]
    if path.name == "saved":
        datasets.Dataset.from_list(records).save_to_disk(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(records).to_csv(path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(records)
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        write(path, texts)
    return path


@pytest.mark.parametrize(
    "name",
    ["folder", "a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "a.arrow",
     "saved"],
)  # fmt: skip
def test_every_format_gives_the_same_documents_from_any_record_on(tmp_path, name):
    path = write_as(tmp_path / name)
    assert read(path) == TEXTS
    config = DataConfig(dataset=str(path), heldout_share=1e-9)
    for n in range(4):
        stopped = Documents(config, "train")
        pieces = iter(stopped)
        first = [next(pieces).text for _ in range(n)]
        resumed = Documents(config, "train")
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        assert first + [piece.text for piece in resumed] == TEXTS


def test_a_text_file_is_one_document(tmp_path):
    assert read(write(tmp_path / "a.txt", ["one\ntwo\n"])) == ["one\ntwo\n"]


@pytest.mark.parametrize("name", ["run[12]", "set?", "all*", "{a,b}", "a b", "x**y"])
def test_no_path_is_a_pattern(tmp_path, name):
    for folder in (name, "run1", "run2", "setX", "all of it", "a", "b", "xy"):
        if not (tmp_path / folder).exists():
            (tmp_path / folder).mkdir()
            text = "wanted" if folder == name else "other"
            write(tmp_path / folder / "a.jsonl", [text])
    assert read(tmp_path / name) == ["wanted"]


def test_hidden_and_temporary_files_are_not_read(tmp_path):
    write(tmp_path / "a.jsonl", ["wanted"])
    for folder in (".cache", "_temporary", "in/.hidden"):
        (tmp_path / folder).mkdir(parents=True)
        write(tmp_path / folder / "b.jsonl", ["not wanted"])
    write(tmp_path / ".c.jsonl", ["not wanted"])
    write(tmp_path / "~lock.jsonl", ["not wanted"])
    assert read(tmp_path) == ["wanted"]


@pytest.mark.parametrize(
    "values",
    [
        (None, {"s": 1}),
        ({"lang": "en", "n": 1}, {"lang": ["en"], "n": "1", "more": 2}),
        (1, "high"),
        ([1], [[{"a": None}]]),
    ],
)
def test_other_columns_may_be_anything(tmp_path, values):
    for name, value in zip("ab", values, strict=True):
        records = [{"text": f"{name}{i}", "meta": value} for i in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(records), _folder(tmp_path / "p") / f"{name}.parquet"
        )
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('\n{"extra": [], "text": "a2"}')
    assert read(tmp_path / "p") == ["a0", "a1", "b0", "b1"]
    for parquet in (tmp_path / "p").iterdir():
        parquet.unlink()
    assert read(tmp_path) == ["a0", "a1", "a2", "b0", "b1"]


def _folder(path):
    path.mkdir(exist_ok=True)
    return path


BAD = {
    "null": ('{"text": null}', "its 'text' is null"),
    "missing": ('{"body": "x"}', "it has no column 'text'"),
    "a number": ('{"text": 3}', "of type int"),
    "no object": ("[1, 2]", "not an object"),
    "cut off": ('{"text": "x', "not JSON"),
    "not UTF-8": (b'{"text": "\xff\xfe"}', "not UTF-8"),
    "lone surrogate": ('{"text": "\\ud800"}', "not UTF-8"),
    "a list of texts": ('{"text": ["x"]}', "neither of token ids nor of messages"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_skipped_counted_and_shown(tmp_path, name, capsys):
    line, reason = BAD[name]
    line = line if isinstance(line, bytes) else line.encode()
    good = [json.dumps({"text": f"text {i}"}).encode() for i in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*good[:100], line, *good[100:]]))
    assert read(path) == [f"text {i}" for i in range(200)]
    said = capsys.readouterr().err
    assert f"line 101 of {path}" in said
    assert reason in said
    assert "skipped 1 bad of 201 records" in said


def test_too_many_bad_records_end_the_run_with_the_first_ones_place(tmp_path):
    good, bad = json.dumps({"text": "x"}), json.dumps({"text": None})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([good] * 10 + [bad] * 2 + [good] * 10))
    with pytest.raises(InputError, match=r"2 bad records among the first 22, .*line 11 of .*--max"):
        read(path)
    assert len(read(path, max_bad_records=0.1)) == 20


def test_resume_passes_a_bad_record(tmp_path):
    lines = [json.dumps({"text": f"text {i}"}) for i in range(300)]
    lines.insert(150, "broken")
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    config = DataConfig(dataset=str(path), heldout_share=1e-9)
    for n in (149, 150, 151):
        stopped = Documents(config, "train")
        pieces = iter(stopped)
        before = [next(pieces).text for _ in range(n)]
        resumed = Documents(config, "train")
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        assert before + [p.text for p in resumed] == [f"text {i}" for i in range(300)]
        assert resumed._bad == 1


def test_the_error_for_a_missing_column_lists_the_columns(tmp_path):
    path = write(tmp_path / "a.parquet", ["one"])
    with pytest.raises(InputError, match=r"--column .* got 'body'; its columns of text are: text"):
        read(path, column="body")


def test_a_folder_of_two_kinds_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", ["one"])
    write(tmp_path / "b.parquet", ["two"])
    with pytest.raises(InputError, match="json and parquet"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.arrow"])
def test_a_damaged_file_is_named(tmp_path, name):
    path = write_as(tmp_path / name, [f"text {i}" for i in range(500)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"{name} cannot be read|bad records"):
        read(path)


def test_what_is_asked_of_the_hub_goes_there(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list([{"text": "x"}]).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    options = {"dataset_config": "en", "dataset_split": "validation", "dataset_revision": "v1"}
    assert read("allenai/c4-of-the-hub", **options) == ["x"]
    expected = {"split": "validation", "revision": "v1", "streaming": True}
    assert asked == [(("allenai/c4-of-the-hub", "en"), expected)]


def test_a_split_of_a_saved_dataset_is_read_or_named(tmp_path):
    splits = {
        name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "validation")
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == ["train"]
    assert read(tmp_path / "saved", dataset_split="validation") == ["validation"]
    with pytest.raises(InputError, match=r"must be a split of .*train, validation.* got 'test'"):
        read(tmp_path / "saved", dataset_split="test")
    with pytest.raises(InputError, match="--dataset_config is for datasets on the hub"):
        read(tmp_path / "saved", dataset_config="en")


@pytest.mark.parametrize("name", ["dataset_config", "dataset_split", "dataset_revision"])
@pytest.mark.parametrize("dataset", ["builtin", "a.txt", "a.jsonl", "folder", "saved"])
def test_settings_of_the_hub_are_refused_elsewhere(tmp_path, dataset, name):
    path = dataset if dataset == "builtin" else str(write_as(tmp_path / dataset))
    message = rf"--{name} is for .* {path} is .*, got validation; leave"
    with pytest.raises(InputError, match=message):
        read(path, **{name: "validation"})
    assert read(path, **{name: getattr(DataConfig(), name)})


def test_a_state_of_an_earlier_version_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", ["one"])
    old = Documents(DataConfig(dataset=path), "train")
    with pytest.raises(InputError, match="--resume needs a checkpoint of this version"):
        old.load_state_dict({"records": {}, "empty": False})
