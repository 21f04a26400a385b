"""The app's page in a headless Chromium, as a user sees it; skipped if there is none."""

import json

import pytest

pytest.importorskip("starlette", reason="needs the extra mlsae[app]")
pytest.importorskip("selenium", reason="needs selenium, which drives the browser")

from selenium.webdriver.common.keys import Keys

from mlsae.report.labels import read_labels, write_label
from tests.helpers.app_run import app_run, served
from tests.helpers.headless import CHROMIUM, CONTRAST, DRIVER, NARROW, WIDE, Reader

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs Chromium and its driver: apt-get install chromium chromium-driver",
)
NASTY = "<img src=x onerror=document.title='pwned'>"


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    reader = Reader(tmp_path_factory.mktemp("profile"))
    yield reader
    reader.driver.quit()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address, and the folders of two runs with long names, of which the second is not
    analyzed."""
    runs = [
        app_run(tmp_path_factory.mktemp(name + "-with-a-long-name" * 4), analyzed=not i)
        for i, name in enumerate(("analyzed", "plain"))
    ]
    with served(*runs) as (_, port):
        yield f"http://127.0.0.1:{port}/", runs


def opened(reader, url, size=WIDE, dark=False):
    reader.open(url, size, dark)
    return reader.until("document.documentElement.dataset.app === 'ready'")


def write(reader, selector, text):
    box = reader.one(selector)
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(text)
    return box


def test_a_prompt_is_read_steered_and_its_latent_labeled(reader, site):
    url, (run, _) = site
    reader.complaints(url)
    opened(reader, url)
    write(reader, "#text", NASTY + Keys.CONTROL + Keys.ENTER)
    reader.until(f"reading.text === {json.dumps(NASTY)}")
    tokens = reader.all("#strip button")
    assert "".join(token.text for token in tokens).replace(" ", "") == NASTY.replace(" ", "")
    tokens[2].click()
    reader.until("document.querySelector('#strip [aria-pressed=true]') && chosenToken === 2")
    reader.until("document.querySelectorAll('#next tbody tr').length === 3")
    for plot in ("here", "over", "histogram"):
        reader.until(f"document.getElementById('{plot}-plot').dataset.drawn")
    assert any("rgba" in (token.get_attribute("style") or "") for token in tokens)

    latent = reader.js("return chosenLatent")
    reader.one("#add-edit").click()
    assert reader.one(".edit [name=latent]").get_attribute("value") == str(latent)
    write(reader, ".edit [name=layers]", "0")
    write(reader, "#new-tokens", "5")
    reader.one("#generate").click()
    reader.until("document.getElementById('steered-state').textContent === '5 tokens'")
    assert reader.one("#steered").text.startswith(NASTY)
    assert len(reader.one("#baseline").text) > len(NASTY)
    reader.until("document.querySelector('#next .changed, #next .steered')")

    write(reader, ".edit [name=layers]", "9")
    reader.one("#generate").click()
    reader.until("document.getElementById('steer-said').textContent.startsWith('layers must be')")
    write(reader, ".edit [name=layers]", "0")

    reader.js("document.getElementById('trace-form').requestSubmit()")
    reader.until("document.getElementById('checks-plot').dataset.drawn")

    write(reader, ".written [name=label]", NASTY + Keys.TAB)
    reader.until("document.querySelector('.written .saved').textContent === 'saved'")
    assert read_labels(run)[latent]["label"] == NASTY
    asked = [message for message in reader.complaints(url) if "status of 400" not in message]
    assert not asked, asked

    opened(reader, url, NARROW)
    reader.js(f"chooseLatent({latent})")
    reader.until(f"document.querySelector('.written [name=label]').value === {json.dumps(NASTY)}")
    assert reader.find("onerror") == 1
    assert reader.texts("#rows .label") == [NASTY]
    reader.until("document.documentElement.scrollWidth <= innerWidth")
    reader.until("document.getElementById('histogram-plot').dataset.drawn")
    turned = {"width": 600, "height": 390, "deviceScaleFactor": 1, "mobile": False}
    reader.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", turned)
    reader.until("document.querySelector('#histogram-plot .main-svg').clientWidth > 400")
    caption = "document.querySelector('#histogram-plot + figcaption').getBoundingClientRect().top"
    plot = "document.querySelector('#histogram-plot .main-svg').getBoundingClientRect().bottom"
    assert reader.js(f"return {caption} - {plot}") > -5
    assert "pwned" not in reader.driver.title
    assert not reader.complaints(url)


def test_a_label_that_another_tab_has_written_is_shown(reader, site):
    url, (run, _) = site
    opened(reader, url)
    latent = reader.js("return chosenLatent")
    write_label(run, latent, "from elsewhere", "")
    reader.js("return fetchLabels()")
    reader.until("document.querySelector('.written [name=label]').value === 'from elsewhere'")


def test_a_run_without_an_analysis_is_explored_too(reader, site):
    url, (_, plain) = site
    opened(reader, url)
    reader.js("document.getElementById('runs').value = '1'")
    reader.js("document.getElementById('runs').dispatchEvent(new Event('change'))")
    reader.until("location.pathname === '/runs/1/' && document.documentElement.dataset.app")
    assert "has not been analyzed" in reader.one("#latents").text
    reader.until("document.querySelector('#latent h3').textContent.startsWith('Latent')")
    write(reader, ".written [name=notes]", "seen" + Keys.TAB)
    reader.until("document.querySelector('.written .saved').textContent === 'saved'")
    assert [entry["notes"] for entry in read_labels(plain).values()] == ["seen"]
    assert not reader.complaints(url)


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_legible(reader, site, dark):
    opened(reader, site[0], dark=dark)
    for selector in ("button", "label", "#next td", "#next th", "small", ".facts dt", "input"):
        ratios = reader.js(CONTRAST, selector)
        assert ratios, selector
        assert min(ratios) >= 4.5, (selector, min(ratios))
