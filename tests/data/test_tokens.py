"""From text to rows of tokens."""

import copy
import hashlib
import json
import tempfile
from itertools import islice
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsae import builtin
from mlsae.data import heldout_split, tokens
from mlsae.data.config import DataConfig
from mlsae.data.tokens import Batches, not_special
from mlsae.errors import InputError
from tests.helpers.texts import write


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(builtin.MODEL_DIR)


def rows_of(dataset, tokenizer, seq_len, split, share=0.05, column="text", **options):
    config = DataConfig(dataset=str(dataset), heldout_share=share, column=column)
    return tokens.Rows(config, tokenizer, seq_len, split, **options)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rows_are_the_documents_of_a_side_joined_by_eos(tmp_path, tokenizer, split):
    """In order and without overlap; which documents, the hash of their text says."""
    texts = [f"def function_{i}(argument):\n    return {i}\n" * (i % 5 + 1) for i in range(90)]
    path = write(tmp_path / "a.jsonl", texts)

    def heldout(text):
        digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
        return int.from_bytes(digest) / 2**48 < 0.3

    own = [text for text in texts if heldout(text) == (split == "heldout")]
    assert 0 < len(own) < 90
    packed = []
    for text in own:
        packed += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    rows = torch.cat(list(rows_of(path, tokenizer, 16, split, share=0.3)))
    assert torch.equal(rows, torch.tensor(packed[: len(packed) // 16 * 16]))


class Numbered:
    """A tokenizer whose tokens are the words of the text, which are numbers."""

    bos_token_id, eos_token_id, all_special_ids = None, 0, [0]

    def __call__(self, text, **_):
        if isinstance(text, str):
            return {"input_ids": []}
        return {"input_ids": [[int(word) for word in t.split()] for t in text]}


def numbered(path, documents, words):
    """Documents whose every word is another number, from 1 on."""
    texts = [" ".join(str(1 + d * words + i) for i in range(words)) for d in range(documents)]
    return write(path, texts)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(5, 70), min_size=2, max_size=4, unique=True))
def test_no_row_length_reads_as_held_out_what_another_trains_on(lengths):
    with tempfile.TemporaryDirectory() as folder:
        path = numbered(Path(folder) / "a.jsonl", documents=60, words=80)

        def seen(length, split):
            rows = rows_of(path, Numbered(), length, split, share=0.2)
            return {token for row in rows for token in row.tolist()} - {0}

        trained = set().union(*(seen(length, "train") for length in lengths))
        held_out = set().union(*(seen(length, "heldout") for length in lengths))
        assert trained
        assert held_out
        assert not trained & held_out


def test_one_long_document_has_text_of_both_sides_and_loses_none(tmp_path):
    path = numbered(tmp_path / "a.txt", documents=1, words=100_000)
    sides = [
        [token for row in rows_of(path, Numbered(), 1, split, share=0.2) for token in row.tolist()]
        for split in ("train", "heldout")
    ]
    trained, held_out = ([token for token in side if token] for side in sides)
    assert sorted(trained + held_out) == list(range(1, 100_001))
    assert 0.1 < len(held_out) / 100_000 < 0.3


def test_a_document_longer_than_a_piece_keeps_its_words(tmp_path, monkeypatch):
    """It is tokenized a piece at a time, which ends before white space."""
    monkeypatch.setattr(heldout_split, "PIECE_CHARS", 20_000)
    path = numbered(tmp_path / "a.txt", documents=1, words=20_000)
    counted = []

    class Counting(Numbered):
        def __call__(self, text, **_):
            counted.extend([] if isinstance(text, str) else map(len, text))
            return super().__call__(text)

    rows = rows_of(path, Counting(), 1, "train", share=0.001)
    assert [t for row in rows for t in row.tolist() if t] == list(range(1, 20_001))
    assert max(counted) <= 20_000 < sum(counted)


def test_a_few_held_out_rows_cost_a_few_rows(tmp_path):
    path = numbered(tmp_path / "a.jsonl", documents=3000, words=100)
    counted = []

    class Counting(Numbered):
        def __call__(self, text, **_):
            out = super().__call__(text)
            counted.extend(map(len, out["input_ids"]))
            return out

    assert len(list(islice(rows_of(path, Counting(), 16, "heldout"), 16))) == 16
    assert sum(counted) < 20 * 16 * 16


def test_rows_of_token_ids_are_packed_and_checked(tmp_path, tokenizer):
    documents = [[i + 2 for i in range(d % 7 + 1)] for d in range(40)]
    lines = [json.dumps({"input_ids": ids}) for ids in documents]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows = {
        split: torch.cat(
            list(rows_of(tmp_path / "a.jsonl", tokenizer, 1, split, 0.3, "input_ids"))
        ).tolist()
        for split in ("train", "heldout")
    }
    eos = tokenizer.eos_token_id
    packed = sum(len(ids) + 1 for ids in documents)
    assert len(rows["train"]) + len(rows["heldout"]) == packed
    assert rows["train"].count(eos) + rows["heldout"].count(eos) >= 40
    (tmp_path / "b.jsonl").write_text(json.dumps({"input_ids": [1, len(tokenizer)]}))
    with pytest.raises(InputError, match=r"--column input_ids must hold token ids .* got "):
        next(rows_of(tmp_path / "b.jsonl", tokenizer, 1, "train", 0.001, "input_ids"))


def test_chats_go_through_the_chat_template(tmp_path, tokenizer):
    chats = [
        [{"role": "user", "content": f"x{i}"}, {"role": "assistant", "content": f"y{i}"}]
        for i in range(30)
    ]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    dataset = tmp_path / "a.jsonl"
    with pytest.raises(InputError, match="has no chat template"):
        next(rows_of(dataset, tokenizer, 4, "train", column="messages"))
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    ids = torch.cat(list(rows_of(dataset, chatty, 1, "train", 0.001, "messages"))).tolist()
    text = "".join(f"user: x{i}\nassistant: y{i}\n" for i in range(30))
    assert chatty.decode(ids, skip_special_tokens=True) == text


def test_passes_are_counted(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [f"x{i} = {i}\n" * 9 for i in range(50)])
    n = len(list(rows_of(path, tokenizer, 8, "train")))
    batches = Batches(rows_of(path, tokenizer, 8, "train", seed=0, endless=True), n)
    passes = [(next(batches), batches.passes)[1] for _ in range(3)]
    state = batches.state_dict()
    batches.close()
    assert passes == [1, 2, 3]
    resumed = Batches(rows_of(path, tokenizer, 8, "train", seed=0, endless=True), n, state)
    assert resumed.passes == 3
    assert (next(resumed), resumed.passes)[1] == 4
    resumed.close()


def test_shuffling_is_a_seeded_permutation(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [f"x{i} = {i}\n" * 9 for i in range(50)])

    def order(seed, buffer_rows=10):
        rows = rows_of(path, tokenizer, 8, "train", seed=seed, buffer_rows=buffer_rows)
        return [tuple(row.tolist()) for row in rows]

    plain = [tuple(row.tolist()) for row in rows_of(path, tokenizer, 8, "train")]
    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != plain
    assert sorted(order(0)) == sorted(plain) == sorted(order(1, buffer_rows=10_000))


def test_batches_continue_past_the_end_in_another_order(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [f"x{i} = {i}\n" * 9 for i in range(50)])
    n = len(list(rows_of(path, tokenizer, 8, "train")))
    batches = Batches(rows_of(path, tokenizer, 8, "train", seed=0, endless=True), 4)
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
        rows = rows_of(path, tokenizer, length, "train", seed=3, buffer_rows=20, endless=True)
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
    rows = torch.stack(list(rows_of(path, WithBOS(), 4, "train")))
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
        (lambda d: write(d / "a.jsonl", ["short"]), "is too short: its train text .* --seq_len"),
        (lambda d: str(d), "has none of them"),
    ],
)
def test_bad_datasets_are_named(tmp_path, tokenizer, make, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=message):
        next(rows_of(make(tmp_path), tokenizer, 64, "train"))
