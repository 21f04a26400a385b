"""A lens: its maps and inverses against float64 mathematics, and an MLSAE in its basis.

Legend: L layers, R rows, T positions, D width of the residual stream, M latents, K active latents.
"""

import pytest
import torch
import torch.nn.functional as F

from mlsae import MLSAE, MLSAEConfig
from mlsae.attribution.gradient import attribute
from mlsae.attribution.targets import LogitTarget
from mlsae.basis import Lens
from mlsae.data.blocks import residual_of, with_residual
from mlsae.data.residuals import ResidualReader
from mlsae.data.stream import Residuals
from mlsae.dense import DenseSAE
from mlsae.errors import InputError
from mlsae.evaluation.faithfulness import measure_faithfulness
from mlsae.evaluation.token_metrics import compute_token_metrics
from mlsae.intervention import Edit, Replace, intervene
from mlsae.training.init import init_stats
from mlsae.training.loop import train_step
from mlsae.training.state import TrainState
from mlsae.training.validation import validate
from tests.helpers.lenses import random_lens
from tests.helpers.models import CONFIGS, forward_with_hook, make

L, R, T, D, M, K = 3, 4, 12, 24, 40, 4
LAYERS = tuple(range(L))


@pytest.fixture(scope="module")
def model():
    return make(CONFIGS["gpt_neox"])


@pytest.fixture(scope="module")
def text():
    input_ids = torch.randint(0, 64, (R, T), generator=torch.Generator().manual_seed(1))
    return input_ids, input_ids > 5


@pytest.fixture
def lens():
    return random_lens(L, D)


def drawn(lens, **changes):
    torch.manual_seed(0)
    config = MLSAEConfig(D, M, K, LAYERS, **changes)
    return MLSAE(config, lens=lens).requires_grad_(False)


def perfect(lens):
    """Latents are ±1 times each dimension of z, so that ẑ = z, bit for bit."""
    mlsae = MLSAE(MLSAEConfig(D, 2 * D, D, LAYERS, standardize=False), lens=lens)
    signs = torch.cat([torch.eye(D), -torch.eye(D)])
    mlsae.sae.load_state_dict({"W_enc": signs, "W_dec": signs, "b_dec": torch.zeros(D)})
    return mlsae.requires_grad_(False)


def vectors():
    return torch.randn(L, 7, D, generator=torch.Generator().manual_seed(3)) * 4 + 1


def dense(mlsae, x, layer):
    """ẑ, z, x̂ and h of vectors (N, D) of a layer in float64, with A⁻¹ solved for each of them."""
    lens, sae = mlsae.lens, {n: p.double() for n, p in mlsae.sae.state_dict().items()}
    A, b = torch.eye(D).double(), torch.zeros(D).double()
    if layer in lens.layers:
        i = lens.layers.index(layer)
        A, b = lens.matrix[i].double(), lens.bias[i].double()
    z = x.double() @ A.T + b
    std, mean = torch.std_mean(z, dim=-1, keepdim=True)
    top = (((z - mean) / (std + 1e-5) - sae["b_dec"]) @ sae["W_enc"].T).topk(K)
    h = torch.zeros(len(x), M).double().scatter(-1, top.indices, top.values.relu())
    z_hat = (h @ sae["W_dec"] + sae["b_dec"]) * std + mean
    return z_hat, z, torch.linalg.solve(A, (z_hat - b).T).T, h


def test_outputs_equal_float64_mathematics(lens):
    mlsae, x = drawn(lens), vectors()
    out = mlsae.reconstruct(x, LAYERS)
    for layer in LAYERS:
        z_hat, z, x_hat, h = dense(mlsae, x[layer], layer)
        torch.testing.assert_close(out.x_hat[layer].double(), x_hat, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            out.error[layer].double(), x[layer] - x_hat, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            out.error_in_basis[layer].double(), z - z_hat, rtol=1e-4, atol=1e-4
        )
        at_one = mlsae.reconstruct(x[layer], layer)
        torch.testing.assert_close(at_one.x_hat, out.x_hat[layer])
        values, indices = mlsae.encode(x[layer], layer)
        found = torch.zeros(7, M).scatter(-1, indices, values)
        torch.testing.assert_close(found.double(), h, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            DenseSAE(mlsae, layer=layer)(x[layer]).double(), x_hat, rtol=1e-4, atol=1e-4
        )


def test_the_identity_keeps_every_bit():
    eye = Lens((0, 1), torch.eye(D).repeat(2, 1, 1), torch.zeros(2, D), L)
    with_lens, without = drawn(eye), drawn(None)
    x = vectors()
    a, b = with_lens.reconstruct(x, LAYERS), without.reconstruct(x)
    assert torch.equal(a.codes.values, b.codes.values)
    for found in (a.error, a.error_in_basis):
        assert torch.equal(found, b.error)
    assert torch.equal(a.x_hat, b.x_hat)


def test_the_last_layer_keeps_every_bit(lens):
    x = vectors()
    a, b = drawn(lens).reconstruct(x, LAYERS), drawn(None).reconstruct(x)
    assert torch.equal(a.x_hat[-1], b.x_hat[-1])
    assert not torch.equal(a.x_hat[0], b.x_hat[0])


def test_layers_must_be_told(lens):
    mlsae, x = drawn(lens), vectors()
    with pytest.raises(ValueError, match="layers must be given to an MLSAE that has a lens"):
        mlsae.encode(x)
    with pytest.raises(ValueError, match="one layer for each of the 3"):
        mlsae(x, [0, 1])
    with pytest.raises(InputError, match="has none of 7"):
        mlsae(x[0], 7)
    with pytest.raises(InputError, match="must have a map of each layer, and has none of 1"):
        MLSAE(MLSAEConfig(D, M, K, LAYERS), lens=random_lens(L, D, layers=(0,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda A: A * torch.tensor([0.0] + [1.0] * (D - 1)), "that of layer 0 has inf; give"),
        (lambda A: torch.eye(D) * torch.tensor([1e-8] + [1.0] * (D - 1)), "1.0e[+]08"),
        (lambda A: A * torch.nan, "must be finite numbers"),
        (lambda A: A[:, :-1], "must have the shape"),
    ],
)
def test_maps_that_cannot_be_inverted_are_refused(lens, change, message):
    A = torch.stack([change(lens.matrix[0]), change(lens.matrix[1])])
    with pytest.raises(InputError, match=message):
        Lens((0, 1), A, lens.bias, L)


def test_condition_numbers_equal_those_of_singular_values(lens):
    expected = torch.linalg.cond(lens.matrix.double())
    assert list(lens.condition.values()) == pytest.approx(expected.tolist(), rel=0.01)


def test_a_perfect_sae_costs_nothing_under_a_lens(model, text, lens):
    reader = ResidualReader(model)
    measured = measure_faithfulness(perfect(lens), reader, *text, 2, joint="from")
    computed = compute_token_metrics(measured.sums, torch.ones(1, R, dtype=torch.float64))
    for name in ("fvu", "mse", "delta_ce", "kl", "delta_ce_from", "kl_from"):
        assert getattr(computed, name).tolist() == [[0] * L], name
    assert measured.fvu_lens.tolist() == [0] * L


def test_both_fvus_and_the_cross_entropy_against_hooks_by_hand(model, text, lens):
    mlsae, (input_ids, token_mask) = drawn(lens), text
    reader = ResidualReader(model)
    measured = measure_faithfulness(mlsae, reader, *text, 2)
    computed = compute_token_metrics(measured.sums, torch.ones(1, R, dtype=torch.float64))
    residuals = reader(input_ids)
    validation = validate([mlsae], [(residuals[:, token_mask], residuals[:, :0, 0])])[0]
    predicted = token_mask[:, :-1] & token_mask[:, 1:]
    targets = input_ids[:, 1:][predicted]
    true = F.cross_entropy(model(input_ids=input_ids).logits[:, :-1][predicted].double(), targets)
    for layer, x in enumerate(residuals):
        kept = x[token_mask]
        z_hat, z, x_hat, _ = dense(mlsae, kept, layer)
        replaced = x.clone()
        replaced[token_mask] = x_hat.float()
        logits = forward_with_hook(model, input_ids, layer, replaced)[:, :-1][predicted].double()
        oracle = {"delta_ce": F.cross_entropy(logits, targets) - true}
        spread = (kept.double() - kept.double().mean(0)).square().sum()
        oracle["fvu"] = (kept - x_hat).square().sum() / spread
        for name, value in oracle.items():
            found = getattr(computed, name)[0, layer].item()
            assert found == pytest.approx(value.item(), rel=1e-3, abs=1e-5), (name, layer)
        fvu_lens = ((z - z_hat).square().sum() / (z - z.mean(0)).square().sum()).item()
        assert measured.fvu_lens[layer].item() == pytest.approx(fvu_lens, rel=1e-4)
        assert validation.fvu_lens[layer].item() == pytest.approx(fvu_lens, rel=1e-4)
        assert validation.fvu[layer].item() == pytest.approx(oracle["fvu"].item(), rel=1e-4)


def test_some_of_the_layers_are_carried_by_their_own_maps(model, text, lens):
    mlsae, ones = drawn(lens), torch.ones(1, R, dtype=torch.float64)
    everything, some = (
        compute_token_metrics(
            measure_faithfulness(mlsae, ResidualReader(model, n), *text, 2).sums, ones
        )
        for n in (LAYERS, (1, 2))
    )
    for name in ("fvu", "delta_ce", "l1"):
        torch.testing.assert_close(getattr(some, name), getattr(everything, name)[:, 1:])


def test_several_layers_at_once_are_carried_by_their_own_maps(model, text, lens):
    mlsae, (input_ids, token_mask) = drawn(lens), text
    reader = ResidualReader(model)
    measured = measure_faithfulness(mlsae, reader, *text, 2, joint="from")
    true = reader(input_ids)

    def hook_for(layer):
        def hook(_module, _args, output):
            x = residual_of(output)
            x_hat = dense(mlsae, x.flatten(0, 1), layer)[2].float().view_as(x)
            return with_residual(output, torch.where(token_mask[..., None], x_hat, true[layer]))

        return hook

    handles = [reader.blocks[n].register_forward_hook(hook_for(n)) for n in LAYERS]
    logits = model(input_ids=input_ids).logits
    for handle in handles:
        handle.remove()
    predicted = token_mask[:, :-1] & token_mask[:, 1:]
    targets = input_ids[:, 1:][predicted]
    ce = F.cross_entropy(logits[:, :-1][predicted].double(), targets, reduction="sum")
    assert measured.sums.ce_from[:, 0].sum().item() == pytest.approx(ce.item(), rel=1e-3)


def test_attributions_add_up_and_are_slopes_of_the_edits(model, text, lens):
    """At each layer and token, latents, error and constants add up to x · g; and a latent's is by
    how much the target falls, per share, where an edit takes a small share of it away."""
    mlsae, ids = drawn(lens), text[0][0]
    reader, target = ResidualReader(model), LogitTarget(7)
    found = attribute(mlsae, reader, ids, target)
    residuals, logits = reader.with_graph(ids[None])
    grads = torch.autograd.grad(target.value(mlsae, LAYERS, residuals, logits), residuals)
    for i, (x, grad) in enumerate(zip(residuals, grads, strict=True)):
        parts = found.latents[i] + found.errors[i] + found.constants[i]
        expected = (x.detach() * grad)[0].double().sum(-1)
        torch.testing.assert_close(parts, expected, rtol=1e-3, atol=1e-3)
    share = 1e-3
    for i in range(5):
        token, layer, latent = (int(part[i]) for part in found.nodes[:3])
        where = slice(token, token + 1)
        edit = Edit(latent, (layer,), "scale", 1 - share, where)
        with intervene(model, mlsae, [edit]):
            after = target.value(mlsae, LAYERS, [], model(input_ids=ids[None]).logits)
        fall = (found.value - after.item()) / share
        assert fall == pytest.approx(found.nodes.attribution[i].item(), rel=0.05, abs=0.02)


def test_the_first_center_and_variances_are_in_the_lens_s_basis(lens):
    x = vectors()
    z = torch.stack([x[i] @ lens.matrix[i].T + lens.bias[i] if i < 2 else x[i] for i in LAYERS])
    under, plain = init_stats(drawn(lens), [x]), init_stats(drawn(None), [z])
    torch.testing.assert_close(under.center, plain.center, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        under.moments.variance(), plain.moments.variance(), rtol=1e-4, atol=0
    )


def test_a_step_of_training_is_one_on_z(lens):
    x = vectors()
    z = drawn(lens).carry(x, LAYERS).z
    states = []
    for mlsae, given in ((drawn(lens), x), (drawn(None), z)):
        state = TrainState(
            mlsae.requires_grad_(), schedule=lambda _: 1e-2, dead_tokens=1000, k_aux=4, aux_weight=0
        )
        state.initialize(init_stats(drawn(None), [z]).moments, None)
        train_step([state], [Residuals(given, torch.ones(7, dtype=torch.bool))], 7)
        states.append(state)
    for a, b in zip(*(state.mlsae.sae.parameters() for state in states), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(states[0].window.sq_error, states[1].window.sq_error)


def test_edits_are_carried_back(model, text, lens):
    """x' = x + A⁻¹ σ Δh W_dec at the edited layer; nothing edited leaves the model's bits."""
    mlsae, ids = drawn(lens), text[0]
    reader = ResidualReader(model)
    x = reader(ids)[1]
    plain = model(input_ids=ids).logits
    for nothing in ([], [Edit(3, (1,), "add", 0.0)], [Edit(3, (1,), "scale", 1.0)]):
        with intervene(model, mlsae, nothing):
            assert torch.equal(model(input_ids=ids).logits, plain)
    _, z, x_hat, h = dense(mlsae, x.flatten(0, 1), 1)
    sigma = z.std(-1, keepdim=True)
    row, A = mlsae.sae.W_dec[3].double(), lens.matrix[1].double()
    for edit, change in (
        (Edit(3, (1,), "add", 2.0), 2 * sigma),
        (Edit(3, (1,), "clamp", 1.5), 1.5 * sigma - sigma * h[:, 3:4]),
        (Edit(3, (1,), "ablate"), -sigma * h[:, 3:4]),
    ):
        steered = x.flatten(0, 1).double() + torch.linalg.solve(A, (change * row).T).T
        expected = forward_with_hook(model, ids, 1, steered.float().view_as(x))
        with intervene(model, mlsae, [edit]):
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
    with intervene(model, mlsae, [Replace((1,))]):
        expected = forward_with_hook(model, ids, 1, x_hat.float().view_as(x))
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
