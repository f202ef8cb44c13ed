"""The report in a real browser without a network: no request, no error, nothing hidden, nothing too wide."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sample_run import METHODS, sample_run

from longspan.compare.report import pages as report

pytestmark = pytest.mark.browser

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
VISIBLE = """
return [...document.querySelectorAll('figure [role=img]')].map(drawing => {
  const boxes = [...drawing.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect());
  const shown = boxes.filter(box => box.width > 0 && box.height > 0);
  return {shown: shown.length, width: Math.max(...shown.map(b => b.width)), height: Math.max(...shown.map(b => b.height)),
          right: Math.max(...shown.map(b => b.right))};
});
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium with its driver on this machine")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.html(*sample_run(), tmp_path_factory.mktemp("page") / "report.html")


def open_at(browser: Any, page: Path, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())


def photograph(browser: Any, path: Path, width: int) -> None:
    """The whole page as a picture, to be looked at."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    made = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(made["data"]))


@pytest.mark.parametrize("width", [1280, 390])
def test_page_is_whole_at_this_width(browser: Any, page: Path, width: int, tmp_path: Path):
    open_at(browser, page, width)
    photograph(browser, tmp_path / f"report-{width}.png", width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    drawings = browser.execute_script(VISIBLE)
    assert len(drawings) == 1 + len(METHODS) + 4 + 2
    for drawing in drawings:
        assert drawing["shown"] == 1  # the wide or the narrow one, never both
        assert drawing["width"] > 120
        assert drawing["height"] > 100
        assert drawing["right"] <= width


def test_page_asks_for_nothing_and_reports_no_error(browser: Any, page: Path):
    browser.get_log("browser")
    browser.get_log("performance")
    open_at(browser, page, 1280)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked == [page.as_uri()]


def test_page_opens_with_the_advice(browser: Any, page: Path):
    open_at(browser, page, 1280)
    first = browser.execute_script(
        "const p = document.querySelector('p'); return [p.innerText, p.getBoundingClientRect().bottom]"
    )
    assert first[0].replace("\u00a0", " ").startswith("For smollm2-135m at 32,768 tokens, use ntk:factor=8")
    assert first[1] < 900  # seen without scrolling


def test_wide_table_scrolls_in_itself_and_keeps_the_names(browser: Any, page: Path):
    open_at(browser, page, 390)
    left = browser.execute_script(
        "const box = document.querySelector('.scroll'); box.scrollLeft = 300;"
        "return [box.scrollLeft, box.querySelector('tbody th').getBoundingClientRect().left,"
        "        box.getBoundingClientRect().left]"
    )
    assert left[0] == 300
    assert left[1] == left[2]


def test_numbers_of_a_figure_open_and_fit(browser: Any, page: Path):
    open_at(browser, page, 390)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.execute_script("return document.querySelector('details table').offsetHeight") > 100
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


def test_printed_page_is_not_cut_off(browser: Any, page: Path):
    open_at(browser, page, 1010)  # A4 across, without its margins
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    widths = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.querySelector('.main').getBoundingClientRect().right]"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert max(widths) <= 1010
