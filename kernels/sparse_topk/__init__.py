"""TopK sparse autoencoders, fast and small in memory.

from sparse_topk import SparseTopKSAE, UnitNormAdam

sae = SparseTopKSAE(d_in=512, n_latents=32768, k=32)
x_hat = sae(x)  # differentiable; the (tokens, latents) matrix is never stored
"""

from .allocator import keep_freed_memory
from .codes import SAEOutput, Shards, TopK
from .functional import sparse_decode, topk_encode, topk_sae
from .hub import SparseTopKSAE
from .normuon import NorMuon
from .ops import backend_name
from .optim import UnitNormAdam

__all__ = [
    "NorMuon",
    "SAEOutput",
    "Shards",
    "SparseTopKSAE",
    "TopK",
    "UnitNormAdam",
    "backend_name",
    "keep_freed_memory",
    "sparse_decode",
    "topk_encode",
    "topk_sae",
]
