"""Reconstructions at several layers at once, against hooks set by hand.

Legend: R rows, T positions, D width of the residual stream, V vocabulary.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from mlsae import MLSAE, MLSAEConfig
from mlsae.data.blocks import find_blocks
from mlsae.data.residuals import ResidualReader
from mlsae.evaluation.faithfulness import measure_faithfulness
from mlsae.evaluation.token_metrics import (
    JOINT_METRICS,
    bootstrap_token_metrics,
    compute_token_metrics,
)
from tests.helpers.models import CONFIGS, UNCUT, make

R, T, D = 5, 12, 24
IDS = torch.randint(0, 64, (R, T), generator=torch.Generator().manual_seed(1))
KEPT = IDS > 5
PREDICTED = KEPT[:, :-1] & KEPT[:, 1:]
TARGETS = IDS[:, 1:][PREDICTED]


def make_sae():
    torch.manual_seed(2)
    return MLSAE(MLSAEConfig(D, 40, 4, (0, 1, 2))).requires_grad_(False)


def measured(model, layers=None, joint="from", micro_rows=2):
    reader = ResidualReader(model, layers)
    sums = measure_faithfulness(make_sae(), reader, IDS, KEPT, micro_rows, joint=joint).sums
    return sums, compute_token_metrics(sums, torch.ones(1, R, dtype=torch.float64))


def by_hand(model, layers, change):
    """Logits (P, V) at the predictions if each block of `layers` returns `change(x, layer)` at kept
    tokens, and what it returns unchanged at others."""
    truth = ResidualReader(model)(IDS)

    def hook_for(layer):
        def hook(_module, _args, output):
            x = output if isinstance(output, torch.Tensor) else output[0]
            new = torch.where(KEPT[..., None], change(x, layer), truth[layer])
            return new if isinstance(output, torch.Tensor) else (new, *output[1:])

        return hook

    blocks = find_blocks(model)
    handles = [blocks[layer].register_forward_hook(hook_for(layer)) for layer in layers]
    try:
        return model(input_ids=IDS, use_cache=False).logits[:, :-1][PREDICTED].double()
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama", "gpt_neo"])
def test_every_figure_is_that_of_hooks_set_by_hand(family):
    model, mlsae = make({**CONFIGS, **UNCUT}[family]), make_sae()
    for layers in ((0, 1, 2), (0, 1)):  # with the last block, and without it
        _, computed = measured(model, layers)
        true = by_hand(model, (), None)
        mean = [x[KEPT].mean(0) for x in ResidualReader(model)(IDS)]
        for i in range(len(layers)):
            found = by_hand(model, layers[i:], lambda x, _: mlsae(x))
            ablated = by_hand(model, layers[i:], lambda x, layer, m=mean: m[layer].expand_as(x))
            ce, ce_true, ce_mean = (F.cross_entropy(y, TARGETS) for y in (found, true, ablated))
            oracle = {
                "delta_ce_from": ce - ce_true,
                "kl_from": F.kl_div(found.log_softmax(1), true.softmax(1), reduction="batchmean"),
                "top1_from": (found.argmax(1) == true.argmax(1)).double().mean(),
                "recovered_from": (ce_mean - ce) / (ce_mean - ce_true),
            }
            for name, value in oracle.items():
                got = getattr(computed, name)[0, i].item()
                assert got == pytest.approx(value.item(), rel=1e-3, abs=1e-5), (name, i)
        assert not torch.allclose(computed.delta_ce_from[:, 0], computed.delta_ce[:, 0], rtol=0.02)


def test_the_topmost_layer_alone_is_the_single_layer():
    sums, computed = measured(make(CONFIGS["gpt_neox"]))
    assert torch.equal(sums.ce_from[:, -1], sums.ce[:, -1])
    assert torch.equal(computed.recovered_from[:, -1], computed.recovered_mean[:, -1])


def test_the_split_into_batches_changes_nothing():
    model = make(CONFIGS["gpt_neox"])
    for once, split in zip(measured(model, micro_rows=R)[1], measured(model)[1], strict=True):
        torch.testing.assert_close(once, split, rtol=1e-4, atol=1e-6)


def test_what_is_not_asked_for_is_not_measured():
    model = make(CONFIGS["gpt_neox"])
    (everything, _), (bottom, _), (none, _) = (
        measured(model, joint=joint) for joint in ("from", "all", "off")
    )
    assert torch.equal(bottom.ce_from[:, 0], everything.ce_from[:, 0])
    assert bottom.ce_from[:, 1:].isnan().all()
    assert none.ce_from.isnan().all()
    for sums in (everything, bottom, none):
        assert torch.equal(sums.ce, everything.ce)


def test_sets_of_layers_have_intervals_and_no_mean():
    sums, computed = measured(make(CONFIGS["gpt_neox"]))
    intervals = bootstrap_token_metrics(sums, 50, 0)
    for name in JOINT_METRICS:
        value, low, high = intervals[name]
        torch.testing.assert_close(value[:-1], getattr(computed, name)[0])
        assert (low[:-1] <= value[:-1]).all()
        assert (value[:-1] <= high[:-1]).all()
        assert math.isnan(value[-1])


def test_the_hooks_are_removed_if_a_pass_fails(monkeypatch):
    model = make(CONFIGS["gpt_neox"])
    mlsae, reader = make_sae(), ResidualReader(model)

    def fail(_self, _x, _layers):
        raise RuntimeError("stop")

    monkeypatch.setattr(MLSAE, "forward", fail)
    with pytest.raises(RuntimeError, match="stop"):
        measure_faithfulness(mlsae, reader, IDS, KEPT, 2, joint="all")
    assert not any(block._forward_hooks for block in reader.blocks)
    assert not any("forward" in vars(block) for block in reader.blocks)
