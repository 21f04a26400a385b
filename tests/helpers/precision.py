"""Dtypes to test in."""

import pytest
import torch

low_precision = pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
"""Half precision; bfloat16 on a GPU only, since Triton's interpreter cannot calculate in it."""
