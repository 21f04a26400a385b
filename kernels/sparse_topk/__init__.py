"""TopK sparse autoencoders, fast and small in memory.

from sparse_topk import SparseTopKSAE, UnitNormAdam

sae = SparseTopKSAE(d_in=512, n_latents=32768, k=32)
x_hat = sae(x)  # differentiable; the (tokens, latents) matrix is never stored
"""

from .allocator import keep_freed_memory
from .backend import backend_name
from .functional import Shards, TopK, decode, encode, topk_sae
from .module import SparseTopKSAE
from .optim import UnitNormAdam

__all__ = [
    "Shards",
    "SparseTopKSAE",
    "TopK",
    "UnitNormAdam",
    "backend_name",
    "decode",
    "encode",
    "keep_freed_memory",
    "topk_sae",
]
