"""Multi-layer sparse autoencoders: one TopK SAE for the residual stream of every layer.

from mlsae import MLSAE

mlsae = MLSAE.from_pretrained("runs/demo")
values, indices = mlsae.encode(residuals)  # (…, d_model) → (…, k)
"""

from .model import MLSAE, MLSAEConfig

__all__ = ["MLSAE", "MLSAEConfig"]
