"""A trace: what a target rests on, as numbers and names that JSON can hold.

Legend: L layers below the target, T tokens up to it, P nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .ablation import Check, pearson, spearman
from .gradient import Attribution
from .targets import LogitTarget, Target


class LatentFlow(NamedTuple):
    """A latent at a token, along the layers. Its attributions are not summands: see `gradient`."""

    token: int
    """Position."""
    latent: int
    layers: list[int]
    """Those at which it is active and its attribution is not 0, ascending."""
    activation: list[float]
    attribution: list[float]

    @property
    def strength(self) -> float:
        """The largest |attribution|."""
        return max(map(abs, self.attribution))


@dataclass(frozen=True)
class Trace:
    """What a target rests on in one text."""

    model: str
    """The transformer's name."""
    ids: list[int]
    """Of the tokens, up to the target's: what follows it has no part in it."""
    tokens: list[str]
    """Their texts."""
    layers: list[int]
    """Those below the target."""
    target: Target
    name: str
    """The target in words, such as "logit of ' Paris' − logit of ' London'"."""
    attribution: Attribution
    checks: list[Check]
    """Of the strongest latents, then of the strongest errors."""

    def flows(self, n: int | None = None) -> list[LatentFlow]:
        """The n strongest flows, by their largest |attribution|; all if None."""
        nodes = self.attribution.nodes
        groups: dict[tuple[int, int], list[tuple[int, float, float]]] = {}
        columns = (nodes.token, nodes.latent, nodes.layer, nodes.activation, nodes.attribution)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for token, latent, layer, h, effect in rows:  # the strongest first
            known = groups.get((token, latent))
            if known is None:
                groups[token, latent] = known = []
            known.append((layer, h, effect))
        chosen = list(groups.items())[:n]
        return [
            LatentFlow(token, latent, *(list(part) for part in zip(*sorted(own), strict=True)))
            for (token, latent), own in chosen
        ]

    def of_latents(self) -> list[Check]:
        """The checks of latents."""
        return [check for check in self.checks if check.latent is not None]

    def of_errors(self) -> list[Check]:
        """The checks of errors."""
        return [check for check in self.checks if check.latent is None]

    def as_dict(self, n_nodes: int | None = None, n_flows: int = 50) -> dict[str, Any]:
        """JSON-serializable; with n_nodes, of the strongest so many nodes only."""
        found = self.attribution
        nodes = {name: column[:n_nodes].tolist() for name, column in found.nodes._asdict().items()}
        logit = isinstance(self.target, LogitTarget)
        return {
            "model": self.model,
            "ids": self.ids,
            "tokens": self.tokens,
            "layers": self.layers,
            "target": {"kind": "logit" if logit else "latent", **vars(self.target)}
            | {"name": self.name, "value": found.value, "position": len(self.ids) - 1},
            "n_nodes": len(found.nodes.token),
            "nodes": nodes,
            "flows": [flow._asdict() for flow in self.flows(n_flows)],
            "latents": found.latents.tolist(),
            "errors": found.errors.tolist(),
            "constants": found.constants.tolist(),
            "checks": [check._asdict() for check in self.checks],
            "correlation": {
                "latents": _correlations(self.of_latents()),
                "errors": _correlations(self.of_errors()),
            },
            "edges": [edge._asdict() for edge in found.edges],
        }


def _correlations(checks: Sequence[Check]) -> dict[str, float | None]:
    return {"pearson": pearson(checks), "spearman": spearman(checks)}
