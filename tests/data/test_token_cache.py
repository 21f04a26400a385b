"""Packed rows that are kept on disk are those of the text, whatever happens to the files."""

import copy
import json
import shutil
from contextlib import closing
from dataclasses import replace
from itertools import islice

import pytest
import torch
import transformers

from mlsae import builtin
from mlsae.data import cache_key, documents, token_cache
from mlsae.data.config import DataConfig
from mlsae.data.encoding import encoder
from mlsae.data.tokens import Batches, Rows
from mlsae.errors import InputError
from tests.helpers.texts import write

T = 8  # tokens of a row


@pytest.fixture(scope="module")
def plain():
    return transformers.AutoTokenizer.from_pretrained(builtin.MODEL_DIR)


@pytest.fixture
def tokenizer(plain):
    return copy.deepcopy(plain)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of little text, each of several blocks; and every line is said anew."""
    monkeypatch.setattr(token_cache, "_CHUNK_TOKENS", 200)
    monkeypatch.setattr("mlsae.data.packing._FIRST_CHARS", 100)
    monkeypatch.setattr("mlsae.data.packing.PIECE_CHARS", 300)
    for said in (token_cache._say_where, token_cache._say_off, documents._log_once):
        said.cache_clear()


@pytest.fixture
def config(tmp_path):
    path = write(tmp_path / "a.jsonl", [f"x{i} = {i}\n" * (i % 7 + 2) for i in range(60)])
    return DataConfig(dataset=path, token_cache=tmp_path / "cache")


def without(config):
    return replace(config, no_token_cache=True)


def read(config, tokenizer, n=None, split="train", **options):
    """Rows as lists, all or the first n."""
    with closing(Rows(config, tokenizer, T, split, **options)) as rows:
        return [row.tolist() for row in islice(rows, n)]


def chunks(config):
    return sorted(config.token_cache.glob("*/*.tokens"))


@pytest.fixture
def counted(monkeypatch):
    """The texts that are tokenized, as they are."""
    texts = []

    def counting(tokenizer):
        encode = encoder(tokenizer)
        return lambda batch: (texts.extend(batch), encode(batch))[1]

    monkeypatch.setattr("mlsae.data.packing.encoder", counting)
    return texts


def test_the_second_read_has_the_same_rows_and_tokenizes_nothing(config, tokenizer, counted):
    expected = read(without(config), tokenizer)
    assert read(config, tokenizer) == expected
    assert len(chunks(config)) > 3
    counted.clear()
    assert read(config, tokenizer) == expected
    shuffled = read(config, tokenizer, seed=3, buffer_rows=9)
    assert not counted
    assert shuffled == read(without(config), tokenizer, seed=3, buffer_rows=9) != expected


def test_the_second_pass_reads_what_the_first_has_written(config, tokenizer, counted):
    n = len(read(without(config), tokenizer))
    expected = read(without(config), tokenizer, 3 * n, seed=1, endless=True)
    counted.clear()
    assert read(config, tokenizer, 3 * n, seed=1, endless=True) == expected
    assert len(counted) <= 60


@pytest.mark.parametrize("n", [1, 7, 40, 100])
def test_a_part_is_read_and_gone_on_from(config, tokenizer, counted, n):
    expected = read(without(config), tokenizer)
    assert read(config, tokenizer, n) == expected[:n]
    before = len(counted)
    counted.clear()
    assert read(config, tokenizer, n) == expected[:n]
    assert not counted
    assert read(config, tokenizer) == expected
    assert 0 < len(counted) < before


def test_a_killed_writer_leaves_what_it_committed(config, tokenizer, counted):
    """A chunk without its .json does not count, nor does a .partial file."""
    expected = read(config, tokenizer)
    folder = chunks(config)[0].parent
    for path in sorted(folder.glob("*.json"))[2:-1]:
        path.unlink()
    (folder / "00002.json.partial").write_text("{")
    counted.clear()
    assert read(config, tokenizer) == expected
    assert 0 < len(counted) < 60
    counted.clear()
    assert read(config, tokenizer) == expected
    assert not counted


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: path.write_bytes(path.read_bytes()[:-2]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
)
@pytest.mark.parametrize("number", [0, 2])
def test_a_damaged_entry_is_told_and_made_anew(config, tokenizer, counted, capsys, damage, number):
    expected = read(config, tokenizer)
    damage(chunks(config)[number])
    assert read(config, tokenizer) == expected
    assert capsys.readouterr().err.count("is damaged") == 1
    counted.clear()
    assert read(config, tokenizer) == expected
    assert not counted


def test_two_at_once_read_the_same_and_one_writes(config, tokenizer, counted):
    expected = read(without(config), tokenizer)
    one, two = (iter(Rows(config, tokenizer, T, "train")) for _ in range(2))
    found = [[], []]
    for pair in zip(one, two, strict=True):
        for rows, row in zip(found, pair, strict=True):
            rows.append(row.tolist())
    assert found == [expected, expected]
    counted.clear()
    assert read(config, tokenizer) == expected
    assert not counted


def keys(config, tokenizer, seq_len=T, split="train"):
    return cache_key.open_entry(config, tokenizer, seq_len, split).folder.name


def test_whatever_decides_the_rows_decides_the_entry(config, tokenizer, tmp_path, monkeypatch):
    same = keys(config, tokenizer)
    assert same == keys(config, copy.deepcopy(tokenizer))
    assert same == keys(replace(config, layers=(1,), token_cache=tmp_path / "b"), tokenizer)
    found = [same, keys(config, tokenizer, T + 1), keys(config, tokenizer, split="heldout")]
    for change in ({"heldout_share": 0.1}, {"column": "body"}, {"max_bad_records": 0.5}):
        found.append(keys(replace(config, **change), tokenizer))

    def changed(**attributes):
        other = copy.deepcopy(tokenizer)
        for name, value in attributes.items():
            setattr(other, name, value)
        return other

    added = changed()
    added.add_tokens(["function"])
    eos = changed(eos_token=tokenizer.convert_ids_to_tokens(5))
    for other in (added, eos, changed(chat_template="{{ messages }}")):
        found.append(keys(config, other))
    monkeypatch.setattr(cache_key, "_FORMAT", 2)
    found.append(keys(config, tokenizer))
    monkeypatch.undo()
    write(tmp_path / "a.jsonl", ["y"] * 60)
    found.append(keys(config, tokenizer))
    found.append(keys(replace(config, dataset=builtin.NAME), tokenizer))
    assert len(set(found)) == len(found)


def test_a_dataset_on_the_hub_is_kept_by_its_commit(config, tokenizer, monkeypatch):
    commits = {None: "a" * 40, "v1": "b" * 40}
    monkeypatch.setattr(cache_key, "_commit", lambda _, revision: commits.get(revision))
    found = []
    for revision in (None, "v1"):
        for more in ({}, {"dataset_config": "en"}, {"dataset_split": "validation"}):
            hub = replace(config, dataset="user/none", dataset_revision=revision, **more)
            found.append(keys(cache_key.pinned(hub), tokenizer))
    assert len(set(found)) == len(found)
    unknown = cache_key.pinned(replace(config, dataset="user/none", dataset_revision="v2"))
    assert cache_key.open_entry(unknown, tokenizer, T, "train") is None


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_entries_not_used_for_longest_make_room(config, tokenizer, capsys, monkeypatch):
    def of(share):
        return replace(config, heldout_share=share)

    read(of(0.1), tokenizer)
    one = size_of(config.token_cache)
    monkeypatch.setattr(token_cache, "MOST_BYTES", int(2.5 * one))
    read(of(0.2), tokenizer)
    read(of(0.1), tokenizer)  # used again, and so younger than the other
    read(of(0.3), tokenizer)
    said = capsys.readouterr().err
    assert said.count("is removed") == 1
    kept = {path.name for path in config.token_cache.iterdir()}
    assert kept == {keys(of(0.1), tokenizer), keys(of(0.3), tokenizer)}
    assert size_of(config.token_cache) <= 2.5 * one


def test_a_text_larger_than_the_cache_is_kept_in_part(config, tokenizer, capsys, monkeypatch):
    expected = read(without(config), tokenizer)
    monkeypatch.setattr(token_cache, "MOST_BYTES", 2500)
    assert read(config, tokenizer) == expected
    assert read(config, tokenizer) == expected
    assert "this text needs more" in capsys.readouterr().err
    assert chunks(config)


@pytest.mark.parametrize("why", ["a file", "full"])
def test_a_cache_that_cannot_be_written_is_said_and_gone_without(
    config, tokenizer, tmp_path, capsys, monkeypatch, why
):
    if why == "a file":
        (tmp_path / "cache").write_text("")
    else:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert read(config, tokenizer) == read(without(config), tokenizer)
    assert capsys.readouterr().err.count("goes on without") == 1


def test_bad_records_are_told_and_end_the_run_as_without(tmp_path, tokenizer, capsys):
    lines = [json.dumps({"text": f"x{i} = {i}\n" * 5}) for i in range(60)]
    lines[40] = "broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = DataConfig(str(tmp_path), str(tmp_path / "a.jsonl"), token_cache=tmp_path / "cache")

    def said(config):
        documents._log_once.cache_clear()
        read(config, tokenizer)
        return [line for line in capsys.readouterr().err.splitlines() if "token cache" not in line]

    lenient = replace(config, max_bad_records=0.1)
    expected = said(without(lenient))
    assert len(expected) == 2
    assert said(lenient) == said(lenient) == expected
    for _ in range(2):
        with pytest.raises(InputError, match=r"1 bad records among the first 60, .* line 41 of"):
            read(config, tokenizer)


@pytest.mark.parametrize("points", [(0, 1), (7, 3), (31, 70), (55, 100)])
@pytest.mark.parametrize("first", ["with", "without", "gone"])
def test_a_run_resumes_across_the_cache(config, tokenizer, first, points):
    """Stopped with a cache and resumed without, the other way round, with one that was removed
    meanwhile, and with one that is a part of the text."""
    n, cached = points
    read(config, tokenizer, cached)
    stopped_by, resumed_by = {
        "with": (config, without(config)),
        "without": (without(config), config),
        "gone": (config, config),
    }[first]

    def batches(config, state=None):
        rows = Rows(config, tokenizer, T, "train", seed=3, buffer_rows=20, endless=True)
        return Batches(rows, 6, state)

    with closing(batches(without(config))) as whole:
        expected = list(islice(whole, 80))
    stopped = batches(stopped_by)
    assert all(map(torch.equal, expected, islice(stopped, n)))
    state = stopped.state_dict()
    stopped.close()
    if first == "gone":
        shutil.rmtree(config.token_cache)
    with closing(batches(resumed_by, state)) as resumed:
        assert all(map(torch.equal, expected[n:], islice(resumed, 80 - n)))
    assert read(config, tokenizer) == read(without(config), tokenizer)
