"""Which positions are edited: in generation, with and without a cache, and beside padding.

Legend: B rows, T positions.
"""

import inspect

import pytest
import torch
import transformers

from mlsae.data.residuals import ResidualReader
from mlsae.errors import InputError
from mlsae.intervention import Edit, Replace, intervene
from mlsae.intervention.positions import locate, parse_where, select
from tests.helpers.models import make
from tests.intervention.test_intervene import FAMILIES, FIRST, IDS, LLAMA, MLSAE_, SECOND, B, T

WHERE = ["all", "prompt", "last", "generated", (1, 10), (-2,), slice(2, -1), slice(-3, None, 2)]
NEW = 6


def chosen(where, mask, n_new=None, prompt=None):
    mask = torch.tensor(mask, dtype=torch.bool)
    width = mask.shape[1]
    return select(where, locate(mask, n_new or width, prompt or width)).int().tolist()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("all", [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
        ("prompt", [[0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]]),
        ("last", [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0]]),
        ("generated", [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]]),
        ((0, 3), [[0, 0, 1, 0, 0, 1], [1, 0, 0, 1, 0, 0]]),
        ((-2,), [[0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]]),
        ((-4,), [[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]),
        (slice(1, 3), [[0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0]]),
        (slice(-1, None), [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]]),
        (slice(None, -1), [[0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]]),
        (slice(0, None, 2), [[0, 0, 1, 0, 1, 0], [1, 0, 1, 0, 1, 0]]),
    ],
)
def test_positions_count_from_the_first_token(where, expected):
    """Two rows of which one is padded; four columns are the prompt."""
    mask = [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert chosen(where, mask, prompt=4) == expected
    for n_new in (1, 3):
        assert chosen(where, mask, n_new, prompt=4) == [row[-n_new:] for row in expected]


def edited(model, where, **options):
    edits = [
        Edit(FIRST, (0, 2), "clamp", 4.0, positions=where),
        Edit(SECOND, (1,), "add", 2.0, positions=where),
    ]
    with intervene(model, MLSAE_, edits):
        return model.generate(
            max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_same_with_and_without_a_cache(family):
    model = make(FAMILIES[family])
    for where in ("all", "last", (1, 10)):
        cached, plain = (
            edited(model, where, inputs=IDS, use_cache=use_cache) for use_cache in (True, False)
        )
        assert torch.equal(cached.sequences, plain.sequences)
        torch.testing.assert_close(
            torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("where", WHERE, ids=str)
def test_generation_is_that_of_whole_rows_edited_by_hand(where):
    """Each token comes from a pass over all before it, with hand-made edits where they belong."""
    ids = IDS
    for _ in range(NEW):
        mask = select(where, locate(torch.ones_like(ids).bool(), ids.shape[1], T))
        here = tuple(mask[0].nonzero()[:, 0].tolist())
        logits = LLAMA(input_ids=ids).logits
        if here:
            edits = [Edit(FIRST, (0, 2), "clamp", 4.0, here), Edit(SECOND, (1,), "add", 2.0, here)]
            with intervene(LLAMA, MLSAE_, edits):
                logits = LLAMA(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(edited(LLAMA, where, inputs=IDS).sequences, ids)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "jamba"])
@pytest.mark.parametrize("where", ["all", "last", (1,), slice(-2, None)], ids=str)
def test_a_row_that_is_padded_at_the_left_is_edited_as_alone(family, where):
    model = make(FAMILIES[family])
    pad = 3
    ids = IDS.clone()
    ids[1, :pad] = 0
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    both = edited(model, where, inputs=ids, attention_mask=mask)
    for row, length in ((0, T), (1, T - pad)):
        alone = edited(model, where, inputs=IDS[row : row + 1, T - length :])
        own = torch.stack(both.logits)[:, row]
        torch.testing.assert_close(own, torch.stack(alone.logits)[:, 0], rtol=1e-3, atol=1e-3)


def test_the_last_position_is_the_only_one_that_changes():
    reader = ResidualReader(LLAMA)
    before = reader(IDS)
    with intervene(LLAMA, MLSAE_, [Edit(FIRST, (1,), "add", 3.0, positions="last")]):
        after = reader(IDS)
    assert torch.equal(after[:, :, :-1], before[:, :, :-1])
    assert (after[1:, :, -1] != before[1:, :, -1]).any(-1).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_a_loop_over_a_cache_by_hand_follows_the_positions(family):
    model = make(FAMILIES[family])
    edits = [Edit(FIRST, (0, 1), "add", 3.0, positions=(2, T - 1, T + 1))]
    longer = torch.cat([IDS, IDS[:, :2]], 1)
    with intervene(model, MLSAE_, edits):
        whole = model(input_ids=longer, use_cache=False).logits
        given = inspect.signature(model.forward).parameters  # "cache" since transformers 5.24
        name = next(n for n in ("cache", "cache_params", "past_key_values") if n in given)
        output = model(input_ids=IDS, use_cache=True)
        parts = [output.logits]
        for i in range(2):
            cache = {name: getattr(output, name)}
            output = model(input_ids=longer[:, T + i : T + i + 1], use_cache=True, **cache)
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-3)


def test_a_static_cache_chunks_of_the_prompt_and_beams_change_nothing():
    expected = edited(LLAMA, (1, T + 1), inputs=IDS).sequences
    for options in ({"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        assert torch.equal(edited(LLAMA, (1, T + 1), inputs=IDS, **options).sequences, expected)
    where = "generated"
    beams = [
        edited(LLAMA, where, inputs=IDS, num_beams=3, use_cache=cache).sequences
        for cache in (True, False)
    ]
    assert torch.equal(*beams)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}])
@pytest.mark.parametrize("where", ["all", "generated", (T + 1,)], ids=str)
def test_tokens_that_are_drafted_are_edited_where_they_stay(options, where):
    """Several are tried in one pass, and the cache is cut where they are refused."""
    expected = edited(LLAMA, where, inputs=IDS[:1])
    found = edited(LLAMA, where, inputs=IDS[:1], **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-3, atol=1e-3
    )


def test_embeddings_in_the_place_of_ids():
    embeddings = LLAMA.get_input_embeddings()(IDS)
    expected = edited(LLAMA, "generated", inputs=IDS).sequences[:, T:]
    found = edited(LLAMA, "generated", inputs_embeds=embeddings).sequences
    assert torch.equal(found[:, -NEW:], expected)


def test_nested_contexts_generate_alike_with_and_without_a_cache():
    outer = [Edit(FIRST, (0,), "add", 2.0, positions="generated")]
    inner = [Replace((1,), positions="last"), Edit(SECOND, (2,), "clamp", 2.0)]
    with intervene(LLAMA, MLSAE_, outer), intervene(LLAMA, MLSAE_, inner):
        results = [
            LLAMA.generate(IDS, max_new_tokens=NEW, do_sample=False, use_cache=use, pad_token_id=0)
            for use in (True, False)
        ]
    assert torch.equal(*results)


def test_positions_are_parsed():
    assert parse_where("last") == "last"
    assert parse_where("-1") == (-1,)
    assert parse_where("1,4") == (1, 4)
    assert parse_where("1:") == slice(1, None)
    for text in ("end", "1:2:3:4", "1.5", ""):
        with pytest.raises(InputError, match="positions must be all, prompt, last, generated"):
            parse_where(text)


def test_generate_keeps_its_signature():
    with intervene(LLAMA, MLSAE_, [Replace()]):
        options = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert LLAMA.generate(IDS, options).shape == (B, T + 2)
        assert LLAMA.generate(inputs=IDS, generation_config=options).shape == (B, T + 2)
        with pytest.raises(ValueError, match="not used by the model"):
            LLAMA.generate(IDS, options, nonsense=1)
