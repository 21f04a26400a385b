"""The report in a headless Chromium, as a reader sees it; skipped if there is none.

Legend: L layers, M latents.
"""

import json
import re

import numpy as np
import pytest

pytest.importorskip("selenium", reason="needs selenium, which drives the browser")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from mlsae.report import write_report
from mlsae.report.comparison import write_comparison
from tests.helpers.headless import CHROMIUM, CONTRAST, DRIVER, NARROW, WIDE, Reader
from tests.helpers.make_run import NASTY, make_run

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs Chromium and its driver: apt-get install chromium chromium-driver",
)
L = 5


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    reader = Reader(tmp_path_factory.mktemp("profile"))
    yield reader
    reader.driver.quit()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / "run"
    content = make_run(folder, 2048, L, examples=1)
    write_report(folder)
    return folder / "report.html", content["latents"], content["examples"]


def test_a_page_opens_without_errors_or_network(reader, run, tmp_path):
    make_run(tmp_path / "a", 64, analyzed=False, evaluated=False)
    make_run(tmp_path / "b", 64, examples=1)
    write_report(tmp_path / "a")
    write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "c.html")
    reader.complaints()  # discard earlier ones
    for page in (run[0], tmp_path / "a" / "report.html", tmp_path / "c.html"):
        reader.open(page)
        assert len(reader.all(".plot[data-plot]")) >= 5
        # Plots are drawn when they are scrolled into view.
        for node in reader.all(".plot[data-plot]"):
            if node.is_displayed():
                reader.js("arguments[0].scrollIntoView()", node)
                WebDriverWait(reader.driver, 30).until(
                    lambda _, n=node: n.get_attribute("data-drawn")
                )
        assert reader.complaints() == []


def test_the_list_sorts_both_ways(reader, run):
    _, table, _ = run
    reader.open(run[0]).ready()
    active = np.flatnonzero(table["tokens_active"])
    by_frequency = sorted(active, key=lambda j: (-table["tokens_active"][j], j))
    assert reader.ids()[:10] == by_frequency[:10]
    by_entropy = sorted(by_frequency, key=lambda j: float(f"{table['entropy'][j]:.4g}"))
    assert reader.sort("entropy").ids()[:10] == by_entropy[:10]
    assert reader.one("#columns [aria-sort]").text.startswith("entropy")
    by_entropy = sorted(by_frequency, key=lambda j: -float(f"{table['entropy'][j]:.4g}"))
    assert reader.sort("entropy").ids()[:10] == by_entropy[:10]
    assert reader.sort("latent").ids()[:10] == sorted(active)[:10]


def test_a_long_list_draws_only_the_rows_in_view(reader, run):
    reader.open(run[0]).ready()
    assert len(reader.ids()) < 60
    reader.sort("latent").one("#list").send_keys(Keys.END)
    reader.until("document.querySelector('#latent h3').textContent === 'Latent 2047'")
    assert len(reader.ids()) < 60
    assert reader.ids()[-1] == 2047
    visible = reader.js(
        "const [r, l] = [document.querySelector('[aria-selected=true]'), "
        "document.querySelector('#list')].map((n) => n.getBoundingClientRect());"
        "return r.top >= l.top && r.bottom <= l.bottom"
    )
    assert visible


def test_the_list_can_be_used_by_keyboard(reader, run):
    reader.open(run[0]).ready()
    reader.one("body").send_keys("/")
    assert reader.js("return document.activeElement.id") == "search"
    reader.one("#search").send_keys(Keys.ENTER)
    assert reader.js("return document.activeElement.id") == "list"
    first, second, third = reader.ids()[:3]
    for key, latent in ((Keys.DOWN, second), (Keys.DOWN, third), (Keys.HOME, first)):
        reader.one("#list").send_keys(key)
        reader.until(f"document.querySelector('#latent h3').textContent === 'Latent {latent}'")
    chosen = reader.one("#list").get_attribute("aria-activedescendant")
    assert reader.one(f"#{chosen}").get_attribute("aria-selected") == "true"


def peaks(rows, latent, most=4):
    """The different tokens at which a latent is most active, as many as the list shows."""
    members = np.flatnonzero(rows["latent"] == latent)
    # With one example per layer and kind, the order is by kind, then by activation.
    rank = {kind: i for i, kind in enumerate(("top", "q4", "q3", "q2", "q1"))}
    members = sorted(members, key=lambda i: (rank[rows["kind"][i]], -rows["activation"][i]))[:16]
    return list(dict.fromkeys(rows["tokens"][i][rows["position"][i]] for i in members))[:most]


@pytest.mark.parametrize("query", ["name17", "</script>", "naïve ✓", "NoNe", "·name3", "⏎", '"quo'])
def test_search_matches_the_text_of_tokens(reader, run, query):
    _, table, rows = run
    reader.open(run[0]).ready()
    wanted = query.lower().replace("·", " ").replace("⏎", "\n")
    expected = 0
    for latent in np.flatnonzero(table["tokens_active"]):
        words = [*peaks(rows, latent), *table["tokens_in"][latent], *table["tokens_out"][latent]]
        expected += any(wanted in word.lower() for word in words)
    assert 0 < expected < 1920
    assert reader.find(query) == expected


def test_search_finds_an_id_or_nothing(reader, run):
    reader.open(run[0]).ready()
    assert reader.find("2046") == 1
    assert reader.ids() == [2046]
    assert reader.find("no such token") == 0
    assert reader.find("") == 1920


def test_a_latent_shows_its_profile_and_its_examples(reader, run):
    page, table, rows = run
    latent = int(rows["latent"][len(rows["latent"]) // 2])
    reader.open(page, fragment=f"#latent-{latent}").ready()
    reader.until("document.querySelector('.example')")
    assert reader.one("#latent h3").text == f"Latent {latent}"
    members = np.flatnonzero(rows["latent"] == latent)
    texts = reader.texts(".example .text")
    shown = [text.replace("⏎", "\n").replace("⇥", "\t") for text in texts]
    assert sorted(shown) == sorted("".join(rows["tokens"][i]) for i in members)
    strongest = max(members, key=lambda i: rows["activation"][i])
    assert shown[0] == "".join(rows["tokens"][strongest])
    assert f"layer {rows['layer'][strongest]} · strongest" in reader.texts(".example p")[0]
    peak = rows["tokens"][strongest][rows["position"][strongest]]
    first = reader.all(".example .peak")[0].get_attribute("textContent")
    assert first.replace("⏎", "\n").replace("⇥", "\t") == peak
    on = reader.js("return document.querySelector('.example .text').querySelectorAll('.on').length")
    assert on == (np.asarray(rows["activations"][strongest]) > 0.005).sum()
    # The heights of the bars are the shares.
    heights = reader.js(
        "return [...document.querySelectorAll('.profile .column i')].map((n) => n.style.height)"
    )
    shares = [float(height.rstrip("%")) / 100 for height in heights]
    mean = float(np.dot(shares, np.arange(L)) / sum(shares))
    assert mean == pytest.approx(table["mean_layer"][latent], abs=0.01)
    # The filter by layer.
    layers = sorted({int(rows["layer"][i]) for i in members})
    reader.js(
        "const s = document.querySelector('.filter select'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('change'))",
        str(layers[-1]),
    )
    assert len(reader.all(".example")) == sum(rows["layer"][i] == layers[-1] for i in members)


def test_html_in_tokens_is_shown_as_text(reader, run, tmp_path):
    make_run(
        tmp_path, 64, examples=1, prompt='</script><img src=x onerror="alert(1)">', model="<i>m</i>"
    )
    write_report(tmp_path)
    reader.open(tmp_path / "report.html").ready()
    chips = reader.texts("#prompt button")
    expected = ['</script><img·src=x·onerror="alert(1)">', *NASTY, " last"]
    shown = {"\n": "⏎", "\t": "⇥", "": "∅"}
    assert chips == [shown.get(token, token.replace(" ", "·")) for token in expected]
    assert reader.one("h1").text == "Multi-layer SAE of <i>m</i>"
    assert reader.all("img, h1 i, #list b, .example b, #prompt b") == []
    assert reader.complaints() == []


def test_a_click_on_a_heatmap_column_opens_its_latent(reader, run):
    page, table, _ = run
    reader.open(page).ready().until("document.querySelector('[data-plot=heatmap]').dataset.drawn")
    node = reader.one("[data-plot=heatmap]")
    x, y = reader.js(
        "const {xaxis, yaxis, _size} = arguments[0]._fullLayout;"
        "return [_size.l + xaxis.d2p(1000), _size.t + yaxis.d2p(2)]",
        node,
    )
    size = node.size
    offset = (x - size["width"] / 2, y - size["height"] / 2)
    ActionChains(reader.driver).move_to_element_with_offset(node, *offset).pause(
        0.3
    ).click().perform()
    reader.until("document.querySelector('#columns [aria-sort]').textContent.startsWith('mean')")
    active = np.flatnonzero(table["tokens_active"])
    order = active[np.argsort(table["mean_layer"][active], kind="stable")]
    # Two latents share a column, and a few columns share a pixel.
    opened = int(reader.one("#latent h3").text.split()[1])
    assert abs(list(order).index(opened) - 1000) <= 12


def test_a_token_of_the_prompt_shows_its_latents(reader, run):
    page, _, _ = run
    prompt = json.loads((page.parent / "analysis_prompt.json").read_text())
    reader.open(page).ready().until("document.querySelector('#token-plot').dataset.drawn")
    reader.all("#prompt button")[3].click()
    at = [i for i, token in enumerate(prompt["entries"]["token"]) if token == 3]
    latents = {prompt["entries"]["latent"][i] for i in at}
    reader.until(
        f"document.querySelector('#token-caption').textContent.includes('{len(latents)} ')"
    )
    reader.until(f"document.querySelector('#token-plot').data[0].z[0].length === {len(latents)}")
    z = np.array(reader.js("return document.querySelector('#token-plot').data[0].z"))
    np.testing.assert_allclose(z.sum(0), 1)
    means = np.arange(L) @ z
    assert (np.diff(means) >= -1e-9).all()
    single = sum((z > 0).sum(0) == 1)
    assert f"{single} of them at one layer only" in reader.one("#token-caption").text


def test_buttons_choose_the_aggregation(reader, run):
    reader.open(run[0]).ready()
    assert not reader.one("[data-plot=heatmap-totals]").is_displayed()
    reader.one("[data-choice=totals]").click()
    reader.until("document.querySelector('[data-plot=heatmap-totals]').dataset.drawn")
    assert reader.one("[data-plot=heatmap-totals]").is_displayed()
    assert not reader.one("[data-plot=heatmap]").is_displayed()


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast_in_light_and_dark(reader, run, dark):
    """WCAG 2.2 AA requires a contrast of 4.5 for text."""
    reader.open(run[0], dark=dark).ready()
    reader.until("document.querySelector('[data-plot=heatmap]').dataset.drawn")
    reader.until("document.querySelector('.example')")
    red, green, blue = re.findall(
        r"\d+", reader.js("return getComputedStyle(document.body).backgroundColor")
    )[:3]
    assert (int(red) + int(green) + int(blue) < 150) == dark
    for selector in (
        "h1, h2, h3, p, dt, dd, small, figcaption, nav a, .headline *, th, td",
        "#columns *, #rows [role=gridcell], .chip, button, #search, #match-count",
        ".example p, .example .text, .profile > div",
        "[data-plot] .xtick text, [data-plot] .ytitle, [data-plot] .cbtitle text",
    ):
        ratios = reader.js(CONTRAST, selector)
        assert ratios, selector
        assert min(ratios) >= 4.5, selector


def test_plots_follow_when_the_mode_changes(reader, run):
    reader.open(run[0]).ready()
    reader.until("document.querySelector('[data-plot=heatmap]').dataset.drawn")
    tick = "getComputedStyle(document.querySelector('[data-plot=heatmap] .xtick text')).fill"
    before = reader.js("return " + tick)
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    reader.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    reader.until(f"{tick} !== '{before}'")


def test_plots_stand_side_by_side_on_a_wide_screen_only(reader, run):
    tops = (
        "return [...document.querySelectorAll('#layers figure')]"
        ".map((n) => n.getBoundingClientRect().top)"
    )
    left, right = reader.open(run[0], WIDE).ready().js(tops)
    assert left == right
    above, below = reader.open(run[0], NARROW).ready().js(tops)
    assert above < below
    for size in (WIDE, NARROW):
        reader.open(run[0], size).ready()
        width = reader.js("return document.documentElement.scrollWidth")
        assert width <= size[0], "the page scrolls sideways"
