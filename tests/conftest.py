"""Kernels run on the GPU where there is one, else under Triton's interpreter."""

import os

import pytest
import torch

# Triton reads it at its first import, so it is set before any kernel is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def team():
    """Four processes in a gloo group, for all tests that want them."""
    from tests.helpers.team import Team

    with Team(4) as processes:
        yield processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
