"""A headless Chromium that opens a page of the report."""

import json
import re
import shutil

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
WIDE, NARROW = (1366, 768), (390, 844)


class Reader:
    """A browser, with helpers to use a page and to list its errors and network requests."""

    def __init__(self, profile):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def open(self, page, size=WIDE, dark=False, fragment=""):
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        width, height = size
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.get("about:blank")
        self.driver.get((page if isinstance(page, str) else page.as_uri()) + fragment)
        return self

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector):
        code = "return [...document.querySelectorAll(arguments[0])].map((n) => n.textContent)"
        return self.js(code, selector)

    def until(self, code):
        """Wait until `code` returns true."""
        WebDriverWait(self.driver, 30, 0.05).until(lambda _: self.js("return " + code))
        return self

    def ready(self):
        return self.until("document.documentElement.dataset.browser === 'ready'")

    def ids(self):
        """The latents in the rows drawn, from the top."""
        code = """return [...document.querySelectorAll('#rows > div')]
            .sort((a, b) => a.dataset.index - b.dataset.index)
            .map((row) => Number(row.firstChild.textContent))"""
        return self.js(code)

    def sort(self, key):
        self.one(f"#columns [data-key={key}]").click()
        return self

    def find(self, text):
        box = self.one("#search")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text or Keys.DELETE)
        self.until(f"document.querySelector('#search').value === {json.dumps(text)}")
        self.driver.execute_async_script("setTimeout(arguments[0], 250)")
        return int(self.one("#match-count").text.split(" of ")[0].replace(",", ""))

    def complaints(self, own="file:"):
        """The page's errors and warnings, and its requests for anything but itself, or what is at
        an address that begins with `own`."""
        complaints = [entry["message"] for entry in self.driver.get_log("browser")]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                pages = r"file:.*\.html" if own == "file:" else re.escape(own)
                if not re.match(rf"data:|blob:|about:|chrome:|{pages}", url):
                    complaints.append(url)
        return complaints


CONTRAST = """
const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
function background(node) {  // the first opaque one behind the node
  for (; node; node = node.parentElement) {
    const color = numbers(getComputedStyle(node).backgroundColor);
    if (color.length === 3) return color;
  }
  return [255, 255, 255];
}
return [...document.querySelectorAll(arguments[0])].map((node) => {
  const style = getComputedStyle(node);
  const ink = numbers(node instanceof SVGElement ? style.fill : style.color);
  const [a, b] = [luminance(ink), luminance(background(node))].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
});
"""
