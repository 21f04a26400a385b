"""From text to rows of tokens."""

import json
from itertools import islice

import pytest
import torch
import transformers

from mlsae import builtin
from mlsae.data.documents import Documents
from mlsae.data.tokens import Batches, Rows, not_special
from mlsae.errors import InputError


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(builtin.MODEL_DIR)


def write(path, texts):
    """Write the texts in the format of the path's suffix; a path without one becomes a folder with
    a .txt file per text."""
    records = [{"text": text, "id": i} for i, text in enumerate(texts)]
    lines = "\n".join(json.dumps(record) for record in records)
    if path.suffix == "":
        path.mkdir()
        for i, text in enumerate(texts):
            (path / f"{i:03}.txt").write_text(text)
    elif path.suffix == ".txt":
        path.write_text(texts[0])
    elif path.suffix == ".jsonl":
        path.write_text(lines)
    elif path.suffix == ".zst":
        import zstandard

        path.write_bytes(zstandard.compress(lines.encode()))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return str(path)


def test_batches_know_which_pass_they_end_in(tmp_path, tokenizer):
    """Counted by the rows yielded, not those read ahead; a resumed stream knows it too."""
    path = write(tmp_path / "a.jsonl", [f"x{i} = {i}\n" * 9 for i in range(50)])
    n = len(list(Rows(path, tokenizer, 8, "train")))

    def batches(state=None):
        return Batches(Rows(path, tokenizer, 8, "train", seed=0, endless=True), 4, state)

    whole = batches()
    assert whole.passes == 1
    expected = [-(-4 * (i + 1) // n) for i in range(3 * n // 4)]
    found, states = [], []
    for _ in expected:
        next(whole)
        found.append(whole.passes)
        states.append(through_json(whole.state_dict()))
    whole.close()
    assert found == expected
    for i in (0, n // 4 - 1, n // 4, len(states) - 2):
        resumed = batches(states[i])
        next(resumed)
        assert resumed.passes == expected[i + 1]
        resumed.close()


@pytest.mark.parametrize("name", ["folder", "a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_every_format_gives_the_same_documents(tmp_path, name):
    texts = ["def f():\n    return 1\n", "second, with ünïcode", "third\n\nparagraph"]
    assert list(Documents(write(tmp_path / name, texts), "train")) == texts


def test_a_text_file_is_one_document(tmp_path):
    assert list(Documents(write(tmp_path / "a.txt", ["one\ntwo\n"]), "train")) == ["one\ntwo\n"]


def test_rows_are_documents_joined_by_eos(tmp_path, tokenizer):
    """Held-out and train rows together are the whole packed text, in order and without overlap."""
    texts = [f"def function_{i}(argument):\n    return {i}\n" * (i % 5 + 1) for i in range(90)]
    path = write(tmp_path / "a.jsonl", texts)
    packed = []
    for text in texts:
        packed += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    train = list(Rows(path, tokenizer, 16, "train"))
    heldout = list(Rows(path, tokenizer, 16, "heldout"))
    assert len(heldout) == -(-(len(train) + len(heldout)) // 20)
    for i, row in enumerate(heldout):
        train.insert(i * 20, row)
    n = len(packed) // 16 * 16
    assert torch.equal(torch.cat(train), torch.tensor(packed[:n]))


def test_shuffling_is_a_seeded_permutation(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [f"x{i} = {i}\n" * 9 for i in range(50)])

    def order(seed, buffer_rows=10):
        rows = Rows(path, tokenizer, 8, "train", seed=seed, buffer_rows=buffer_rows)
        return [tuple(row.tolist()) for row in rows]

    plain = [tuple(row.tolist()) for row in Rows(path, tokenizer, 8, "train")]
    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != plain
    assert sorted(order(0)) == sorted(plain) == sorted(order(1, buffer_rows=10_000))


def test_batches_continue_past_the_end_in_another_order(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [f"x{i} = {i}\n" * 9 for i in range(50)])
    n = len(list(Rows(path, tokenizer, 8, "train")))
    batches = Batches(Rows(path, tokenizer, 8, "train", seed=0, endless=True), 4)
    rows = [tuple(row.tolist()) for row in torch.cat(list(islice(batches, n)))]
    batches.close()
    first, second = rows[:n], rows[n : 2 * n]
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("name", ["folder", "a.jsonl", "a.jsonl.zst", "a.parquet", builtin.NAME])
def test_a_resumed_stream_starts_with_the_next_row(tmp_path, tokenizer, name):
    """Resume from any point: while the buffer fills, between passes, with a batch prepared."""
    path, length, points = write_or_builtin(tmp_path, name)

    def batches(state=None):
        rows = Rows(path, tokenizer, length, "train", seed=3, buffer_rows=20, endless=True)
        return Batches(rows, 6, state)

    whole = batches()
    expected = list(islice(whole, 60))
    whole.close()
    for n in points:
        stopped = batches()
        assert all(map(torch.equal, expected, islice(stopped, n)))
        resumed = batches(through_json(stopped.state_dict()))
        stopped.close()
        assert all(map(torch.equal, expected[n:], islice(resumed, 60 - n)))
        resumed.close()


def write_or_builtin(folder, name):
    if name == builtin.NAME:
        return name, 512, [7]
    texts = [f"x{i} = {i}\n" * 9 for i in range(40)]
    return write(folder / name, texts), 8, [0, 1, 7, 31, 55]


def through_json(state):
    """The state as a checkpoint stores it: tensors as they are, all else as JSON."""
    if isinstance(state, dict):
        return {key: through_json(value) for key, value in state.items()}
    return state if isinstance(state, torch.Tensor) else json.loads(json.dumps(state))


def test_a_tokenizer_with_bos_begins_every_row_with_it(tmp_path, tokenizer):
    class WithBOS:
        bos_token_id, eos_token_id, all_special_ids = 1, 0, [0, 1]

        def __call__(self, text, add_special_tokens=True, verbose=True):
            if isinstance(text, str):
                return {"input_ids": [1, *range(2, 2 + len(text))]}
            return {"input_ids": [list(range(2, 2 + len(t))) for t in text]}

    path = write(tmp_path / "a.jsonl", ["abcdefgh"] * 9)
    rows = torch.stack(list(Rows(path, WithBOS(), 4, "train")))
    assert (rows[:, 0] == 1).all()
    assert (rows[:, 1:] != 1).all()
    assert torch.equal(not_special(rows, WithBOS()), rows > 1)


def test_the_builtin_corpus_is_split_by_file():
    train, heldout = set(builtin.corpus("train")), set(builtin.corpus("heldout"))
    assert not train & heldout
    assert len(train) > 300
    assert 0.05 < len(heldout) / (len(train) + len(heldout)) < 0.15


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: str(d / "missing.jsonl"), "DATASET must be 'builtin', .* cannot be loaded"),
        (lambda d: write(d / "a.txt", [""]), "is empty"),
        (lambda d: write(d / "a.jsonl", ["", ""]), "holds no text"),
        (lambda d: write(d / "a.jsonl", ["short"]), "is shorter than the 128 tokens .* --seq_len"),
        (lambda d: str(d), "has none of them"),
    ],
)
def test_bad_datasets_are_named(tmp_path, tokenizer, make, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=message):
        next(Rows(make(tmp_path), tokenizer, 64, "train"))


def test_the_error_for_a_missing_column_lists_the_columns(tmp_path):
    path = write(tmp_path / "a.parquet", ["one"])
    with pytest.raises(InputError, match=r"--column .* got 'body'; its columns of text are: text"):
        next(iter(Documents(path, "train", column="body")))


def test_a_folder_of_two_kinds_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", ["one"])
    write(tmp_path / "b.parquet", ["two"])
    with pytest.raises(InputError, match="json and parquet"):
        Documents(str(tmp_path), "train")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "whole"}\n{"text": "brok')
    with pytest.raises(InputError, match="cannot be read"):
        list(Documents(str(tmp_path / "a.jsonl"), "train"))
