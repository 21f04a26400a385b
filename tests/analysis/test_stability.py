"""Which latents another training finds again, against hand-computed cases and brute force.

Legend: M latents, D inputs.
"""

import json
import shutil

import numpy as np
import pandas
import pytest
import torch

from mlsae import MLSAE
from mlsae.analysis import stability as module
from mlsae.analysis.beside import runs_beside
from mlsae.analysis.geometry import random_cosines
from mlsae.analysis.run import AnalyzeConfig, analyze
from mlsae.analysis.stability import LatentRows, Stability, match, stability
from mlsae.analysis.summary import print_analysis
from mlsae.cli import parse
from mlsae.formats.saved import read_tensors
from tests.helpers.programs import SMALL, program


def draw(n, d, seed, dead=()):
    generator = torch.Generator().manual_seed(seed)
    active = torch.ones(n, dtype=torch.bool)
    active[list(dead)] = False
    lengths = torch.rand(2, n, 1, generator=generator) + 0.5
    return LatentRows(*(torch.randn(2, n, d, generator=generator) * lengths), active)


def test_matches_by_hand():
    """In the plane: 0 and 1 both lie nearest to the other's 1, which lies nearest to 1."""
    decoder = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0], [5.0, 0.0]])
    encoder = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    one = LatentRows(decoder, encoder, torch.tensor([True, True, True, False]))
    other = LatentRows(
        torch.tensor([[0.0, 0.0], [0.0, 1.0], [-6.0, -8.0], [9.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 7.0], [0.0, -3.0], [1.0, 0.0]]),
        torch.tensor([True, True, True, False]),  # 0 is pruned, and 3 was never active
    )
    found = match(one, other, seed=0)
    assert found.latent.tolist() == [1, 1, 2, -1]
    nan = float("nan")
    assert found.decoder.tolist() == pytest.approx([0.8, 1, 0.6, nan], nan_ok=True)
    assert found.encoder.tolist() == pytest.approx([0, 0.5**0.5, -1, nan], nan_ok=True)
    assert found.mutual.tolist() == [False, True, True, False]


def test_a_pruned_latent_is_nobody_s_match():
    """Its cosine, 0, would be the largest."""
    one = LatentRows(torch.tensor([[1.0, 0.0]]), torch.ones(1, 2), torch.tensor([True]))
    other = LatentRows(
        torch.tensor([[0.0, 0.0], [-2.0, 0.0]]), torch.ones(2, 2), torch.tensor([True, True])
    )
    found = match(one, other, seed=0)
    assert (found.latent.item(), found.decoder.item(), found.mutual.item()) == (1, -1, True)


def test_a_permuted_copy_has_every_latent_again():
    one = draw(50, 8, 0)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    other = LatentRows(*(rows[order] for rows in one))
    found = match(one, other, seed=0)
    assert order[found.latent].tolist() == list(range(50))
    assert found.mutual.all()
    for cosines in (found.decoder, found.encoder):
        assert cosines.tolist() == pytest.approx([1] * 50, abs=1e-6)
        assert cosines.max() <= 1 + 1e-6
    # A direction's opposite is another direction.
    opposite = match(one, one._replace(decoder=-one.decoder), seed=0)
    assert opposite.decoder.max() < 0.999


def brute_force(one, other):
    """Each first latent's match, the cosines, and whether it is mutual: all cosines in float64."""

    def cosines(a, b):
        a, b = (rows.detach().double().numpy() for rows in (a, b))
        return a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)

    decoder, encoder = cosines(one.decoder, other.decoder), cosines(one.encoder, other.encoder)
    decoder[~one.active.numpy()] = decoder[:, ~other.active.numpy()] = -np.inf
    best, back = decoder.argmax(1), decoder.argmax(0)
    return {
        i: (best[i], decoder[i, best[i]], encoder[i, best[i]], back[best[i]] == i)
        for i in np.flatnonzero(one.active)
    }


def test_matches_are_those_of_brute_force_whatever_is_computed_at_a_time():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    size = st.integers(1, 12)

    @hypothesis.given(size, size, st.integers(1, 6), st.integers(0, 99), st.integers(1, 60))
    @hypothesis.settings(max_examples=60, deadline=None)
    def check(n, m, d, seed, elements):
        dead = [[i for i in range(size) if (seed >> i) % 3 == 2] for size in (n, m)]
        one, other = (draw(size, d + 1, seed + i, dead[i]) for i, size in enumerate((n, m)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_COSINES_ELEMENTS", elements)
            patch.setattr(module, "_CHANCE_DIRECTIONS", 8)
            found = match(one, other, seed)
        expected = brute_force(one, other) if other.active.any() and one.active.any() else {}
        for i in range(n):
            if i not in expected:
                assert found.latent[i] == -1
                assert found.decoder[i].isnan()
                assert found.encoder[i].isnan()
                assert not found.mutual[i]
                continue
            j, decoder, encoder, mutual = expected[i]
            assert (found.latent[i], bool(found.mutual[i])) == (j, mutual)
            assert found.decoder[i].item() == pytest.approx(decoder, abs=1e-6)
            assert found.encoder[i].item() == pytest.approx(encoder, abs=1e-6)

    check()


def test_chance_is_the_largest_cosine_of_random_directions():
    """Against the expected largest of n independent cosines, by the density of one. It has no part
    in what the latents of the first SAE point at."""
    d, n = 24, 3000
    one, other = draw(10, d, 0), draw(n, d, 1, dead=range(1000))
    chance = match(one, other, 0).chance
    *_, expected = random_cosines(torch.linspace(-1, 1, 3), d, 2001)  # the largest of 2000
    error = chance.std().item() / len(chance) ** 0.5
    assert chance.mean().item() == pytest.approx(expected, abs=5 * error)
    assert torch.equal(chance, match(other, other, 0).chance)
    assert not torch.equal(chance, match(one, other, 1).chance)


def test_columns_are_means_over_the_others_and_the_summary_is_over_pairs():
    t, f, nan = True, False, float("nan")

    def found(latent, decoder, encoder, mutual):
        return module.Match(
            torch.tensor(latent), torch.tensor(decoder), torch.tensor(encoder),
            torch.tensor(mutual), torch.tensor([0.1, 0.3]),
        )  # fmt: skip

    both = Stability(
        ["runs/a", "runs/b"],
        [
            found([4, 2, -1], [0.95, 0.5, nan], [0.9, 0.1, nan], [t, t, f]),
            found([0, 1, -1], [0.75, 0.8, nan], [0.5, 0.3, nan], [t, f, f]),
        ],
    )
    columns = both.columns()
    for name, expected in {
        "match_decoder": [0.85, 0.65, nan],
        "match_encoder": [0.7, 0.2, nan],
        "match_mutual": [1, 0.5, nan],
    }.items():
        assert columns[name].tolist() == pytest.approx(expected, nan_ok=True)
    assert columns["match_latents"] == [[4, 0], [2, 1], [-1, -1]]
    summary = both.as_dict()
    assert summary["others"] == ["runs/a", "runs/b"]
    assert summary["pairs"] == 4
    assert summary["median"] == pytest.approx(0.775)
    assert summary["mutual"] == 0.75
    assert summary["mutual_above"] == {"0.7": 0.5, "0.9": 0.25}
    assert summary["chance"] == pytest.approx({"median": 0.2, "upper": 0.3})
    histogram = summary["histogram"]
    assert (sum(histogram["match"]), sum(histogram["chance"])) == (4, 4)
    at = int(np.searchsorted(histogram["edges"], 0.95)) - 1
    assert histogram["match"][at] == 1


def test_latents_that_none_of_the_others_can_match_are_null():
    nobody = draw(6, 4, 1, dead=range(6))
    alone = stability(draw(5, 4, 0), [("a", nobody)], 0)
    assert np.isnan(alone.columns()["match_mutual"].numpy()).all()
    summary = alone.as_dict()
    assert (summary["pairs"], summary["median"], summary["chance"]["upper"]) == (0, None, None)
    json.dumps(summary, allow_nan=False)
    # One of two without active latents does not count.
    again = stability(draw(5, 4, 0), [("a", nobody), ("b", draw(6, 4, 2))], 0)
    only = stability(draw(5, 4, 0), [("b", draw(6, 4, 2))], 0)
    assert torch.equal(again.columns()["match_decoder"], only.columns()["match_decoder"])


def test_widths_must_agree():
    with pytest.raises(ValueError, match="other must have rows of width 4, got 5"):
        match(draw(3, 4, 0), draw(3, 5, 0), 0)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Two runs that differ in the seed of their weights, and what training them printed."""
    folder = tmp_path_factory.mktemp("runs") / "seeds"
    trained = program(*SMALL, "--seeds", 0, 1, "--out", folder)
    assert trained.returncode == 0, trained.stderr
    return folder


ANALYZED = ("--tokens", 512, "--seq_len", 64, "--resamples", 20, "--examples", 0)
COLUMNS = ["match_decoder", "match_encoder", "match_mutual", "match_latents"]


def test_the_program_finds_the_runs_of_other_seeds(seeds, capsys):
    run, other = seeds / "x2-k8-s0", seeds / "x2-k8-s1"
    result = program(run, *ANALYZED, module="mlsae.analyze")
    assert result.returncode == 0, result.stderr
    found = json.loads((run / "analysis.json").read_text())["stability"]
    assert found["others"] == [str(other)]
    assert f"beside x2-k8-s1: the best cosine of decoder rows is {found['median']:.3f}" in (
        result.stdout
    )
    latents = pandas.read_parquet(run / "analysis_latents.parquet")
    one, two = (MLSAE.from_pretrained(path).sae for path in (run, other))
    active = torch.tensor(latents.tokens_active.to_numpy() > 0)
    counts = read_tensors(other / "latents.safetensors")["counts"]
    expected = brute_force(
        LatentRows(one.W_dec, one.W_enc, active),
        LatentRows(two.W_dec, two.W_enc, (counts > 0).any(1)),
    )
    assert found["pairs"] == len(expected) == active.sum()
    shown = latents[latents.tokens_active > 0]
    matched = [expected[i] for i in shown.latent]
    assert [row[0] for row in shown.match_latents] == [j for j, *_ in matched]
    np.testing.assert_allclose(shown.match_decoder, [x for _, x, *_ in matched], atol=1e-5)
    np.testing.assert_allclose(shown.match_encoder, [x for *_, x, _ in matched], atol=1e-5)
    assert shown.match_mutual.tolist() == [float(mutual) for *_, mutual in matched]
    never = latents[latents.tokens_active == 0]
    assert never[COLUMNS[:3]].isna().all(axis=None)

    # Without others, an analysis is what it was.
    arguments = [str(run), *map(str, ANALYZED), "--beside"]
    print_analysis(analyze(parse(AnalyzeConfig, "", arguments, "analyze")), run, 512)
    assert "stability" not in json.loads((run / "analysis.json").read_text())
    assert not set(COLUMNS) & set(pandas.read_parquet(run / "analysis_latents.parquet").columns)
    assert "best cosine" not in capsys.readouterr().out


def test_a_folder_of_several_seeds_names_its_runs(seeds):
    result = program(seeds, *ANALYZED, module="mlsae.analyze")
    assert result.returncode == 2
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("error: RUN must be the folder of one MLSAE")
    assert f"{seeds / 'x2-k8-s0'}, {seeds / 'x2-k8-s1'}" in error


def test_only_runs_of_other_seeds_are_siblings(seeds, tmp_path):
    for path in seeds.glob("x*"):
        shutil.copytree(path, tmp_path / path.name)
    one, two = tmp_path / "x2-k8-s0", tmp_path / "x2-k8-s1"
    for name in ("copy", "wider", "stopped", "broken"):
        shutil.copytree(two if name != "copy" else one, tmp_path / name)
    (tmp_path / "no-run").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    about = json.loads((two / "config.json").read_text())
    (tmp_path / "stopped" / "config.json").write_text(json.dumps(about | {"heldout": None}))
    del about["heldout"]
    (tmp_path / "stopped" / "config.json").write_text(json.dumps(about))
    about = json.loads((two / "config.json").read_text())
    about["training"]["sae"]["aux_weight"] = 0
    (tmp_path / "wider" / "config.json").write_text(json.dumps(about))
    assert runs_beside(one, None) == [two]
    assert runs_beside(two, None) == [tmp_path / "copy", one]
    assert runs_beside(one, []) == []
    assert runs_beside(one, [tmp_path / "wider"]) == [tmp_path / "wider"]
