"""Which tokens are dropped: the rule, its detection, and the stream that follows it.

Legend: L layers, B rows, T positions, N tokens.
"""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mlsae.builtin import MODEL_DIR
from mlsae.data.config import DataConfig
from mlsae.data.sinks import DropRule, describe_top_share, resolve_norm
from mlsae.data.stream import DataStream, read_shape
from mlsae.data.tokens import not_special
from mlsae.errors import InputError
from mlsae.metrics import top_share
from tests.helpers.models import save_gpt2

T = 64


@pytest.fixture(scope="module")
def massive_model(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("massive"), massive=50)


def stream_of(model, micro_rows=4, **options):
    config = DataConfig(model, "builtin", **options)
    return DataStream(config, read_shape(config), torch.device("cpu"), micro_rows=micro_rows)


@given(st.integers(1, 3), st.integers(1, 60), st.floats(1.5, 30), st.integers(0, 2**32))
def test_a_token_is_dropped_if_it_is_massive_at_any_layer(n_layers, n_tokens, ratio, seed):
    generator = torch.Generator().manual_seed(seed)
    norms = torch.rand(n_layers, n_tokens, generator=generator).pow(-2)  # heavy tails
    rule, massive = resolve_norm(DropRule(), ratio, norms)
    for n in range(n_tokens):
        # torch's median is the lower of the middle two
        medians = [sorted(row)[(n_tokens - 1) // 2] for row in norms.tolist()]
        is_massive = any(
            norms[layer, n] > torch.tensor(ratio * medians[layer]) for layer in range(n_layers)
        )
        assert massive.token[n] == is_massive
        assert rule.keeps_norms(norms)[n] != is_massive
    again = DropRule.from_dict(json.loads(json.dumps(rule.as_dict())))
    assert again == rule, "a saved rule is the same rule, bit for bit"


def test_auto_drops_only_if_there_is_something():
    plain = torch.rand(2, 100) + 1
    sunk = plain.clone()
    sunk[1, 7] = 100
    assert resolve_norm(DropRule(), "auto", plain)[0] == DropRule()
    rule, massive = resolve_norm(DropRule(), "auto", sunk)
    assert rule.norm == 10
    assert massive.token.nonzero().flatten().tolist() == [7]
    assert massive.times[7] == pytest.approx(100 / sunk[1].median().item())
    rule, massive = resolve_norm(DropRule((0,)), "off", sunk)
    assert rule == DropRule((0,))
    assert massive.token.any(), "so that it can be told"


def test_norms_that_are_not_finite_or_have_no_median_are_kept():
    """Training stops at the first with a message of its own; and of zeros nothing is a multiple."""
    norms = torch.ones(2, 9)
    norms[0, 1], norms[0, 2] = torch.inf, torch.nan
    norms[1, :5] = 0
    norms[0, 3] = 50
    rule = DropRule(norm=10, medians=(1.0, 0.0))
    assert (~rule.keeps_norms(norms)).nonzero().flatten().tolist() == [3]


def test_positions_and_tokens_are_dropped_by_name(massive_model):
    stream = stream_of(massive_model, drop_positions=(2, 0), drop_tokens=("17", " self"))
    self_id = stream.tokenizer(" self")["input_ids"]
    assert stream.drop == DropRule((0, 2), (17, *self_id))
    ids = stream.heldout(16 * T)
    expected = not_special(ids, stream.tokenizer)
    expected[:, [0, 2]] = False
    expected &= (ids != 17) & (ids != self_id[0])
    assert torch.equal(stream.token_mask(ids), expected)
    assert stream.count(ids) == expected.sum()
    read = torch.cat(list(stream.residuals(ids)), 1)
    assert torch.equal(read, stream.reader(ids)[:, expected])


def test_what_cannot_be_dropped_is_named(massive_model):
    for options, message in (
        ({"drop_positions": (64,)}, r"--drop_positions must be in \[0, 63\].* got 64"),
        ({"drop_positions": (-1,)}, r"--drop_positions must be in \[0, 63\].* got -1"),
        ({"drop_tokens": ("999999",)}, r"--drop_tokens must be in \[0, .* got 999999"),
        ({"drop_tokens": ("two words",)}, r"one token each, and 'two words' has \d+ \(ids \d+"),
        ({"drop_tokens": ("",)}, r"one token each, and '' has 0 \(ids none\)"),
    ):
        with pytest.raises(InputError, match=message):
            stream_of(massive_model, **options)
    stream = stream_of(massive_model, drop_positions=tuple(range(T)))
    with pytest.raises(InputError, match=r"must leave tokens.*drop all of the first 2 rows"):
        stream.resolve_drop(stream.heldout(2 * T))


@pytest.mark.parametrize("micro_rows", [1, 5])
def test_a_massive_first_position_is_found_and_dropped(massive_model, micro_rows):
    stream = stream_of(massive_model, micro_rows)
    ids = stream.heldout(16 * T)
    not_first = not_special(ids, stream.tokenizer)
    n_first = int(not_first[:, 0].sum())
    n_all = int(not_first.sum())
    not_first[:, 0] = False
    line = stream.resolve_drop(ids)
    assert line.startswith(f"{n_first} of {n_all:,} tokens have a norm above 10 ×")
    assert f"position 0 ({n_first} of {n_first})" in line
    assert "elsewhere" not in line
    times = float(re.search(r"up to ([\d,]+) ×", line)[1])
    assert 30 < times < 80
    assert "--drop_norm off" in line
    assert torch.equal(stream.token_mask(ids), not_first)
    # Known before the model runs: what is dropped by norm counts.
    assert stream.count(ids) == n_all
    x = torch.cat(list(stream.residuals(ids)), 1)
    assert torch.equal(x, stream.reader(ids)[:, not_first])
    kept, dropped = (torch.cat(x, 1) for x in zip(*stream.kept_and_dropped(ids), strict=True))
    assert torch.equal(kept, x)
    assert dropped.shape[1] == n_first
    assert dropped.norm(dim=-1).min() > 10 * kept.norm(dim=-1).median()


def test_other_ways_to_leave_it_out(massive_model):
    stream = stream_of(massive_model, drop_positions=(0,))
    assert stream.resolve_drop(stream.heldout(8 * T)) == "", "nothing massive is left"
    assert stream.drop == DropRule((0,))
    stream = stream_of(massive_model, drop_norm="off")
    line = stream.resolve_drop(stream.heldout(8 * T))
    assert "kept" in line
    assert "--drop_norm 10" in line
    assert stream.drop == DropRule()


def test_a_massive_token_is_named(tmp_path):
    token = AutoTokenizer.from_pretrained(MODEL_DIR)(" self")["input_ids"][0]
    stream = stream_of(save_gpt2(tmp_path, massive=50, token=token))
    ids = stream.heldout(64 * T)
    count = int((ids == token).sum())
    assert count > 2, "the token must be in the text"
    line = stream.resolve_drop(ids)
    assert f"token {token} {stream.tokenizer.decode([token])!r} ({count} of {count})" in line
    assert "position" not in line
    line = stream_of(stream.config.model).resolve_drop(ids[(ids == token).sum(1) == 1][:1])
    where = f"token {token} ' self' at position"
    assert f": 1 elsewhere, the longest {where}" in line, "once is too seldom to tell why"
    mask = not_special(ids, stream.tokenizer) & (ids != token)
    assert torch.equal(stream.token_mask(ids), mask)


def test_nothing_is_massive_in_the_built_in_model():
    stream = stream_of("builtin", seq_len=T)
    assert stream.resolve_drop(stream.heldout(32 * T)) == ""
    assert stream.drop == DropRule()


def test_few_vectors_that_make_up_the_variance_are_told():
    sq_deviation = torch.ones(2, 1000)
    assert top_share(sq_deviation).tolist() == [0.01, 0.01]
    assert describe_top_share([0.01, 0.01], (3, 5)) == ""
    sq_deviation[1, :10] = 991  # 1 %
    share = top_share(sq_deviation)
    assert share[1].item() == pytest.approx(9910 / 10900)
    assert "carry 91% of the variance at layer 5" in describe_top_share(share.tolist(), (3, 5))
    assert top_share(torch.ones(2, 99)).tolist() == [0, 0], "too few to tell"


@pytest.mark.parametrize("saved", [[1, 1], {"norm": "10"}, {"medians": 3}, {"tokens": ["a"]}])
def test_a_damaged_rule_is_refused(saved):
    with pytest.raises(InputError, match="dropped must hold lists of numbers"):
        DropRule.from_dict(saved)
