"""How latents follow one another, in the report: its content, and as a reader sees it.

Legend: L layers, M latents.
"""

import json

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy

from mlsae.errors import InputError
from mlsae.report import write_report
from mlsae.report.run_data import read_run_data
from tests.helpers.make_run import make_run
from tests.helpers.packed import packed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow") / "run"
    content = make_run(folder, 256, 4, examples=1)
    write_report(folder)
    return folder, content["latents"], (folder / "report.html").read_text()


def test_the_page_holds_the_life_of_each_latent(run):
    folder, table, page = run
    data = packed(page, "latents")
    arrays = safetensors.numpy.load_file(folder / "analysis.safetensors")
    ids = data["latent"]
    tokens = table["tokens_active"][ids][:, None]
    for name, own in (("alive", "counts"), ("continued", "continued")):
        shares = np.rint(1000 * arrays[own][ids] / tokens).ravel()
        assert data[name] == shares.astype(int).tolist()
    continues = np.array(data["continues"], float)  # null is not a number
    np.testing.assert_allclose(continues, table["continues"][ids], rtol=1e-3)
    assert data["follower"] == table["follower"][ids].tolist()


def test_the_bars_are_beginnings_and_ends(run):
    folder, _, page = run
    told = json.loads((folder / "analysis.json").read_text())["flow"]
    first, went_on, began, ended = packed(page, "plots")["flow"]["data"]
    active = np.array(told["active"])
    np.testing.assert_allclose(np.add(first["y"], went_on["y"]) + began["y"], active)
    np.testing.assert_allclose(ended["y"][:-1], -np.array(told["ended"][:-1]))
    assert first["y"][1:] == [0, 0, 0]
    assert ended["y"][-1] == began["y"][0] == 0
    text = page.split("<script")[0]
    for shown in ("45.7%", "1.2%", "4,321", "16,384 tokens", 'href="#latent-3"'):
        assert shown in text


def test_an_analysis_of_one_layer_or_of_0_2_has_none(tmp_path):
    make_run(tmp_path / "one", 64, 1, examples=1)
    make_run(tmp_path / "old", 64, 4, examples=1)
    about = json.loads((tmp_path / "old" / "analysis.json").read_text())
    del about["flow"]
    (tmp_path / "old" / "analysis.json").write_text(json.dumps(about))
    for folder in (tmp_path / "one", tmp_path / "old"):
        write_report(folder)
        page = (folder / "report.html").read_text()
        assert 'id="flow"' not in page
        assert "continued" not in packed(page, "latents")


def test_files_that_do_not_agree_are_refused(tmp_path):
    make_run(tmp_path, 64, 4, examples=1)
    path = tmp_path / "analysis_latents.parquet"
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.drop_columns(["follower"]), path)
    with pytest.raises(InputError, match="must have one column 'follower' of numbers"):
        read_run_data(tmp_path)
    pyarrow.parquet.write_table(table, path)
    arrays = safetensors.numpy.load_file(tmp_path / "analysis.safetensors")
    arrays["continued"] = arrays["continued"][:, 1:]
    safetensors.numpy.save_file(arrays, tmp_path / "analysis.safetensors")
    with pytest.raises(InputError, match=r"continued .* must be integer of shape \(64, 3\)"):
        read_run_data(tmp_path)


def test_a_reader_goes_from_a_pair_to_the_latent_s_life(run, tmp_path_factory):
    pytest.importorskip("selenium", reason="needs selenium, which drives the browser")
    from tests.helpers.headless import CHROMIUM, DRIVER, NARROW, WIDE, Reader

    if not (CHROMIUM and DRIVER):
        pytest.skip("needs Chromium and its driver")
    folder, *_ = run
    reader = Reader(tmp_path_factory.mktemp("profile"))
    try:
        reader.open(folder / "report.html").ready()
        reader.complaints()  # discard the browser's own, of its start
        reader.js("document.querySelector('#flow td a[href=\"#latent-3\"]').click()")
        assert reader.texts("#latent h3") == ["Latent 3"]
        stats = reader.texts("#latent .stats > div")
        assert any(s.startswith("where it ends, there begins7 (25") for s in stats)
        assert any(s.startswith("goes on at the next layer") for s in stats)
        dots, lines = (len(reader.all(f"#latent .lifeline {n}")) for n in ("circle", "line"))
        assert (dots, lines) == (4, 3)
        for size in (WIDE, NARROW):
            reader.open(folder / "report.html", size).ready()
            width = reader.js("return document.documentElement.scrollWidth")
            assert width <= size[0], "the page scrolls sideways"
        assert reader.complaints() == []
    finally:
        reader.driver.quit()
