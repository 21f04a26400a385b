"""Edits against hooks set by hand, in every family; what stays as it was.

Legend: B rows, T positions, D width of the residual stream, M latents.
"""

import pytest
import torch

from mlsae import MLSAE, MLSAEConfig
from mlsae.data.blocks import find_blocks
from mlsae.data.residuals import ResidualReader
from mlsae.errors import InputError
from mlsae.evaluation.patching import substituted_logits
from mlsae.intervention import Activations, Edit, Replace, intervene
from tests.helpers.models import CONFIGS, STATE_SPACE, UNCUT, make

B, T, D, M, K = 2, 9, 24, 40, 4
NEVER = M - 1  # a latent that is never active
FAMILIES = {**CONFIGS, **STATE_SPACE, **UNCUT}
LLAMA = make(CONFIGS["llama"])
IDS = torch.randint(2, 64, (B, T), generator=torch.Generator().manual_seed(1))


def make_sae(standardize=True, layers=(0, 1, 2), k_max=None):
    torch.manual_seed(2)
    mlsae = MLSAE(MLSAEConfig(D, M, K, layers, standardize, bias=True, k_max=k_max))
    with torch.no_grad():
        mlsae.sae.b_dec.normal_(std=0.1)
        mlsae.sae.W_dec.mul_(torch.rand(M, 1) + 0.5)  # not the encoder's, nor of norm 1
        mlsae.sae.b_enc[NEVER] = -100
    return mlsae.requires_grad_(False)


MLSAE_ = make_sae()
STATS = Activations(torch.rand(M).double() + 1, torch.rand(M).double() + 0.5)


def dense(mlsae, x):
    """σ (…, 1), the deviation of the elements, and the dense activations (…, M)."""
    values, indices = mlsae.encode(x)
    h = torch.zeros(*x.shape[:-1], M).scatter(-1, indices, values)
    spread = x.float().std(-1, keepdim=True)
    return (spread if mlsae.config.standardize else torch.ones_like(spread)), spread, h


def by_hand(mlsae, x, edits):
    """The new residual, all edits at all positions."""
    sigma, spread, h = dense(mlsae, x)
    now = (sigma * h).double()  # the coefficients of the decoder's rows
    new = now.clone()
    for edit in edits:
        unit = {
            "sigma": spread[..., 0], "raw": 1.0, "max": sigma[..., 0] * STATS.max[edit.latent],
            "mean": sigma[..., 0] * STATS.mean[edit.latent],
        }[edit.units]  # fmt: skip
        column, value = new[..., edit.latent], edit.value or 0.0
        new[..., edit.latent] = {
            "add": column + value * unit,
            "scale": column * value,
            "clamp": torch.zeros_like(column) + value * unit,
            "ablate": torch.zeros_like(column),
        }[edit.op]
    return (x.double() + (new - now) @ mlsae.sae.W_dec.double()).to(x.dtype)


def hooked(model, changes, **inputs):
    """Logits with `changes`, a function of the residual by layer, made by plain hooks."""

    def hook_for(change):
        def hook(_module, _args, output):
            if isinstance(output, torch.Tensor):
                return change(output)
            return (change(output[0]), *output[1:])

        return hook

    blocks = find_blocks(model)
    handles = [blocks[i].register_forward_hook(hook_for(f)) for i, f in changes.items()]
    try:
        return model(**(inputs or {"input_ids": IDS}), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def logits(model, edits, mlsae=MLSAE_, ids=IDS, **inputs):
    with intervene(model, mlsae, edits, activations=STATS):
        return model(input_ids=ids, use_cache=False, **inputs).logits


def active_latents(layer=1, n=3):
    """The latents that are most often active."""
    x = ResidualReader(LLAMA, [layer])(IDS)[0]
    return dense(MLSAE_, x)[2].gt(0).sum((0, 1)).topk(n).indices.tolist()


FIRST, SECOND, THIRD = active_latents()
CASES = {
    "add": [Edit(FIRST, (1,), "add", 3.0)],
    "add, of the largest": [Edit(FIRST, (1,), "add", -1.5, units="max")],
    "add, raw": [Edit(FIRST, (1,), "add", 2.0, units="raw")],
    "scale": [Edit(FIRST, (1,), "scale", -4.0)],
    "clamp": [Edit(FIRST, (1,), "clamp", 2.0)],
    "clamp, of the mean": [Edit(FIRST, (1,), "clamp", 3.0, units="mean")],
    "ablate": [Edit(FIRST, (1,), "ablate")],
    "several latents": [Edit(FIRST, (1,), "ablate"), Edit(SECOND, (1,), "add", 2.0)],
    "scaled, then added to": [Edit(FIRST, (1,), "scale", 3.0), Edit(FIRST, (1,), "add", 2.0)],
    "added to, then scaled": [Edit(FIRST, (1,), "add", 2.0), Edit(FIRST, (1,), "scale", 3.0)],
    "added to, then clamped": [Edit(FIRST, (1,), "add", 9.0), Edit(FIRST, (1,), "clamp", 1.0)],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("standardize", [True, False])
def test_an_edit_is_that_of_a_hook_set_by_hand(case, standardize):
    mlsae = make_sae(standardize)
    edits = CASES[case]
    expected = hooked(LLAMA, {1: lambda x: by_hand(mlsae, x, edits)})
    torch.testing.assert_close(logits(LLAMA, edits, mlsae), expected, rtol=1e-4, atol=1e-5)
    plain = LLAMA(input_ids=IDS).logits
    assert (expected - plain).abs().max() > 1e-2, "the edit changes too little to tell"


def test_the_order_of_edits_of_a_latent_is_that_of_the_list():
    scaled_first, added_first = CASES["scaled, then added to"], CASES["added to, then scaled"]
    assert not torch.allclose(logits(LLAMA, scaled_first), logits(LLAMA, added_first))
    one, other = CASES["several latents"]
    torch.testing.assert_close(logits(LLAMA, [one, other]), logits(LLAMA, [other, one]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_edited_and_replaced_as_by_hand(family):
    model = make(FAMILIES[family])
    clamp = Edit(FIRST, (0, 2), "clamp", 3.0)
    changes = dict.fromkeys((0, 2), lambda x: by_hand(MLSAE_, x, [clamp]))
    expected = hooked(model, changes)
    torch.testing.assert_close(logits(model, [clamp]), expected, rtol=1e-3, atol=1e-4)
    expected = hooked(model, dict.fromkeys(range(3), MLSAE_))
    torch.testing.assert_close(logits(model, [Replace()]), expected)
    assert not torch.allclose(expected, model(input_ids=IDS).logits, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_nothing_is_the_model_bit_for_bit(family):
    model = make(FAMILIES[family])
    plain = model(input_ids=IDS, use_cache=False).logits
    idle = [Edit(NEVER, None, "ablate"), Edit(FIRST, None, "scale", 1.0), Edit(1, None, "add", 0.0)]
    for edits in ([], idle, [Edit(0, None, "add", 9.0, positions="generated")]):
        assert torch.equal(logits(model, edits), plain)
    assert not any(block._forward_hooks for block in find_blocks(model))
    assert not {"generate", "prepare_inputs_for_generation"} & set(vars(model))


def test_only_the_vectors_that_change_lose_their_bits():
    reader = ResidualReader(LLAMA)
    before = reader(IDS)
    h = dense(MLSAE_, before[1])[2][..., FIRST]
    with intervene(LLAMA, MLSAE_, [Edit(FIRST, (1,), "ablate")]):
        after = reader(IDS)
    changed = (after[1] != before[1]).any(-1)
    assert torch.equal(changed, h > 0)
    assert changed.any()
    assert not changed.all()
    assert torch.equal(after[0], before[0])


def test_without_its_latents_a_vector_is_the_error_and_the_bias():
    mlsae = make_sae()
    reader = ResidualReader(LLAMA)
    x = reader(IDS)[1]
    with intervene(LLAMA, mlsae, [Edit(j, (1,), "ablate") for j in range(M)]):
        ablated = reader(IDS)[1]
    found = mlsae.reconstruct(x)
    bias = found.standard.invert(mlsae.sae.b_dec.expand_as(x))
    torch.testing.assert_close(ablated, found.error + bias, rtol=1e-4, atol=1e-5)


def test_replacing_all_layers_is_a_loop_over_the_blocks():
    """Each layer's reconstruction is of what the replaced layers below lead to."""
    reader = ResidualReader(LLAMA)
    x_hat = MLSAE_(reader(IDS)[0])
    for layer in (1, 2):
        read = {}
        block = find_blocks(LLAMA)[layer]
        handle = block.register_forward_hook(lambda _m, _a, out, read=read: read.update(x=out))
        substituted_logits(reader, IDS, layer - 1, x_hat)
        handle.remove()
        x_hat = MLSAE_(read["x"])
    expected = substituted_logits(reader, IDS, 2, x_hat)
    torch.testing.assert_close(logits(LLAMA, [Replace()]), expected)


def test_an_edit_of_a_replaced_layer_is_added_to_the_reconstruction():
    edit = Edit(FIRST, (1,), "clamp", 2.0)

    def change(x):
        return MLSAE_(x) + (by_hand(MLSAE_, x, [edit]) - x)

    expected = hooked(LLAMA, {1: change})
    for edits in ([Replace((1,)), edit], [edit, Replace((1,))]):
        torch.testing.assert_close(logits(LLAMA, edits), expected, rtol=1e-4, atol=1e-5)


def test_an_activation_is_what_the_mlsae_says_it_is():
    """With a threshold, and with a k that is set after loading."""
    batch = make_sae(k_max=8)
    batch.sae.threshold = torch.tensor(1.5)
    fewer = make_sae()
    fewer.sae.k = 1
    for mlsae in (batch, fewer):
        edits = [Edit(j, (1,), "ablate") for j in range(M)]
        expected = hooked(LLAMA, {1: lambda x, m=mlsae, e=edits: by_hand(m, x, e)})
        torch.testing.assert_close(logits(LLAMA, edits, mlsae), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, logits(LLAMA, edits), atol=1e-3)


def test_in_bfloat16_the_edit_is_computed_in_float32():
    model = make(CONFIGS["llama"]).bfloat16()
    reader = ResidualReader(model)
    before = reader(IDS)[1]
    edit = Edit(FIRST, (1,), "add", 0.3)
    with intervene(model, MLSAE_, [edit]), torch.autocast("cpu", torch.bfloat16):
        after = reader(IDS)[1]
    step = 0.3 * before.float().std(-1, keepdim=True) * MLSAE_.sae.W_dec[FIRST]
    assert after.dtype == torch.bfloat16
    assert torch.equal(after, before + step.bfloat16())


def test_contexts_nest_and_end_with_their_hooks():
    outer, inner = CASES["add"], [Edit(SECOND, (1,), "clamp", 2.0)]

    def change(x):
        return by_hand(MLSAE_, by_hand(MLSAE_, x, outer), inner)

    with intervene(LLAMA, MLSAE_, outer):
        nested = logits(LLAMA, inner)
        alone = LLAMA(input_ids=IDS).logits
    torch.testing.assert_close(nested, hooked(LLAMA, {1: change}), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, logits(LLAMA, outer))
    generate = LLAMA.generate
    with pytest.raises(RuntimeError, match="stop"), intervene(LLAMA, MLSAE_, outer):
        raise RuntimeError("stop")
    assert not any(block._forward_hooks for block in find_blocks(LLAMA))
    assert not LLAMA._forward_pre_hooks
    assert not LLAMA._forward_hooks
    assert LLAMA.generate == generate


@pytest.mark.parametrize(
    ("make_edit", "message"),
    [
        (lambda: Edit(M, (1,), "ablate"), r"latent must be in \[0, 39\], got 40"),
        (lambda: Edit(-1, (1,), "ablate"), r"latent must be in \[0, 39\], got -1"),
        (lambda: Edit(1, (2,), "ablate"), r"layers must be among .* \(0 1\), got 2"),
        (lambda: Replace((0, 5)), r"layers must be among .* \(0 1\), got 5"),
        (lambda: Edit(1, 1, "ablate"), r"layers must be a tuple of integers, .* got 1"),
        (lambda: Edit(1, (1, 1), "ablate"), "layers must not repeat, got 1 1"),
        (lambda: Edit(1, (1,), "erase"), "op must be add, scale, clamp or ablate, got 'erase'"),
        (lambda: Edit(1, (1,), "add"), "value must be given with the op 'add', got None"),
        (lambda: Edit(1, (1,), "ablate", 1.0), "value must be left out with .* got 1.0"),
        (lambda: Edit(1, (1,), "add", float("nan")), "value must be a finite number, got nan"),
        (lambda: Edit(1, (1,), "add", 1.0, units="z"), "units must be sigma, .* got 'z'"),
        (lambda: Edit(1, (1,), "add", 1.0, positions="end"), "positions must be .* got 'end'"),
        (lambda: Edit(1, (1,), "add", 1.0, positions=()), r"positions must be .* got \(\)"),
        (lambda: Edit(1, (1,), "add", 1.0, positions=slice(0, 9, -1)), "a step above 0"),
        (lambda: Edit(1, (1,), "add", 1.0, units="max"), "units 'max' need the activations"),
        (lambda: "edit", "edits must be a list of Edit and Replace, got 'edit'"),
    ],
)
def test_what_cannot_be_edited_is_named(make_edit, message):
    with (
        pytest.raises(InputError, match=message),
        intervene(LLAMA, make_sae(layers=(0, 1)), [make_edit()]),
    ):
        pass
    assert not LLAMA._forward_pre_hooks


def test_a_model_of_another_width_and_a_part_of_a_model_are_refused():
    narrow = MLSAE(MLSAEConfig(8, 16, 2, (0, 1)))
    with (
        pytest.raises(InputError, match="width 8, as the MLSAE, and has 24"),
        intervene(LLAMA, narrow, [Replace()]),
    ):
        pass
    with intervene(LLAMA, MLSAE_, CASES["add"]):
        with pytest.raises(InputError, match="must see the whole model run"):
            LLAMA.model(input_ids=IDS)
        with pytest.raises(InputError, match=r"must be \(rows, tokens\)"):
            LLAMA(input_ids=IDS, attention_mask=torch.ones(B, 1, T, T))


def test_a_latent_that_was_never_active_has_no_largest_activation():
    stats = Activations(torch.zeros(M).double(), torch.zeros(M).double())
    edit = Edit(1, (1,), "add", 1.0, units="max")
    with (
        pytest.raises(InputError, match="1 never was; give units"),
        intervene(LLAMA, MLSAE_, [edit], activations=stats),
    ):
        pass
