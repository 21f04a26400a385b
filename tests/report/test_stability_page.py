"""Which latents other trainings find, too, in the report: its content, and as a reader sees it.

Legend: M latents.
"""

import json

import numpy as np
import pyarrow.parquet
import pytest

from mlsae.errors import InputError
from mlsae.report import latent_plots, write_report
from mlsae.report.run_data import read_run_data
from tests.helpers.make_run import make_run
from tests.helpers.packed import packed

OTHERS = ("runs/x16-k32-s1", "runs/<b>")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stability") / "run"
    content = make_run(folder, 256, 4, examples=1, others=OTHERS)
    write_report(folder)
    return folder, content["latents"], (folder / "report.html").read_text()


def test_the_page_holds_the_match_of_each_latent(run):
    _, table, page = run
    data = packed(page, "latents")
    assert data["others"] == 2
    for name in ("match_decoder", "match_encoder", "match_mutual"):
        np.testing.assert_allclose(data[name], table[name][data["latent"]], rtol=1e-3)
    text = page.split("<script")[0]
    for told in ("Best match in 2 other SAEs", "0.235 in the median", "below 0.346", "12.3%"):
        assert told in text
    assert "runs/x16-k32-s1, runs/&lt;b&gt;" in text


def test_the_histograms_are_shares_of_latents_and_of_random_directions(run):
    folder, table, page = run
    chance, found = packed(page, "plots")["matches"]["data"]
    active = table["tokens_active"] > 0
    counts, edges = np.histogram(table["match_decoder"][active], 100, (-1, 1))
    np.testing.assert_allclose(found["y"], counts / active.sum())
    np.testing.assert_allclose(found["x"], (edges[1:] + edges[:-1]) / 2)
    assert sum(chance["y"]) == pytest.approx(1)
    about = json.loads((folder / "analysis.json").read_text())["stability"]
    for name in ("match", "chance"):
        about["histogram"][name] = [0] * 100
    plot = latent_plots.matches(about)
    assert set(plot.data[0].y) == set(plot.data[1].y) == {0}, "no latent was active on both sides"


def test_without_other_saes_the_page_is_as_before(tmp_path):
    make_run(tmp_path, 64, examples=1)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert 'id="stability"' not in page
    assert packed(page, "latents")["others"] == 0
    assert "match_decoder" not in packed(page, "latents")


def test_a_table_without_the_matches_that_the_analysis_tells_of_is_refused(tmp_path):
    make_run(tmp_path, 64, examples=1, others=OTHERS)
    path = tmp_path / "analysis_latents.parquet"
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.drop_columns(["match_mutual"]), path)
    with pytest.raises(InputError, match="must have one column 'match_mutual' of numbers"):
        read_run_data(tmp_path)


def test_a_reader_sorts_by_the_match_and_sees_it(run, tmp_path_factory):
    pytest.importorskip("selenium", reason="needs selenium, which drives the browser")
    from tests.helpers.headless import CHROMIUM, DRIVER, NARROW, WIDE, Reader

    if not (CHROMIUM and DRIVER):
        pytest.skip("needs Chromium and its driver")
    folder, table, _ = run
    reader = Reader(tmp_path_factory.mktemp("profile"))
    try:
        reader.open(folder / "report.html").ready()
        reader.complaints()  # discard the browser's own, of its start; the page is opened again
        active = np.flatnonzero(table["tokens_active"])
        shown = {j: float(f"{table['match_decoder'][j]:.4g}") for j in active}
        order = sorted(active, key=lambda j: (-shown[j], -table["tokens_active"][j], j))
        assert reader.sort("match_decoder").ids()[:10] == order[:10], "the best ones first"
        reader.all("#rows > div")[0].click()
        stats = reader.texts("#latent .stats > div")
        mutual = {0: "0 %", 0.5: "50 %", 1: "100 %"}[table["match_mutual"][order[0]]]
        cosine = f"{shown[order[0]]:.2f}"
        assert f"match in other SAEs{cosine} (mutual in {mutual})" in stats
        assert f"… of its encoder{table['match_encoder'][order[0]]:.2f}" in stats
        cells = len(reader.all("#rows > div:first-child > div"))
        assert cells == len(reader.all("#columns > div")) == 8
        tops = "return [...document.querySelectorAll('#columns > div')].map((n) => n.offsetTop)"
        for size in (WIDE, NARROW):
            reader.open(folder / "report.html", size).ready()
            assert len(set(reader.js(tops))) == 1, "the headings are in one line"
            width = reader.js("return document.documentElement.scrollWidth")
            assert width <= size[0], "the page scrolls sideways"
        assert reader.complaints() == []
    finally:
        reader.driver.quit()
