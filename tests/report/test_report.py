"""`python -m mlsae.report`: the content of the page of one run, and of a comparison.

Legend: L layers, M latents.
"""

import base64
import gzip
import json
import re

import numpy as np
import pytest
import torch

from mlsae.errors import InputError
from mlsae.report import latent_plots, write_report
from mlsae.report.browser import KINDS, browser_data
from mlsae.report.comparison import write_comparison
from mlsae.report.run_data import read_run_data
from tests.helpers.make_run import make_run
from tests.helpers.packed import packed
from tests.helpers.programs import program

PYTHIA = "EleutherAI/pythia-70m-deduped"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    content = make_run(folder, 320, 5)
    write_report(folder)
    return folder, content, (folder / "report.html").read_text()


def test_a_heatmap_column_is_a_latent_or_the_mean_of_neighbors():
    share = torch.rand(7, 3, dtype=torch.float64)
    share /= share.sum(1, keepdim=True)
    order = sorted(range(7), key=lambda j: float(share[j, 1] + 2 * share[j, 2]))
    plot = latent_plots.heatmap(share, [0, 4, 9])
    np.testing.assert_allclose(np.array(plot.data[0].z), share[order].T, atol=6e-4)
    assert list(plot.data[0].y) == ["0", "4", "9"]
    many = torch.rand(2 * latent_plots.MAX_COLUMNS + 1, 3, dtype=torch.float64)
    many /= many.sum(1, keepdim=True)
    plot = latent_plots.heatmap(many, [0, 1, 2])
    order = (many @ torch.arange(3.0).double()).argsort()
    z = np.array(plot.data[0].z)
    assert z.shape[1] <= latent_plots.MAX_COLUMNS
    np.testing.assert_allclose(z[:, 1], many[order][3:6].mean(0), atol=6e-4)
    assert (plot.data[0].x0, plot.data[0].dx) == (2, 3)


def test_the_histogram_counts_every_latent_also_at_its_ends():
    plot = latent_plots.mean_layers(torch.tensor([0.0, 0.0, 2.5, 5.0, float("nan")]), 6)
    counts = np.array(plot.data[0].y)
    assert (counts[0], counts[24], counts[-1], counts.sum()) == (2, 1, 1, 4)
    assert plot.data[1].x[0] == pytest.approx(7.5 / 4)


def test_the_browser_lists_active_latents_most_frequent_first(whole):
    _, content, page = whole
    data, table = packed(page, "latents"), content["latents"]
    active = np.flatnonzero(table["tokens_active"])
    assert data["latent"] == sorted(active, key=lambda j: (-table["tokens_active"][j], j))
    for name in ("mean_layer", "entropy", "frequency", "max_activation", "nearest_cosine"):
        np.testing.assert_allclose(data[name], table[name][data["latent"]], rtol=1e-3)
    shares = np.array(data["profile_totals"]).reshape(-1, 5) / 1000
    totals = content["totals"][data["latent"]]
    np.testing.assert_allclose(shares, totals / totals.sum(1, keepdims=True), atol=6e-4)
    assert data["tokens_in"] == [table["tokens_in"][j] for j in data["latent"]]


def by_latent(rows, latent):
    """A latent's examples in the page's order: in rounds, each with the strongest remaining example
    of every pair of layer and kind."""
    members = [i for i in range(len(rows["latent"])) if rows["latent"][i] == latent]
    members.sort(key=lambda i: -rows["activation"][i])
    seen, ranked = {}, []
    for i in members:
        group = (rows["layer"][i], rows["kind"][i])
        seen[group] = seen.get(group, -1) + 1
        ranked.append((seen[group], KINDS.index(rows["kind"][i]), -rows["activation"][i], i))
    return [i for *_, i in sorted(ranked)]


def examples_in(data, chunks):
    """The activations of each latent's examples in the page, by the latent's id."""
    activations = {}
    for index, chunk in enumerate(chunks):
        for i, end in enumerate(chunk["ends"]):
            start = chunk["ends"][i - 1] if i else 0
            activations[data["latent"][index * data["chunk"] + i]] = chunk["activation"][start:end]
    return activations


def test_all_examples_are_in_the_page_in_order_if_they_fit(whole):
    _, content, page = whole
    data, rows = packed(page, "latents"), content["examples"]
    chunks = [packed(page, f"examples-{i}") for i in range(-(-len(data["latent"]) // 64))]
    activations = examples_in(data, chunks)
    assert sum(map(len, activations.values())) == len(rows["latent"])
    for latent in (data["latent"][0], data["latent"][63], data["latent"][64], data["latent"][-1]):
        expected = rows["activation"][by_latent(rows, latent)]
        np.testing.assert_allclose(activations[latent], expected, rtol=1e-3)
    first = by_latent(rows, data["latent"][64])[0]
    assert chunks[1]["tokens"][0] == list(rows["tokens"][first])
    assert chunks[1]["position"][0] == rows["position"][first]
    np.testing.assert_allclose(chunks[1]["activations"][0], rows["activations"][first], atol=6e-3)
    peak = rows["tokens"][first][rows["position"][first]]
    assert data["peaks"][64][0] == peak
    assert f"All {len(rows['latent']):,} examples are in this page." in page


@pytest.mark.parametrize("budget", [1_000_000, 300_000, 120_000, 60_000])
def test_what_does_not_fit_is_left_out_evenly_and_reported(whole, budget):
    folder, content, _ = whole
    browser = browser_data(read_run_data(folder).analysis, {}, budget)
    assert sum(map(len, browser.packed.values())) <= budget
    texts = {
        name: json.loads(gzip.decompress(base64.b64decode(text)))
        for name, text in browser.packed.items()
    }
    data = texts.pop("latents")
    kept = examples_in(data, list(texts.values()))
    counts = [len(activations) for activations in kept.values()]
    assert (
        browser.examples
        == sum(counts)
        < browser.total_examples
        == len(content["examples"]["latent"])
    )
    assert browser.reached == len(counts)
    assert max(counts, default=0) <= browser.depth
    for latent in list(kept)[:3]:
        expected = content["examples"]["activation"][by_latent(content["examples"], latent)]
        np.testing.assert_allclose(kept[latent], expected[: browser.depth], rtol=1e-3)


def test_a_page_of_32768_latents_is_under_10_mb(tmp_path):
    make_run(tmp_path / "run", 32768, 6, examples=1)
    write_report(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_bytes()
    assert 5_000_000 < len(page) < 10_000_000  # by using the limit, not by leaving all out
    assert len(packed(page.decode(), "latents")["latent"]) == 32768 * 15 // 16


def test_a_missing_measurement_is_a_line_with_its_command(tmp_path):
    folder = tmp_path / "a run"
    make_run(folder, evaluated=False, analyzed=False)
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert page.count(f"python -m mlsae.analyze &#39;{folder}&#39; &amp;&amp; python -m") == 4
    assert page.count("python -m mlsae.evaluate") == 1
    assert set(packed(page, "plots")) == {
        "heatmap-totals", "mean-layers", "entropies", "fvu", "training"
    }  # fmt: skip
    make_run(folder, evaluated=True, analyzed=False)
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert "python -m mlsae.evaluate" not in page
    assert "delta-ce" in packed(page, "plots")


def test_an_analyzed_sae_from_elsewhere_has_a_page(tmp_path):
    make_run(tmp_path, trained=False)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "the SAE was not trained here" in page
    assert "python -m mlsae" not in page


def test_a_run_of_one_layer_has_a_page(tmp_path):
    make_run(tmp_path, 64, 1, examples=1)
    about = json.loads((tmp_path / "analysis.json").read_text())
    for estimator in about["ratios"].values():
        for name in ("A", "B"):
            estimator[name] = dict.fromkeys(("value", "low", "high"), float("nan"))
    (tmp_path / "analysis.json").write_text(json.dumps(about))
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Here – is left" in page
    assert not re.search(r"\bnan\b", page.split("<script")[0])
    assert packed(page, "latents")["layers"] == [0]


def test_a_run_without_active_latents_has_a_page(tmp_path):
    make_run(tmp_path, 64, 3, examples=1, alive=False)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "0 latents were active; 64 were never active." in page
    make_run(tmp_path / "trained", 64, 3, analyzed=False, alive=False)
    write_report(tmp_path / "trained")


def test_a_damaged_file_is_an_input_error(tmp_path):
    make_run(tmp_path)
    for name in ("analysis_latents.parquet", "analysis.safetensors", "config.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match="RUN must be the folder of a finished training run"):
            write_report(tmp_path)
        assert not (tmp_path / "report.html").exists()
        (tmp_path / name).write_bytes(content)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    base = tmp_path_factory.mktemp("comparison")
    runs = []
    for i, (model, expansion, k) in enumerate(
        [(PYTHIA, 16, 32), (PYTHIA, 64, 32), (PYTHIA, 64, 100), ("builtin", 16, 32)]
    ):
        runs.append(base / f"run-{i}")
        make_run(runs[-1], 64, model=model, expansion=expansion, k=k, seed=i, examples=1,
                 evaluated=i != 2, analyzed=i != 1)  # fmt: skip
    write_comparison(runs, base / "comparison.html")
    return runs, (base / "comparison.html").read_text()


def table_of(page):
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def test_a_comparison_has_a_row_per_run_and_published_results_below(several):
    runs, page = several
    heading, *rows = table_of(page)
    assert [row[0] for row in rows] == [
        "run-0", "the paper", "run-1", "the paper", "run-2", "run-3"
    ]  # fmt: skip
    cells = [dict(zip(heading, row, strict=True)) for row in rows]
    evaluation = json.loads((runs[0] / "evaluation.json").read_text())
    assert cells[0]["ΔCE"] == f"{evaluation['figures']['delta_ce']['mean']:.3f}"
    assert (cells[0]["ratio A"], cells[0]["A, released"]) == ("0.620", "0.710")
    # Pythia 70M with R = 64 and k = 32, from the paper's tables.
    names = ("FVU, paper’s", "ΔCE", "L1", "A, released", "B, released", "entropy", "MMCS")
    published = [float(cells[3][name]) for name in names]
    expected = [0.097, 0.565, 66.5, 0.536, 0.0100, 0.501, 0.275]
    np.testing.assert_allclose(published, expected, atol=0.002, rtol=2e-3)
    assert cells[3]["FVU"] == cells[3]["ratio A"] == "–"  # not published
    # run-2 was measured only in training; run-1 was not analyzed.
    heldout = json.loads((runs[2] / "metrics.jsonl").read_text().splitlines()[-1])["heldout"]
    assert cells[4]["FVU"] == f"{heldout['fvu']:.4f}"
    assert cells[4]["ΔCE"] == cells[2]["ratio A"] == "–"
    assert re.findall(r"<li><code>(.*?)</code>", page) == [
        f"python -m mlsae.analyze {runs[1]}", f"python -m mlsae.evaluate {runs[2]}"
    ]  # fmt: skip


def test_a_line_joins_runs_that_differ_only_in_its_axis(several):
    _, page = several
    plots = packed(page, "plots")
    by_r = plots["ratio_a-expansion"]["data"]
    assert [(list(trace["x"]), len(trace["y"])) for trace in by_r] == [
        ([16], 1),  # run-0; run-1 is not analyzed
        ([1, 2, 4, 8, 16, 32, 64, 128, 256], 9),  # published, k = 32
        ([64], 1),  # run-2, k = 100: none published
        ([16], 1),  # run-3, another model
    ]
    by_k = plots["l1-k"]["data"]
    assert [list(trace["x"]) for trace in by_k] == [
        [32], [32], [32], [16, 32, 64, 128, 256, 512], [32]
    ]  # fmt: skip
    assert by_k[3]["y"][0] == pytest.approx(49.04)
    assert all(trace["marker"]["symbol"].endswith("-open") for trace in (by_k[1], by_k[3]))
    assert "not measured yet" not in page


@pytest.mark.parametrize(
    ("model", "fvu", "ratio_a", "ratio_b"),
    [
        ("EleutherAI/pythia-410m-deduped", 0.081, 0.793, 0.0087),
        ("google/gemma-2-2b", 0.210, 0.831, 0.0286),
        ("openai-community/gpt2", 0.093, 0.663, 0.1166),
    ],
)
def test_the_published_results_are_the_papers(tmp_path, model, fvu, ratio_a, ratio_b):
    for name in ("a", "b"):
        make_run(tmp_path / name, 64, model=model, expansion=64, examples=1, analyzed=False)
    write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "c.html")
    heading, *rows = table_of((tmp_path / "c.html").read_text())
    assert len(rows) == 3
    cells = dict(zip(heading, rows[2], strict=True))
    published = [float(cells[name]) for name in ("FVU, paper’s", "A, released", "B, released")]
    np.testing.assert_allclose(published, [fvu, ratio_a, ratio_b], atol=6e-4)


def test_the_program_compares_and_names_bad_input(several, tmp_path):
    runs, _ = several
    result = program(*runs, "--out", tmp_path / "c.html", module="mlsae.report")
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'c.html'}\n"), result.stderr
    with pytest.raises(InputError, match="RUN must be different folders"):
        write_comparison([runs[0], runs[0]], tmp_path / "d.html")
    result = program(*runs, "--out", tmp_path / "no" / "c.html", module="mlsae.report")
    assert result.returncode == 2
    assert "--out must be a file in a folder that is there" in result.stderr
