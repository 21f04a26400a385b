"""Parts of a batch, as training takes them."""

import torch

from mlsae.data.stream import Residuals


def unmasked(x):
    """Residuals x (L, N, D), all tokens of which count."""
    return Residuals(x, torch.ones(x.shape[1], dtype=torch.bool, device=x.device))
