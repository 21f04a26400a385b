"""The dense view against the dense formula and SAEBench's requirements (SAEBench's own code runs in
`tests/formats/test_peers.py`).

Legend: D inputs, M latents, K active latents per token.
"""

import json

import pytest
import torch

from mlsae import MLSAE, DenseSAE, MLSAEConfig
from sparse_topk import SparseTopKSAE

D, M, K = 8, 40, 3


def view(kind, **options):
    torch.manual_seed(0)
    if kind == "SparseTopKSAE":
        sae = SparseTopKSAE(D, M, K)
        torch.nn.init.normal_(sae.b_enc)
    else:
        sae = MLSAE(MLSAEConfig(D, M, K, (1, 4), kind == "standardizing", "some/model"))
        options.setdefault("layer", 4)
    dense = DenseSAE(sae, **options)
    torch.nn.init.normal_(dense.W_dec.data)
    torch.nn.init.normal_(dense.b_dec)
    return dense


def by_hand(view, x, standardize):
    """f and x̂ in float64, from all scores and a threshold at the K-th largest."""
    x = x.double()
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    inner = (x - mean) / (std + 1e-5) if standardize else x
    scores = (inner - view.b_dec.double()) @ view.W_enc.double() + view.b_enc.double()
    kth = scores.sort(-1, descending=True).values[..., K - 1 : K]
    f = torch.where(scores >= kth, scores, 0).relu()
    x_hat = f @ view.W_dec.double() + view.b_dec.double()
    return f, x_hat * std + mean if standardize else x_hat


@pytest.mark.parametrize("kind", ["SparseTopKSAE", "standardizing", "plain"])
@pytest.mark.parametrize("shape", [(7, D), (2, 5, D), (D,)])
def test_it_computes_the_dense_formula(kind, shape):
    sae = view(kind)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 4 + 2
    f = sae.encode(x)
    expected, x_hat = by_hand(sae, x, kind == "standardizing")
    assert f.shape == (*shape[:-1], M)
    torch.testing.assert_close(f.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(f).double(), x_hat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(f), sae(x), msg="SAEBench decodes twice")


def test_parameters_are_shared():
    sae = view("SparseTopKSAE")
    assert sae.W_enc.shape == (D, M)
    assert sae.W_dec.shape == (M, D)
    assert sae.W_enc.data_ptr() == sae.sae.W_enc.data_ptr()
    assert sae.W_dec is sae.sae.W_dec
    assert (view("plain").b_enc == torch.zeros(M)).all()


def test_decode_requires_the_mean_and_deviation_of_the_same_vectors():
    sae = view("standardizing")
    with pytest.raises(ValueError, match="the vectors encoded last"):
        sae.decode(torch.zeros(7, M))
    sae.encode(torch.randn(7, D))
    with pytest.raises(ValueError, match=r"leading shape \(6,\) after \(7,\)"):
        sae.decode(torch.zeros(6, M))


def test_norms_are_checked_as_in_saebench():
    sae = SparseTopKSAE(D, M, K)
    assert DenseSAE(sae).check_decoder_norms()
    assert DenseSAE(sae.bfloat16()).check_decoder_norms()
    with torch.no_grad():
        sae.float().W_dec[5] *= 1.001
    assert not DenseSAE(sae).check_decoder_norms()


def test_cfg_names_the_source_of_the_residuals():
    cfg = view("standardizing").cfg
    assert (cfg.d_in, cfg.d_sae, cfg.architecture) == (D, M, "topk")
    assert (cfg.hook_name, cfg.hook_layer) == ("blocks.4.hook_resid_post", 4)
    assert (cfg.model_name, cfg.dtype, cfg.device) == ("some/model", "float32", "cpu")
    assert cfg.metadata.hook_name == cfg.hook_name
    assert json.loads(json.dumps(cfg.to_dict()))["activation_fn_kwargs"] == {"k": K}
    single = MLSAE(MLSAEConfig(D, M, K, (3,), model="m"))
    assert DenseSAE(single).cfg.hook_layer == 3
    assert DenseSAE(single, layer=1, model="n").cfg.hook_name == "blocks.1.hook_resid_post"
    with pytest.raises(ValueError, match="layer must be given, one of 1, 4"):
        view("plain", layer=None)


@pytest.mark.parametrize("kind", ["SparseTopKSAE", "standardizing"])
def test_half_precision_stays_half(kind):
    sae = view(kind).to(torch.bfloat16)
    x = torch.randn(7, D)
    f = sae.encode(x.bfloat16())
    assert f.dtype == sae.decode(f).dtype == sae.dtype == torch.bfloat16
    assert sae.encode(x).dtype == torch.bfloat16
