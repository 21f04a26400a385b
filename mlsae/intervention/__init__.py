"""Interventions: change latents of an MLSAE while a transformer runs, and see what it then does."""

from .activations import Activations, read_activations
from .context import intervene
from .edits import Edit, Replace
from .opening import OpenConfig, Opened, open_run

__all__ = [
    "Activations", "Edit", "OpenConfig", "Opened", "Replace", "intervene", "open_run",
    "read_activations",
]  # fmt: skip
