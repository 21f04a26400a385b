"""Documents that are lists: chats, and token ids."""

import copy
import dataclasses
import json
from itertools import chain

import pytest
import torch
import transformers

from mlsae import builtin
from mlsae.data import heldout_split
from mlsae.data.config import DataConfig
from mlsae.data.documents import Documents
from mlsae.data.tokens import Rows

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(builtin.MODEL_DIR)


def with_template(tokenizer, template):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = template
    return chatty


def write_lists(path, lists):
    path.write_text("\n".join(json.dumps({"list": each}) for each in lists))
    return DataConfig(dataset=str(path), column="list", heldout_share=0.3)


def texts_of(config, tokenizer, split):
    """The pieces of a side, chats as text."""
    return [piece.text for piece in Documents(config, split, render(tokenizer))]


def render(tokenizer):
    return lambda messages: tokenizer.apply_chat_template(messages, tokenize=False)


def chat(i, words=1, **more):
    return [
        {"role": "user", "content": f"question {i} " * words, **more},
        {"role": "assistant", "content": f"answer {i} " * words},
    ]


def test_a_chat_is_on_the_same_side_whatever_the_template(tmp_path, tokenizer):
    config = write_lists(tmp_path / "a.jsonl", [chat(i) for i in range(60)])
    sides = [
        [
            [text.split()[2] for text in texts_of(config, with_template(tokenizer, each), split)]
            for split in ("train", "heldout")
        ]
        for each in (TEMPLATE, TEMPLATE.replace(": ", ":  "))
    ]
    assert sides[0] == sides[1]
    assert 0 < len(sides[0][1]) < 60
    assert sorted(sides[0][0] + sides[0][1], key=int) == [str(i) for i in range(60)]


def test_a_chat_s_side_follows_from_roles_and_contents_alone(tmp_path, tokenizer):
    """Parquet fills what some messages lack with nulls; dates and names are not what is learnt."""
    tokenizer = with_template(tokenizer, TEMPLATE)
    plain = write_lists(tmp_path / "a.jsonl", [chat(i) for i in range(60)])
    more = [chat(i, name=f"N{i}", tool_calls=None) for i in range(60)]
    reversed_keys = [[dict(reversed(m.items())) for m in messages] for messages in more]
    other = write_lists(tmp_path / "b.jsonl", reversed_keys)
    assert texts_of(plain, tokenizer, "heldout") == texts_of(other, tokenizer, "heldout")
    swapped = [[m | {"role": m["role"].upper()} for m in chat(i)] for i in range(60)]
    changed = write_lists(tmp_path / "c.jsonl", swapped)
    numbers = [
        [text.split()[2] for text in texts_of(config, tokenizer, "heldout")]
        for config in (plain, changed)
    ]
    assert numbers[0] != numbers[1]


def test_a_long_chat_is_whole_on_one_side(tmp_path, tokenizer):
    """And in pieces of bounded length, as a long text."""
    tokenizer = with_template(tokenizer, TEMPLATE)
    config = write_lists(tmp_path / "a.jsonl", [chat(i, words=10_000) for i in range(20)])
    sides = [texts_of(config, tokenizer, split) for split in ("train", "heldout")]
    assert all(sides)
    rendered = [render(tokenizer)(chat(i, words=10_000)) for i in range(20)]
    assert sorted(sides[0] + sides[1]) == sorted(rendered)


@pytest.mark.parametrize("content", ["\ud800", "refused"])
def test_a_chat_without_text_is_a_bad_record(tmp_path, tokenizer, content):
    refusing = "{% if 'refused' in messages[0].content %}{{ messages.x.y }}{% endif %}" + TEMPLATE
    lists = [*(chat(i) for i in range(200)), [{"role": "user", "content": content}]]
    config = write_lists(tmp_path / "a.jsonl", lists)
    tokenizer = with_template(tokenizer, refusing)
    for split in ("train", "heldout"):
        assert 0 < len(texts_of(config, tokenizer, split)) < 200
        documents = Documents(config, split, render(tokenizer))
        list(documents)
        assert documents._bad == 1


def ids_of(config, split):
    return [piece.text.tolist() for piece in Documents(config, split)]


def as_lists(pieces):
    return [(piece.text.tolist(), piece.ends) for piece in pieces]


def test_a_long_document_of_token_ids_has_both_sides_and_loses_none(tmp_path):
    ids = list(range(50_000))
    config = write_lists(tmp_path / "a.jsonl", [ids])
    sides = [ids_of(config, split) for split in ("train", "heldout")]
    assert all(sides)
    assert sorted(i for side in sides for piece in side for i in piece) == ids
    assert 0.1 < sum(map(len, sides[1])) / 50_000 < 0.5
    for side in sides:  # neighbors stay together: no piece begins where another of its side ends
        assert not {piece[0] for piece in side} & {piece[-1] + 1 for piece in side}
        assert all(piece == list(range(piece[0], piece[0] + len(piece))) for piece in side)


def test_the_side_of_token_ids_follows_from_their_segment_alone(tmp_path):
    ids = list(range(50_000))
    segments = [ids[start : start + 2048] for start in range(0, 50_000, 2048)]
    config = write_lists(tmp_path / "a.jsonl", [ids])
    alone = write_lists(tmp_path / "b.jsonl", segments)
    for split in ("train", "heldout"):
        joined, single = ids_of(config, split), ids_of(alone, split)
        assert list(chain(*joined)) == list(chain(*single))


def test_token_ids_come_in_pieces_of_bounded_length(tmp_path, monkeypatch):
    monkeypatch.setattr(heldout_split, "PIECE_CHARS", 5000)
    config = write_lists(tmp_path / "a.jsonl", [list(range(50_000))])
    config = dataclasses.replace(config, heldout_share=1e-9)
    found = list(Documents(config, "train"))
    assert max(len(piece.text) for piece in found) <= 5000
    assert [i for piece in found for i in piece.text] == list(range(50_000))
    assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]


def test_a_stream_resumes_within_a_long_document_of_token_ids(tmp_path):
    config = write_lists(tmp_path / "a.jsonl", [list(range(50_000)), [1, 2], list(range(9000))])
    whole = as_lists(Documents(config, "train"))
    assert len(whole) > 3
    for n in range(len(whole) + 1):
        stopped = Documents(config, "train")
        pieces = iter(stopped)
        assert as_lists(next(pieces) for _ in range(n)) == whole[:n]
        resumed = Documents(config, "train")
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        assert as_lists(resumed) == whole[n:]


def test_token_ids_that_end_with_eos_are_given_no_second_one(tmp_path, tokenizer):
    eos = tokenizer.eos_token_id
    documents = [[(7 * i + j) % 500 + 1 for j in range(i % 9)] + [eos] * (i % 2) for i in range(90)]
    documents.append([*([5] * 5000), eos])  # of several segments
    config = write_lists(tmp_path / "a.jsonl", documents)
    packed = [i for ids in documents if ids for i in (ids if ids[-1] == eos else [*ids, eos])]
    rows = Rows(dataclasses.replace(config, heldout_share=1e-9), tokenizer, 1, "train")
    assert torch.cat(list(rows)).tolist() == packed
