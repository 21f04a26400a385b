"""Attributions against finite differences, plain autograd and ablation.

Legend: B rows, T tokens, D width of the residual stream, M latents, K active latents per token.
"""

import pytest
import torch

from mlsae import MLSAE, MLSAEConfig
from mlsae.attribution.ablation import Check, ablate, pearson, spearman
from mlsae.attribution.gradient import attribute
from mlsae.attribution.targets import LatentTarget, LogitTarget
from mlsae.data.blocks import find_blocks
from mlsae.data.residuals import ResidualReader
from mlsae.intervention import Edit, intervene
from tests.helpers.circuit import TARGET, A, planted
from tests.helpers.models import CONFIGS, STATE_SPACE, UNCUT, forward_with_hook, make

T, D, M, K = 7, 24, 40, 4
IDS = torch.randint(2, 64, (T,), generator=torch.Generator().manual_seed(1))
GOAL = LogitTarget(5, 9)
FAMILIES = {**CONFIGS, **STATE_SPACE, **UNCUT}
del FAMILIES["jamba"]  # torch multiplies by its experts in no float64


def make_sae(dtype=torch.float64, standardize=True, k_max=None):
    torch.manual_seed(2)
    mlsae = MLSAE(MLSAEConfig(D, M, K, (0, 1, 2), standardize, bias=True, k_max=k_max))
    with torch.no_grad():
        mlsae.sae.b_dec.normal_(std=0.1)
        mlsae.sae.W_dec.mul_(torch.rand(M, 1) + 0.5)  # not the encoder's, nor of norm 1
    return mlsae.requires_grad_(False).to(dtype)


def rows(nodes):
    return list(zip(*(column.tolist() for column in nodes), strict=True))


def shifted(mlsae, reader, target, node, step):
    """The target where h of a node is larger by `step`."""
    token, layer, latent, *_ = node
    add = Edit(latent, (layer,), "add", step, positions=(token,))
    with torch.no_grad(), intervene(reader.model, mlsae, [add]):
        residuals, logits = reader.with_logits(IDS[None])
    return target.value(mlsae, reader.layers, residuals, logits).item()


def slope(mlsae, reader, target, node, step=1e-6):
    """∂ target/∂ h of a node by central differences. Models whose norms compute in float32, in any
    dtype, need a larger step."""
    up, down = (shifted(mlsae, reader, target, node, sign * step) for sign in (1, -1))
    return (up - down) / (2 * step)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_attributed_as_finite_differences_and_autograd_do(family):
    """Gradients by latents; and the parts of each vector add up to x · ∂y/∂x, which autograd gives
    where a hook puts x in."""
    model, mlsae = make(FAMILIES[family]).double(), make_sae()
    reader = ResidualReader(model)
    found = attribute(mlsae, reader, IDS, GOAL)
    residuals, logits = reader.with_logits(IDS[None])
    assert found.value == pytest.approx((logits[0, -1, 5] - logits[0, -1, 9]).item(), abs=1e-9)
    for node in (rows(found.nodes)[0], rows(found.nodes)[len(found.nodes.token) // 2]):
        expected = node[3] * slope(mlsae, reader, GOAL, node, step=1e-3)
        assert node[4] == pytest.approx(expected, rel=5e-3, abs=1e-5)
    x = residuals[1].clone().requires_grad_()
    y = forward_with_hook(model, IDS[None], 1, x)[0, -1]
    (g,) = torch.autograd.grad(y[5] - y[9], x)
    whole = found.latents + found.errors + found.constants
    torch.testing.assert_close(whole[1], (x * g)[0].sum(-1).detach())
    error = mlsae.reconstruct(residuals[1][0]).error
    torch.testing.assert_close(found.errors[1], (error * g[0]).sum(-1))


@pytest.fixture(scope="module")
def neox():
    return ResidualReader(make(CONFIGS["gpt_neox"]).double())  # in float64 throughout


@pytest.mark.parametrize("kind", ["not standardized", "with a threshold", "a latent"])
def test_other_saes_and_targets_are_attributed_as_finite_differences_do(neox, kind):
    mlsae = make_sae(
        standardize=kind != "not standardized", k_max=8 if "threshold" in kind else None
    )
    if "threshold" in kind:
        mlsae.sae.threshold = torch.tensor(0.5).double()
    goal = GOAL
    if kind == "a latent":
        values, indices = mlsae.encode(neox(IDS[None])[2, 0, -1])
        goal = LatentTarget(int(indices[values.argmax()]), 2)
    found = attribute(mlsae, neox, IDS, goal)
    nodes = rows(found.nodes)
    assert len(nodes) > 20
    assert {node[1] for node in nodes} == ({0, 1} if kind == "a latent" else {0, 1, 2})
    for node in (nodes[0], nodes[7]):
        # `Edit` counts in σ, which is 1 for an SAE that does not standardize
        step = 1.0
        if kind == "not standardized":
            x = neox(IDS[None])[node[1], 0, node[0]]
            step = x.std().item()
        expected = node[3] * slope(mlsae, neox, goal, node) / step
        assert node[4] == pytest.approx(expected, rel=1e-4)


def test_an_edge_is_what_finite_differences_say_of_both_ends(neox):
    mlsae = make_sae()
    found = attribute(mlsae, neox, IDS, GOAL, n_edges=12)
    nodes = rows(found.nodes)
    assert found.edges
    for edge in found.edges[:3]:
        source, sink = nodes[edge.source], nodes[edge.sink]
        goal = LatentTarget(sink[2], sink[1])

        class At(LatentTarget):
            """The sink's activation, wherever it is."""

            def value(self, mlsae, layers, residuals, logits, at=sink[0]):
                return super().value(mlsae, layers, [x[:, : at + 1] for x in residuals], logits)

        through = slope(mlsae, neox, At(goal.latent, goal.layer), source)
        expected = source[3] * through * sink[4] / sink[3]
        assert edge.weight == pytest.approx(expected, rel=1e-4)


def test_in_a_linear_model_attributions_are_ablations_and_add_up_to_the_target():
    model, mlsae = planted()
    reader, goal = ResidualReader(model), LogitTarget(TARGET, 4)
    torch.manual_seed(0)
    mlsae.sae.W_dec.mul_(0.9)  # so that there are errors
    mlsae.sae.b_dec.normal_(std=0.01)
    ids = torch.tensor([1, A, A, 3])
    found = attribute(mlsae, reader, ids, goal)
    whole = found.latents + found.errors + found.constants
    torch.testing.assert_close(whole.sum(1), torch.full((3,), found.value).double())
    assert found.errors.abs().max() > 0.1
    for token, layer, latent, _, effect in rows(found.nodes)[:6]:
        real = ablate(mlsae, reader, ids, goal, found.value, token, layer, latent)
        assert real == pytest.approx(effect, abs=1e-5)
    for layer, token in ((1, 2), (2, 3)):
        real = ablate(mlsae, reader, ids, goal, found.value, token, layer, None)
        assert real == pytest.approx(found.errors[layer, token].item(), abs=1e-5)


def test_the_pass_that_is_attributed_is_the_model_s_own_to_the_bit(neox):
    residuals, logits = neox.with_logits(IDS[None])
    with_graph, their_logits = neox.with_graph(IDS[None])
    assert torch.equal(logits, their_logits.detach())
    for one, other in zip(residuals, with_graph, strict=True):
        assert torch.equal(one, other.detach())


def test_bfloat16_agrees_with_float64_to_its_precision():
    model, mlsae = make(CONFIGS["llama"]), make_sae(torch.float32)
    exact = attribute(make_sae(), ResidualReader(model.double()), IDS, GOAL)
    found = attribute(mlsae, ResidualReader(model.bfloat16()), IDS, GOAL)
    scale = exact.errors.abs().max()
    assert (found.errors - exact.errors).abs().max() < 0.1 * scale
    assert found.nodes.attribution.dtype == torch.float32


def test_hooks_end_with_a_pass_that_fails(neox):
    block = find_blocks(neox.model)[2]

    def fail(*_):
        raise RuntimeError("stop")

    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        attribute(make_sae(), neox, IDS, GOAL)
    handle.remove()
    assert not any(block._forward_hooks for block in find_blocks(neox.model))


def test_correlations_are_those_of_a_case_by_hand():
    pairs = [(1.0, 2.0), (2.0, 2.0), (3.0, 9.0), (4.0, 5.0)]
    checks = [Check(0, 0, 1, *pair) for pair in pairs]
    assert spearman(checks) == pytest.approx(3.5 / (5 * 4.5) ** 0.5)  # ranks 1.5 1.5 4 3
    assert pearson(checks) == pytest.approx(8.0 / (5 * 33) ** 0.5)
    assert pearson(checks[:2]) is None
