"""Interventions: change latents of an MLSAE while a transformer runs, and see what it then does."""

from .activations import Activations, read_activations
from .context import intervene
from .edits import Edit, Replace

__all__ = ["Activations", "Edit", "Replace", "intervene", "read_activations"]
