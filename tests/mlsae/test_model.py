"""The MLSAE against its definition, written out by hand.

Legend: L layers, N tokens, D inputs, M latents, K active latents per token.
"""

import json

import pytest
import torch

from mlsae import MLSAE, MLSAEConfig
from mlsae.errors import InputError
from mlsae.training.init import geometric_median

L, N, D, M, K = 3, 20, 6, 32, 4


def make(standardize=True, seed=0):
    torch.manual_seed(seed)
    mlsae = MLSAE(MLSAEConfig(D, M, K, tuple(range(L)), standardize)).double()
    with torch.no_grad():
        mlsae.sae.b_dec.normal_()
        mlsae.sae.W_enc.normal_()
    return mlsae


def residuals(seed=1):
    """(L, N, D), each layer of another scale and mean."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    return torch.randn(L, N, D, generator=generator) * scale + 3 * scale


def by_hand(mlsae, vector):
    """x̂ of one vector: the paper's formulas, one line each."""
    mean, std = vector.mean(), vector.std(correction=1)
    standard = (vector - mean) / (std + 1e-5) if mlsae.config.standardize else vector
    scores = mlsae.sae.W_enc @ (standard - mlsae.sae.b_dec)
    codes = torch.zeros(M, dtype=torch.float64)
    for j in sorted(range(M), key=lambda j: -scores[j].item())[:K]:
        codes[j] = max(scores[j].item(), 0)
    out = codes @ mlsae.sae.W_dec + mlsae.sae.b_dec
    return out * std + mean if mlsae.config.standardize else out


@pytest.mark.parametrize("standardize", [True, False])
def test_forward_is_the_papers_formula(standardize):
    mlsae, x = make(standardize), residuals().double()
    x_hat = mlsae(x)
    for layer in range(L):
        for n in range(3):
            torch.testing.assert_close(x_hat[layer, n], by_hand(mlsae, x[layer, n]))


@pytest.mark.parametrize("standardize", [True, False])
def test_a_reconstruction_is_its_output_error_and_codes(standardize):
    """In one pass what `forward` and `encode` give one by one, and differentiable."""
    mlsae, x = make(standardize), residuals().double()
    reconstruction = mlsae.reconstruct(x)
    torch.testing.assert_close(reconstruction.x_hat, mlsae(x), rtol=0, atol=0)
    torch.testing.assert_close(reconstruction.error, x - mlsae(x))
    for part, expected in zip(reconstruction.codes, mlsae.encode(x), strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=0)
    gradient, expected = (
        torch.autograd.grad(out.square().sum(), mlsae.sae.W_dec)[0]
        for out in (reconstruction.error, x - mlsae(x))
    )
    torch.testing.assert_close(gradient, expected)


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_has_the_dtype_of_the_input(standardize, weights, dtype):
    """So that it can take the residual's place; errors and activations are not rounded to it."""
    mlsae, x = make(standardize).to(weights), residuals()[:2].to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    reconstruction = mlsae.reconstruct(x)
    assert mlsae(x).dtype == reconstruction.x_hat.dtype == dtype
    assert torch.equal(mlsae(x), mlsae(x.to(wide)).to(dtype))
    assert torch.equal(reconstruction.error, mlsae.reconstruct(x.to(wide)).error)
    assert reconstruction.error.dtype == wide
    assert mlsae.encode(x).values.dtype == reconstruction.codes.values.dtype == weights
    with torch.autocast("cpu", torch.bfloat16):
        assert mlsae(x).dtype == dtype
        assert mlsae.encode(x).values.dtype == torch.bfloat16


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"x must be of a floating-point dtype, got torch\.int64"):
        make()(torch.ones(2, D, dtype=torch.int64))


def test_a_constant_vector_stays_finite():
    mlsae = make()
    assert torch.isfinite(mlsae(torch.full((2, D), 7.0))).all()


def test_save_and_load_are_bitwise(tmp_path):
    mlsae = make().float()
    mlsae.save_pretrained(tmp_path, note="kept")
    other = MLSAE.from_pretrained(tmp_path)
    assert other.config == mlsae.config
    for one, two in zip(mlsae.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert two.requires_grad
    assert json.loads((tmp_path / "config.json").read_text())["note"] == "kept"
    import safetensors.torch

    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    assert shapes == {"W_enc": (M, D), "W_dec": (M, D), "b_dec": (D,)}


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "cut", "shape"])
def test_a_damaged_folder_is_named(tmp_path, damage):
    make().float().save_pretrained(tmp_path)
    if damage == "cut":
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "shape":
        file = tmp_path / "config.json"
        file.write_text(file.read_text().replace(f'"n_latents": {M}', '"n_latents": 40'))
    else:
        (tmp_path / damage).unlink()
    with pytest.raises(InputError, match="RUN must be the folder of a trained MLSAE"):
        MLSAE.from_pretrained(tmp_path)


def test_the_geometric_median_minimizes_the_summed_distance():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(99, 3), torch.full((10, 3), 1e4)]).double()
    center = geometric_median(x)
    assert center.norm() < 1, "outliers do not move it, as they move the mean"
    distance = (x - center).norm(dim=1).sum()
    for step in torch.eye(3, dtype=torch.float64) * 1e-2:
        assert (x - center - step).norm(dim=1).sum() > distance
        assert (x - center + step).norm(dim=1).sum() > distance


def test_the_geometric_median_may_be_a_point():
    x = torch.tensor([[0.0, 0.0]] * 5 + [[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(geometric_median(x), torch.zeros(2), atol=1e-4, rtol=0)
