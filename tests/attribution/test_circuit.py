"""A planted circuit is found: by a trace of one text, and by the flow of latents over many tokens.

Legend: L layers, N tokens, M latents.
"""

import pytest
import torch

from mlsae.analysis.flow import FlowCounts
from mlsae.attribution.gradient import attribute
from mlsae.attribution.targets import LatentTarget, LogitTarget
from mlsae.data.residuals import ResidualReader
from sparse_topk import TopK
from tests.helpers.circuit import LATENT_A, LATENT_B, TARGET, A, V, planted

IDS = torch.tensor([1, 7, A, 3])  # A at 2, the target after 3
OTHER = 4  # a token whose logit says nothing


@pytest.fixture(scope="module")
def circuit():
    model, mlsae = planted()
    return mlsae, ResidualReader(model)


def rows(nodes):
    return list(zip(*(column.tolist() for column in nodes), strict=True))


def test_a_trace_finds_the_planted_latents_and_what_leads_from_one_to_the_other(circuit):
    found = attribute(*circuit, IDS, LogitTarget(TARGET, OTHER), n_edges=4)
    model = circuit[1].model
    # 3 · 1.5 of b at the last token, times what it adds to the difference of the logits
    expected = 4.5 * (model.unembed[LATENT_B, TARGET] - model.unembed[LATENT_B, OTHER]).item()
    strongest = {layer: (token, latent) for token, layer, latent, *_ in rows(found.nodes)[2::-1]}
    assert strongest == {0: (2, A), 1: (2, LATENT_A), 2: (3, LATENT_B)}
    assert found.nodes.attribution[:3].tolist() == pytest.approx([expected] * 3, rel=1e-2)
    assert found.errors.abs().max() < 1e-5
    ends = rows(found.nodes)
    (between,) = (
        edge for edge in found.edges
        if ends[edge.source][1:3] == (1, LATENT_A) and ends[edge.sink][1:3] == (2, LATENT_B)
    )  # fmt: skip
    assert between.weight == pytest.approx(ends[between.sink][4], rel=1e-4)


def test_a_latent_is_traced_to_the_one_that_causes_it(circuit):
    found = attribute(*circuit, IDS, LatentTarget(LATENT_B, 2))
    assert found.value == pytest.approx(4.5)
    expected = [(2, 0, A, 1.0, 4.5), (2, 1, LATENT_A, 3.0, 4.5)]  # and nothing else
    assert sorted(rows(found.nodes), key=lambda row: row[1]) == expected


def test_the_flow_of_many_tokens_has_the_planted_pair_first(circuit):
    mlsae, reader = circuit
    ids = torch.randint(0, V, (40, 50), generator=torch.Generator().manual_seed(3))
    x = reader(ids).flatten(1, 2)  # (L, N, D)
    codes = mlsae.encode(x)
    active = torch.zeros(mlsae.config.n_latents, len(x), dtype=torch.int64)
    for layer in range(len(x)):
        own = codes.indices[layer][codes.values[layer] > 0]
        active[:, layer] = own.bincount(minlength=len(active))
    counts = FlowCounts(len(active), len(x), x.shape[1], x.device)
    counts.update(TopK(*codes))
    pairs = counts.finish(active).pairs
    assert (pairs.ended[0], pairs.began[0]) == (LATENT_A, LATENT_B)
    assert pairs.share[0] == 1
    assert pairs.chance[0] < 0.25
    assert pairs.strength[0] > 3 * pairs.strength[1]
