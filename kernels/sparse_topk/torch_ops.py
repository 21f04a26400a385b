"""The ops in plain torch: what runs on a CPU, and wherever Triton is turned off. They trust their
arguments, which `functional` checks."""

from .torch_encode import keep_topk_ as keep_topk_
from .torch_encode import topk_encode as topk_encode
from .torch_optim import adam_unit_norm_ as adam_unit_norm_
from .torch_optim import apply_rows_ as apply_rows_
from .torch_optim import tangent_momentum_ as tangent_momentum_
from .torch_residuals import aux_residual as aux_residual
from .torch_residuals import decode_error as decode_error
from .torch_residuals import merge_moments as merge_moments
from .torch_residuals import note_active_ as note_active_
from .torch_residuals import reconstruction_error as reconstruction_error
from .torch_residuals import standardize as standardize
from .torch_sparse import CSC as CSC
from .torch_sparse import csc_by_latent as csc_by_latent
from .torch_sparse import decode_backward as decode_backward
from .torch_sparse import gather_dot as gather_dot
from .torch_sparse import gather_sum as gather_sum
from .torch_sparse import scatter_outer as scatter_outer
from .torch_sparse import sum_by_latent as sum_by_latent
