"""The result of an analysis, as analysis.json holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..bootstrap import Interval
from ..evaluation.provenance import Provenance
from .accumulate import Adjacent
from .flow import Flow
from .geometry import Directions
from .layer_spread import RATIOS
from .stability import Stability


@dataclass(frozen=True)
class AnalysisResult:
    """At which layers latents are active, with intervals, and where the numbers come from."""

    provenance: Provenance
    spread: dict[str, Interval]
    """`LayerSpread` by name: the paper's equations."""
    released: dict[str, Interval]
    """The `RATIOS` by name, as the paper's released code estimates them."""
    directions: Directions
    adjacent: Adjacent
    flow: Flow | None
    """None if there is a single layer."""
    stability: Stability | None
    """None if there is no other SAE to compare with."""
    count_threshold: int
    """Tokens at which a latent must be active for a layer to count as one of its own."""
    active_latents: int
    examples: int
    """Rows of analysis_examples.parquet."""
    pass_seconds: float
    """Seconds of the pass over the text."""

    def as_dict(self) -> dict[str, Any]:
        """The content of analysis.json, JSON-serializable: None stands for NaN. The variances
        appear without their intervals."""
        return {
            **self.provenance.as_dict(),
            "count_threshold": self.count_threshold,
            "active_latents": self.active_latents,
            "ratios": {
                estimator: {
                    name: metrics[name].as_dict()
                    if name in ("A", "B")
                    else metrics[name].as_dict()["value"]
                    for name in RATIOS
                }
                for estimator, metrics in (("equations", self.spread), ("released", self.released))
            },
            "entropy": {
                "profile": self.spread["entropy"].as_dict(),
                "totals": self.spread["entropy_totals"].as_dict(),
            },
            **self.directions.as_dict(),
            "adjacent": self.adjacent.as_dict(),
            **({"flow": self.flow.as_dict()} if self.flow else {}),
            **({"stability": self.stability.as_dict()} if self.stability else {}),
            "examples": self.examples,
            "pass_seconds": self.pass_seconds,
        }
