"""`SparseTopKSAE`: `reconstruct`, a subset of its latents, and what a sharded one overrides.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import pytest
import torch

from sparse_topk import SAEOutput, SparseTopKSAE, TopK, UnitNormAdam

N, D, M, K = 9, 6, 40, 5


@pytest.fixture(params=[True, False])
def sae(request):
    torch.manual_seed(0)
    sae = SparseTopKSAE(D, M, K, bias=request.param, dtype=torch.float64)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return sae


def test_reconstruct_gives_output_activations_and_indices(sae):
    x = torch.randn(2, N, D, dtype=torch.float64)
    out = sae.reconstruct(x)
    assert isinstance(out, SAEOutput)
    sae_out, latent_acts, latent_indices = out
    assert torch.equal(sae_out, sae(x))
    assert torch.equal(latent_acts, sae.encode(x).values)
    assert torch.equal(latent_indices, sae.encode(x).indices)
    assert isinstance(out.codes, TopK)
    assert out.codes.values is out.values
    assert out.codes.indices is out.indices
    torch.testing.assert_close(sae.decode(out.codes), out.x_hat)


def scale_decoder(sae, spread):
    """Rows of W_dec of norms in [1, spread], one of them zero; returned without the zero."""
    with torch.no_grad():
        norms = torch.linspace(1, spread, M, dtype=torch.float64)[torch.randperm(M)]
        sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1) * norms[:, None])
        sae.W_dec[7] = 0
    return norms


@pytest.mark.parametrize("spread", [1.0, 1.02, 1.1])
def test_folded_norms_leave_the_output_where_the_selection_is_clear(sae, spread):
    """Where the k-th score exceeds the next by more than the ratio of the norms, or is negative."""
    x = torch.randn(400, D, dtype=torch.float64)
    norms = scale_decoder(sae, spread)
    with torch.no_grad():
        scores = (x - sae.b_dec) @ sae.W_enc.T + (0 if sae.b_enc is None else sae.b_enc)
        top = scores.topk(K + 1, dim=1).values
        clear = (top[:, K - 1] <= 0) | (top[:, K - 1] > top[:, K] * norms.max() / norms.min())
        before, (values, indices) = sae(x), sae.encode(x)
        assert sae.fold_norms_() is sae
        after, folded = sae(x), sae.encode(x)
    assert clear.double().mean() > 0.02
    assert clear.all() == (spread == 1)
    torch.testing.assert_close(after[clear], before[clear])
    assert torch.equal(folded.indices[clear], indices[clear])
    scale = norms.clone()
    scale[7] = 1
    torch.testing.assert_close(folded.values[clear], (values * scale[indices])[clear])
    unit = torch.ones(M, dtype=torch.float64).index_fill(0, torch.tensor(7), 0)
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), unit)
    UnitNormAdam(sae.parameter_groups())


def test_norms_folded_with_all_latents_active_change_nothing():
    torch.manual_seed(0)
    sae, x = SparseTopKSAE(D, M, M, dtype=torch.float64), torch.randn(N, D, dtype=torch.float64)
    scale_decoder(sae, 9.0)
    before = sae(x)
    torch.testing.assert_close(sae.fold_norms_()(x), before)


def test_an_unsharded_sae_holds_all_rows(sae):
    rows = torch.randn(M, 3)
    assert sae.gather_rows(rows) is rows
    assert sae.own_rows(rows) is rows
    grads = [torch.randn(M, D), torch.randn(D)]
    assert torch.equal(sae.total_norm(grads), torch.nn.utils.get_total_norm(grads))
