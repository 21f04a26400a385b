"""The ops in Triton, with the names, arguments and results of `torch_ops`."""

from .adam import adam_unit_norm_
from .backward import decode_backward
from .bookkeeping import merge_moments, note_active_
from .decode import decode_error, reconstruction_error
from .keep_topk import keep_topk_
from .normuon import apply_rows_, tangent_momentum_
from .residual import aux_residual
from .sparse import CSC, csc_by_latent, gather_dot, gather_sum, scatter_outer, sum_by_latent
from .standardization import standardize
from .topk import topk_encode

__all__ = [
    "CSC",
    "adam_unit_norm_",
    "apply_rows_",
    "aux_residual",
    "csc_by_latent",
    "decode_backward",
    "decode_error",
    "gather_dot",
    "gather_sum",
    "keep_topk_",
    "merge_moments",
    "note_active_",
    "reconstruction_error",
    "scatter_outer",
    "standardize",
    "sum_by_latent",
    "tangent_momentum_",
    "topk_encode",
]
