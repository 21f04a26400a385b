"""Fixtures of the kernels' tests, for those modules that ask for them."""

import pytest
import torch

from sparse_topk import torch_residuals
from tests.helpers.residual_ops import DEVICE, D


@pytest.fixture(scope="module")
def poison():
    """An element that nobody writes is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1, device=DEVICE).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "triton"], scope="module")
def backend(request):
    """Both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSE_TOPK_BACKEND", request.param)
        yield request.param


@pytest.fixture(scope="module")
def small_blocks():
    """Blocks of 8 tokens, which are merged one at a time."""
    from sparse_topk.triton_ops import moments

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_residuals, "_BLOCK_BYTES", 8 * D * 4)
        patch.setattr(moments, "merge_blocks_tile", lambda: (1, 8, 1))
        yield
