"""Multi-layer sparse autoencoders: one TopK SAE for the residual stream of every layer.

from mlsae import MLSAE

mlsae = MLSAE.from_pretrained("runs/demo")  # a folder, or a name on the Hugging Face hub
values, indices = mlsae.encode(residuals)  # (…, d_model) → (…, k)
"""

from .dense import DenseSAE
from .model import MLSAE, MLSAEConfig, load_sae

__all__ = ["MLSAE", "DenseSAE", "MLSAEConfig", "load_sae"]
