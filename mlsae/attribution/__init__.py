"""Attribution: which latents, at which tokens and layers, a prediction or a latent rests on."""

from .result import Trace
from .run import trace
from .targets import LatentTarget, LogitTarget

__all__ = ["LatentTarget", "LogitTarget", "Trace", "trace"]
