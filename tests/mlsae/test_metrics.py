"""Metrics against closed forms and direct computation.

Legend: L layers, N tokens, K active latents per token.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsae import metrics


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 2**20))
@settings(deadline=None, max_examples=50)
def test_moments_do_not_depend_on_the_split(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, sum(sizes), 3, generator=generator, dtype=torch.float64) * 3 + 100
    moments = metrics.Moments(2, 3)
    for part in x.split(sizes, dim=1):
        moments.update(part)
    assert moments.n_tokens == sum(sizes)
    if moments.n_tokens:
        expected = (x - x.mean(1, keepdim=True)).square().sum(2).mean(1)
        torch.testing.assert_close(moments.variance(), expected)
        flat = x.flatten(1)
        paper = 3 * flat.var(1, correction=0)
        torch.testing.assert_close(moments.variance_of_elements(), paper)


def test_fvu_of_the_mean_vector_is_one():
    x = torch.randn(2, 500, 3, dtype=torch.float64) + torch.tensor([5.0, 0.0, -50.0])
    moments = metrics.Moments(2, 3)
    moments.update(x)
    sq_error = (x - x.mean(1, keepdim=True)).square().sum((1, 2))
    torch.testing.assert_close(
        metrics.fvu(sq_error, 500, moments), torch.ones(2, dtype=torch.float64)
    )
    # About one scalar mean, the spread of the dimensions' means counts as variance.
    assert (metrics.fvu_paper(sq_error, 500, moments) < 0.01).all()


def test_mean_layer_and_entropy_in_closed_form():
    totals = torch.tensor([[1.0, 1, 1, 1], [0, 0, 7, 0], [3, 0, 0, 3], [0, 0, 0, 0]]).double()
    mean = metrics.mean_layer(totals)
    entropy = metrics.normalized_entropy(totals)
    assert mean[:3].tolist() == [1.5, 2.0, 1.5]
    assert entropy[:3].tolist() == pytest.approx([1.0, 0.0, 0.5])
    assert math.isnan(mean[3])
    assert math.isnan(entropy[3])


def test_latent_layer_totals():
    values = torch.tensor([[[1.0, 2.0], [0.5, 0.0]], [[4.0, 0.0], [1.0, 1.0]]])  # (L, N, K)
    indices = torch.tensor([[[0, 2], [0, 1]], [[1, 2], [0, 2]]])
    totals, counts = metrics.latent_layer_totals(values, indices, 4)
    assert totals.tolist() == [[1.5, 1.0], [0.0, 4.0], [2.0, 1.0], [0.0, 0.0]]
    assert counts.tolist() == [[2, 1], [0, 1], [1, 1], [0, 0]]
