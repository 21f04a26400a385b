"""The built-in model predicts its text, as well as its model card says."""

import re

import numpy as np
import pytest
import torch
import transformers

from mlsae import builtin
from mlsae.builtin.scoring import bigram_loss, heldout_loss, tokenize


@pytest.fixture(scope="module")
def card():
    text = (builtin.MODEL_DIR / "README.md").read_text()
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", text, flags=re.MULTILINE))
    return {name: float(rows[name].split()[0]) for name in rows if "nats" in rows[name]}


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(builtin.MODEL_DIR, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokens():
    """The tokens of the training files, and of every third held-out file."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(builtin.MODEL_DIR)
    heldout = list(builtin.corpus("heldout"))[::3]
    return tokenize(tokenizer, builtin.corpus("train")), tokenize(tokenizer, heldout)


def test_it_predicts_heldout_text_far_better_than_a_bigram(card, model, tokens):
    train, heldout = tokens
    loss = heldout_loss(model, heldout)
    bigram = bigram_loss(train, heldout, model.config.vocab_size)
    assert card["held-out loss"] <= 3.4
    assert loss <= 3.4
    assert loss < bigram - 0.8
    # A third of the files, or another Python's library, differ a little from the card's text.
    assert loss == pytest.approx(card["held-out loss"], abs=0.25)
    assert bigram == pytest.approx(card["interpolated bigram, same tokens"], abs=0.25)


def test_the_bigram_is_a_distribution():
    """The probabilities of all continuations of a token, seen or not, sum to 1."""
    train = np.array([0, 1, 2, 0, 1, 1, 3, 0], dtype=np.uint16)
    for first in range(5):  # 4 is never seen
        pairs = [np.array([first, second], dtype=np.uint16) for second in range(5)]
        total = sum(np.exp(-bigram_loss(train, pair, 5)) for pair in pairs)
        assert total == pytest.approx(1.0)


def test_it_is_small_and_its_tokenizer_is_lossless():
    files = list(builtin.MODEL_DIR.iterdir())
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    tokenizer = transformers.AutoTokenizer.from_pretrained(builtin.MODEL_DIR)
    assert len(tokenizer) == 4096
    text = next(builtin.corpus("heldout")) + "naïve → 𝛼\t\x00"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
