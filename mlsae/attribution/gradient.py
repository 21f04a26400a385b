"""Attribution by gradient times activation: one forward pass and one backward pass.

An MLSAE writes the residual vector x at a layer and token as

    x = σ · (Σ_j h_j · W_dec[j] + b_dec) + μ + error,

or with a lens A⁻¹ (that − b) + error, with W_dec[j] carried back as A⁻¹ W_dec[j] in what follows,
and the target y depends on each part. With g = ∂y/∂x, through all that the model computes from x,

    attribution of latent j = h_j · ∂y/∂h_j = h_j · σ · (W_dec[j] · g)
    of the error            = error · g
    of the constants        = (σ · b_dec + μ) · g
    they add up to            x · g, at each layer and token

σ and μ are held as they are, although they are x's own, as `Edit` holds them. An attribution
estimates by how much y falls if the part is ablated: x' = x − h_j · σ · W_dec[j], or x̂ for the
error. These nodes, errors among them, and this estimate are those of sparse feature circuits (Marks
et al., arXiv 2403.19647, section 3), with 0 as the baseline. Edges there are of direct paths, and
here of all.

Nodes of successive layers are the same stream: what is at layer ℓ is mostly still there at ℓ + 1,
and is attributed at both. So the sum over one layer's nodes is meaningful, and that over layers is
not.

Legend: L layers below the target, T tokens, D width of the residual stream, M latents, K active
latents per token, P nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_topk import TopK

from ..data.residuals import ResidualReader
from ..errors import InputError
from ..model import MLSAE, Standardized
from .targets import Target, activation


class Nodes(NamedTuple):
    """Active latents whose attribution is not 0, the strongest first, on the CPU."""

    token: Tensor
    """(P,) position."""
    layer: Tensor
    """(P,) the transformer's layer."""
    latent: Tensor
    """(P,) id."""
    activation: Tensor
    """(P,) h."""
    attribution: Tensor
    """(P,) in the target's units."""


class Edge(NamedTuple):
    """What one node does to another above it."""

    source: int
    """Index of a node."""
    sink: int
    weight: float
    """Of the sink's attribution, so much rests on the source, by all paths between them:
    h_source · ∂h_sink/∂h_source · (attribution of the sink) / h_sink."""


class Attribution(NamedTuple):
    """What a target rests on."""

    value: float
    """The target."""
    nodes: Nodes
    latents: Tensor
    """(L, T) summed attribution of all latents at a layer and token, float64 as the next two."""
    errors: Tensor
    """(L, T)"""
    constants: Tensor
    """(L, T)"""
    edges: list[Edge]


class _Layer(NamedTuple):
    """The latents of the residual vectors of a layer, and how they are written into them."""

    mlsae: MLSAE
    standard: Standardized
    codes: TopK

    def slopes(self, grad: Tensor) -> Tensor:
        """∂y/∂h of the active latents, (T, K), from grad = ∂y/∂x (T, D)."""
        values = self.codes.values.detach().requires_grad_()
        with torch.enable_grad():
            x_hat = self.standard.invert(self.mlsae.sae.decode(TopK(values, self.codes.indices)))
        return torch.autograd.grad(x_hat, values, grad.to(x_hat.dtype))[0]


def attribute(
    mlsae: MLSAE, reader: ResidualReader, ids: Tensor, target: Target, n_edges: int = 0
) -> Attribution:
    """What `target` rests on in a forward pass of ids (T,); and, among the `n_edges` strongest
    nodes, what rests on what, by one more backward pass for each.

    Raises InputError if attributions are not finite."""
    inputs = ids[None].to(mlsae.sae.W_dec.device)
    residuals, logits = reader.with_graph(inputs)
    with torch.enable_grad():
        value = target.value(mlsae, reader.layers, residuals, logits)
    below = target.below(reader.layers)
    grads = torch.autograd.grad(value, residuals[:below], retain_graph=n_edges > 0)
    layers: list[_Layer] = []
    effects: list[Tensor] = []
    errors: list[Tensor] = []
    constants: list[Tensor] = []
    with torch.no_grad():
        for name, x, grad in zip(reader.layers, residuals, grads, strict=False):
            parts = mlsae.reconstruct(x[0].detach(), name)
            layers.append(_Layer(mlsae, parts.standard, parts.codes))
            effects.append(layers[-1].slopes(grad[0]) * parts.codes.values)
            constant = parts.standard.invert(mlsae.sae.b_dec.expand_as(parts.error))
            for part, sums in ((parts.error, errors), (constant, constants)):
                sums.append((part * grad[0].double()).sum(-1).cpu())
    nodes, places = _nodes(reader.layers, layers, effects)
    edges = _edges(mlsae, reader.layers, residuals, layers, nodes, places, n_edges)
    latents = [effect.double().sum(-1).cpu() for effect in effects]
    a, b, c = (torch.stack(part) for part in (latents, errors, constants))
    if not torch.stack([a, b, c]).isfinite().all():  # or the target, whose gradient is then none
        raise InputError(
            "RUN and MODEL must give finite predictions and attributions, and here some are not; "
            "check that their files are whole"
        )
    return Attribution(value.item(), nodes, a, b, c, edges)


def _nodes(
    names: Sequence[int], layers: Sequence[_Layer], effects: Sequence[Tensor]
) -> tuple[Nodes, Tensor]:
    """The nodes of attributions (T, K) by layer, and where each is: layer, token, rank (P, 3)."""
    attribution = torch.stack(list(effects)).cpu()  # (L, T, K)
    places = attribution.nonzero()
    order = attribution[tuple(places.T)].abs().argsort(descending=True, stable=True)
    places = places[order]
    layer, token, rank = places.T
    values, indices = (
        torch.stack([layer.codes[i] for layer in layers]).cpu()[tuple(places.T)] for i in (0, 1)
    )
    named = torch.tensor(names)[layer]
    return Nodes(token, named, indices, values, attribution[layer, token, rank]), places


def _edges(
    mlsae: MLSAE,
    names: Sequence[int],
    residuals: Sequence[Tensor],
    layers: Sequence[_Layer],
    nodes: Nodes,
    places: Tensor,
    n: int,
) -> list[Edge]:
    """What rests on what among the n strongest nodes, the strongest edges first."""
    chosen = places[: min(n, len(places))].tolist()
    edges: list[Edge] = []
    for sink, (layer, token, _) in enumerate(chosen):
        sources = [i for i, place in enumerate(chosen) if place[0] < layer and place[1] <= token]
        if not sources:
            continue
        with torch.enable_grad():
            x = residuals[layer][0, token]
            h = activation(mlsae, x, int(nodes.latent[sink]), names[layer])
        lowest = min(chosen[i][0] for i in sources)
        wanted = residuals[lowest:layer]
        grads = torch.autograd.grad(h, wanted, retain_graph=True)
        share = nodes.attribution[sink].item() / nodes.activation[sink].item()
        slopes: dict[int, Tensor] = {}
        for source in sources:
            below, at, rank = chosen[source]
            if below not in slopes:
                slopes[below] = layers[below].slopes(grads[below - lowest][0])
            slope = slopes[below][at, rank].item()
            weight = slope * nodes.activation[source].item() * share
            if weight:
                edges.append(Edge(source, sink, weight))
    return sorted(edges, key=lambda edge: -abs(edge.weight))
