"""Documents that are lists: chats, and token ids."""

import copy
import json

import pytest
import transformers

from mlsae import builtin
from mlsae.data.config import DataConfig
from mlsae.data.documents import Documents

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
