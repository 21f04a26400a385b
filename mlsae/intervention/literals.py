"""The words of an edit."""

from typing import Literal

Op = Literal["add", "scale", "clamp", "ablate"]
Units = Literal["sigma", "max", "mean", "raw"]
