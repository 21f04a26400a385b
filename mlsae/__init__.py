"""Multi-layer sparse autoencoders: one TopK SAE for the residual stream of every layer.

from mlsae import MLSAE

mlsae = MLSAE.from_pretrained("runs/demo")  # a folder, or a name on the Hugging Face hub
values, indices = mlsae.encode(residuals)  # (…, d_model) → (…, k)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dense import DenseSAE
    from .model import MLSAE, MLSAEConfig, load_sae

__all__ = ["MLSAE", "DenseSAE", "MLSAEConfig", "load_sae"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562): torch, which it needs, takes
    seconds, and the help of a program does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(".dense" if name == "DenseSAE" else ".model", __name__)
    return globals().setdefault(name, getattr(module, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
