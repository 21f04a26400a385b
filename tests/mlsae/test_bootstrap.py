"""Bootstrap intervals: how the two kinds differ, and when there is none.

Legend: B resamples, U units.
"""

import math

import pytest
import torch

from mlsae.bootstrap import draw_counts, percentile_interval, recentered_interval


def test_a_draw_has_as_many_units_as_there_are():
    counts = draw_counts(7, 50, seed=0)
    assert counts.shape == (50, 7)
    assert (counts.sum(1) == 7).all()
    assert torch.equal(counts, draw_counts(7, 50, seed=0))
    assert not torch.equal(counts, draw_counts(7, 50, seed=1))


def test_recentering_moves_the_percentile_interval_by_the_bias_of_the_resamples():
    x = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = draw_counts(5, 4000, seed=0) / 5
    value = x.var(correction=0)
    samples = weights @ x.square() - (weights @ x).square()
    assert samples.mean().item() == pytest.approx(4 / 5 * value.item(), rel=0.02)
    plain = percentile_interval(value, samples, 5)
    recentered = recentered_interval(value, samples)
    bias = samples.mean() - value
    torch.testing.assert_close(recentered.low, plain.low - bias)
    torch.testing.assert_close(recentered.high, plain.high - bias)


def test_one_unit_has_no_interval():
    samples = torch.full((5,), 2.0, dtype=torch.float64)
    for interval in (recentered_interval(samples[0], samples),
                     percentile_interval(samples[0], samples, 1)):  # fmt: skip
        assert interval.as_dict() == {"value": 2.0, "low": None, "high": None}
    assert recentered_interval(samples[0] * math.nan, samples).as_dict()["value"] is None
