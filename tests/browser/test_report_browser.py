"""The report in a real browser: it draws, it answers to pointer, touch and keys, and it fits a phone.

Needs Chromium and its driver on the path; without them these tests fail. `make browser-test` runs them.
"""

from __future__ import annotations

import base64
import itertools
import math
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from comparisons import document, several
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from handful import report

QUIET = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync")  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert browser, "chromium is not on the path: apt-get install chromium chromium-driver"
    assert driver, "chromedriver is not on the path: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1000", *QUIET):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def comparison() -> dict[str, Any]:
    return dict(document())


@pytest.fixture(scope="module")
def pages(comparison: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of a comparison, of one whose routing collapsed, of a single run, of a run with nothing to draw, and of
    a comparison of several mixtures."""
    folder = tmp_path_factory.mktemp("pages")
    single, bare = document(), document()
    single["teams"] = [single["teams"][1]]
    bare["teams"] = [{**bare["teams"][0], "curve": []}]
    bare["sample"] = None
    documents = {"three": comparison, "collapsed": document(collapsed=True), "single": single, "bare": bare}
    documents["several"] = several()
    return {name: report.write(doc, folder / f"{name}.html").as_uri() for name, doc in documents.items()}


@pytest.fixture
def page(chromium: webdriver.Chrome, pages: dict[str, str]) -> Iterator[webdriver.Chrome]:
    """The comparison, opened afresh; nothing in the test may have made the console complain."""
    complaints(chromium)
    chromium.get(pages["three"])
    yield chromium
    assert complaints(chromium) == []


def complaints(browser: Any) -> list[Any]:
    """What the console said since the last call."""
    return list(browser.get_log("browser"))


def find(page: webdriver.Chrome, css: str) -> WebElement:
    return page.find_element(By.CSS_SELECTOR, css)


def keys(page: webdriver.Chrome, element: WebElement, *pressed: str) -> None:
    page.execute_script("arguments[0].focus()", element)
    actions = ActionChains(page)
    for key in pressed:
        actions.send_keys(key)
    actions.perform()


def point(page: webdriver.Chrome, element: WebElement, x: float, y: float) -> None:
    """Put the mouse at a share of an element's width and height."""
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    box = element.rect
    ActionChains(page).move_to_element_with_offset(
        element, round((x - 0.5) * box["width"]), round((y - 0.5) * box["height"])
    ).perform()


@pytest.mark.parametrize("name", ["three", "collapsed", "single", "bare", "several"])
def test_it_draws_without_a_complaint_and_fetches_nothing(
    chromium: webdriver.Chrome, pages: dict[str, str], name: str
) -> None:
    complaints(chromium)
    chromium.get(pages[name])
    assert complaints(chromium) == []
    assert chromium.execute_script("return performance.getEntriesByType('resource').length") == 0
    lines = {"three": 3, "collapsed": 3, "single": 1, "bare": 0, "several": 5}[name]
    assert len(chromium.find_elements(By.CSS_SELECTOR, "#panel-tokens path.line")) == lines
    assert len(chromium.find_elements(By.CSS_SELECTOR, "rect.cell")) == {"bare": 0, "several": 3}.get(name, 1) * 3 * 64
    assert len(chromium.find_elements(By.CSS_SELECTOR, "#sample")) == (name != "bare")
    assert len(chromium.find_elements(By.CSS_SELECTOR, ".banner.alarm")) == (name == "collapsed")


@pytest.mark.parametrize("name", ["three", "collapsed", "single", "bare", "several"])
def test_it_fits_a_phone(chromium: webdriver.Chrome, pages: dict[str, str], name: str) -> None:
    screen = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        chromium.get(pages[name])
        assert chromium.execute_script("return document.documentElement.scrollWidth") == 360
        # Nothing stands out on the right, but for what scrolls in its own box.
        outside = chromium.execute_script(
            "return [...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll') && "
            "e.getBoundingClientRect().right > 361).map((e) => e.outerHTML)"
        )
        assert outside == []
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_cells_of_many_teams_do_not_meet(chromium: webdriver.Chrome, pages: dict[str, str]) -> None:
    chromium.get(pages["several"])
    overlaps = chromium.execute_script(
        "return [...document.querySelectorAll('.measures tr')].flatMap((row) => [...row.cells].filter((cell, i) => "
        "i && cell.scrollWidth > cell.clientWidth + 1).map((cell) => cell.textContent))"
    )
    assert overlaps == []


def test_tabs_by_pointer_and_keys(page: webdriver.Chrome) -> None:
    def shown() -> list[str]:
        panels = page.find_elements(By.CSS_SELECTOR, "[role=tabpanel]")
        return [str(panel.get_attribute("id")) for panel in panels if panel.is_displayed()]

    assert shown() == ["panel-tokens"]
    find(page, "#tab-flops").click()
    assert shown() == ["panel-flops"]
    keys(page, find(page, "#tab-flops"), Keys.ARROW_RIGHT)
    assert shown() == ["panel-seconds"]
    assert page.switch_to.active_element == find(page, "#tab-seconds")
    keys(page, find(page, "#tab-seconds"), Keys.ARROW_RIGHT)
    assert shown() == ["panel-tokens"]
    selected = [tab.get_attribute("aria-selected") for tab in page.find_elements(By.CSS_SELECTOR, "[role=tab]")]
    assert selected == ["true", "false", "false"]


def test_curves_are_read_by_keys_and_pointer(page: webdriver.Chrome, comparison: dict[str, Any]) -> None:
    chart, legend = find(page, "#panel-tokens svg"), find(page, "#panel-tokens .legend")
    at_end = legend.text
    assert "Team 2 · mixture of experts 3.393 (3.391–3.395)" in at_end
    keys(page, chart, Keys.HOME)
    for _ in range(19):
        keys(page, chart, Keys.ARROW_RIGHT)
    losses = [team["curve"][19]["loss"] for team in comparison["teams"]]
    assert [line.split("(")[0].split()[-1] for line in legend.text.splitlines()] == [f"{loss:.3f}" for loss in losses]
    assert "after 2.05 M tokens" in find(page, "#panel-tokens .readout").text.replace("\u202f", " ")
    assert f"Team 3 · big dense {losses[2]:.3f}" in str(chart.get_attribute("aria-valuetext"))
    keys(page, chart, Keys.ESCAPE)
    assert legend.text == at_end
    point(page, chart, 0.4, 0.5)
    assert legend.text != at_end
    assert len(page.find_elements(By.CSS_SELECTOR, "#panel-tokens .dot")) == 3
    point(page, find(page, "h1"), 0.5, 0.5)
    assert legend.text == at_end


def test_the_lines_are_where_the_numbers_are(page: webdriver.Chrome, comparison: dict[str, Any]) -> None:
    """Pixel heights of two line ends, against the loss axis's own tick marks."""
    height = "const b = document.querySelector('#panel-tokens svg'); "
    ends = page.execute_script(
        height + "return [...b.querySelectorAll('path.line')].map((p) => p.getPointAtLength(p.getTotalLength()).y)"
    )
    ticks = page.execute_script(
        height + "const y = [...b.querySelectorAll('.grid')].map((l) => +l.getAttribute('y1'));"
        "return [...b.querySelectorAll('text[text-anchor=end]')].map((t, i) => [+t.textContent, y[i]])"
    )
    (low, low_y), (high, high_y) = ticks[0], ticks[-1]
    per_nat = (low_y - high_y) / (high - low)
    for team, end in zip(comparison["teams"], ends, strict=True):
        assert end == pytest.approx(low_y - (team["heldout_loss"]["mean"] - low) * per_nat, abs=0.2)


def test_load_at_every_step(page: webdriver.Chrome, comparison: dict[str, Any]) -> None:
    routing = comparison["teams"][1]["routing"]
    slider, section = find(page, ".routing input[type=range]"), find(page, ".routing")

    def table() -> list[list[str]]:
        rows = section.find_elements(By.CSS_SELECTOR, ".layers tbody tr")
        return [[cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")] for row in rows]

    def expected(i: int) -> list[list[str]]:
        stats = zip(routing["max_vio"][i], routing["dead"][i], routing["entropy"][i], strict=True)
        return [[str(layer), f"{m:.2f}", f"{d} of 64", f"{h:.3f}"] for layer, (m, d, h) in enumerate(stats)]

    def colors() -> list[str]:
        return [str(cell.get_attribute("style")) for cell in page.find_elements(By.CSS_SELECTOR, "rect.cell")]

    assert table() == expected(49)
    late = colors()
    keys(page, slider, Keys.HOME)
    assert table() == expected(0)
    assert "step 10" in find(page, ".step output").text
    assert "step 10 ·" in str(slider.get_attribute("aria-valuetext"))
    assert colors() != late
    keys(page, slider, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert table() == expected(2)
    # The small charts move the same step, by keys and by pointer.
    chart = find(page, ".routing .trio svg")
    keys(page, chart, Keys.ARROW_RIGHT)
    assert table() == expected(3)
    assert f"layer 0 {routing['max_vio'][3][0]:.2f}" in str(chart.get_attribute("aria-valuetext"))
    point(page, chart, 0.99, 0.5)
    assert table() == expected(49)


def test_a_cell_reads_out_its_load(page: webdriver.Chrome, comparison: dict[str, Any]) -> None:
    load = comparison["teams"][1]["routing"]["load"][49]
    heat, readout = find(page, "svg.heat"), find(page, ".routing .readout")

    def says(layer: int, expert: int) -> bool:
        percent, times = f"{100 * load[layer][expert]:.2f}", f"{64 * load[layer][expert]:.2f}"
        where = f"Layer {layer}, expert {expert}"
        return readout.text == f"{where}: {percent} % of assignments, {times}× the even load (1.56 %)."

    keys(page, heat, Keys.ARROW_RIGHT)
    assert says(0, 0)
    keys(page, heat, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert says(1, 2)
    keys(page, heat, *[Keys.ARROW_DOWN] * 5)
    assert says(2, 2)
    cell = page.find_elements(By.CSS_SELECTOR, "rect.cell")[64 + 30]
    point(page, cell, 0.5, 0.5)
    assert says(1, 30)


def test_dead_experts_are_crossed_out(chromium: webdriver.Chrome, pages: dict[str, str]) -> None:
    chromium.get(pages["collapsed"])
    assert len(chromium.find_elements(By.CSS_SELECTOR, "rect.cell.dead")) == 61
    assert len(chromium.find_elements(By.CSS_SELECTOR, ".cross[visibility=visible]")) == 61


def test_tokens_show_and_mark_their_experts(page: webdriver.Chrome, comparison: dict[str, Any]) -> None:
    sample = comparison["sample"]
    first = [[ids[0] for ids in layer] for layer in sample["experts"]]  # its weight is at least a half
    spans = page.find_elements(By.CSS_SELECTOR, "#sample .text span")
    readout = find(page, "#sample .token-readout")
    assert "".join(str(span.get_attribute("textContent")) for span in spans) == "".join(sample["pieces"])

    def marked() -> list[int]:
        return [i for i, span in enumerate(spans) if "same" in str(span.get_attribute("class")).split()]

    token = sample["pieces"].index("path")
    point(page, spans[token], 0.5, 0.5)
    (one, two), (a, b) = sample["experts"][0][token], sample["weights"][0][token]
    assert readout.text == f"“path” at layer 0: expert {one} ({a:.2f}), expert {two} ({b:.2f})."
    assert marked() == []
    spans[token].click()
    assert marked() == [i for i, expert in enumerate(first[0]) if expert == first[0][token]]
    assert f"Expert {one} comes first for {len(marked())} of {len(spans)} tokens" in readout.text
    Select(find(page, "#sample-layer")).select_by_visible_text("layer 2")
    assert marked() == []
    # By keys: the token stays where it was.
    keys(page, find(page, "#sample .text"), Keys.ARROW_RIGHT, Keys.ENTER)
    assert f"Expert {first[2][token + 1]} comes first" in readout.text
    assert marked() == [i for i, expert in enumerate(first[2]) if expert == first[2][token + 1]]
    keys(page, find(page, "#sample .text"), Keys.ESCAPE)
    assert marked() == []
    spans[0].click()
    find(page, "#sample .controls button").click()
    assert marked() == []


def test_touch_reads_a_chart_and_a_cell(chromium: webdriver.Chrome, pages: dict[str, str]) -> None:
    screen = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    chromium.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        chromium.get(pages["three"])
        for chart, readout in (("#panel-tokens svg", "#panel-tokens .legend"), ("svg.heat", ".routing .readout")):
            before = find(chromium, readout).text
            box = chromium.execute_script(
                "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center'});"
                "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 3]",
                chart,
            )
            touch = [{"x": box[0], "y": box[1]}]
            chromium.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": touch})
            chromium.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
            # It stays when the finger leaves: nobody reads through a finger.
            assert find(chromium, readout).text != before
    finally:
        chromium.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


PIXEL = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgb = (node, name) => {
  canvas.fillStyle = getComputedStyle(node)[name];
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
"""


def contrast(a: list[int], b: list[int]) -> float:
    """WCAG 2 contrast ratio of two sRGB colours."""

    def luminance(rgb: list[int]) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_read_and_told_apart(page: webdriver.Chrome, theme: str) -> None:
    page.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    colors = page.execute_script(
        PIXEL + "const probe = document.createElement('p'); document.body.append(probe);"
        "const of = (color) => { probe.style.color = color; return rgb(probe, 'color'); };"
        "const named = (...names) => names.map((name) => of(`var(--${name})`));"
        "const out = { paper: of('var(--paper)'), ink: of('var(--ink)'),"
        "words: named('ink', 'muted', 'alarm', 'dense-active', 'moe', 'dense-total', 'moe-2', 'moe-3', 'moe-4', "
        "'moe-5'),"
        "teams: named('dense-active', 'moe', 'dense-total', 'moe-2', 'moe-3', 'moe-4', 'moe-5'),"
        "experts: [...Array(HIGHLIGHTED + 2).keys()].map((place) => of(expertColor(place))) };"
        "probe.remove(); return out;"
    )
    assert min(contrast(word, colors["paper"]) for word in colors["words"]) >= 4.5
    assert min(contrast(colors["ink"], expert) for expert in colors["experts"]) >= 4.5
    assert (sum(colors["paper"]) > 600) == (theme == "light")
    assert min(math.dist(a, b) for a, b in itertools.combinations(colors["experts"], 2)) > 20
    assert min(math.dist(a, b) for a, b in itertools.combinations(colors["teams"], 2)) > 60


def test_the_theme_button(page: webdriver.Chrome) -> None:
    button = find(page, "#theme")
    seen = []
    for _ in range(4):
        ground = page.execute_script(PIXEL + "return rgb(document.body, 'backgroundColor')")
        seen.append((button.text, "light" if sum(ground) > 600 else "dark"))
        button.click()
    assert [name for name, _ in seen] == ["Theme: auto", "Theme: light", "Theme: dark", "Theme: auto"]
    assert [ground for _, ground in seen[1:3]] == ["light", "dark"]
    page.refresh()
    assert find(page, "#theme").text == "Theme: light"
    page.execute_script("localStorage.clear()")


def test_it_follows_the_system(page: webdriver.Chrome) -> None:
    for scheme in ("dark", "light"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        ground = page.execute_script(PIXEL + "return rgb(document.body, 'backgroundColor')")
        assert (sum(ground) > 600) == (scheme == "light")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_without_javascript(chromium: webdriver.Chrome, pages: dict[str, str]) -> None:
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        chromium.get(pages["collapsed"])
        for css in (".finding", ".measures", ".banner.alarm", "noscript .note", "#h-made"):
            assert find(chromium, css).is_displayed(), css
        for css in ("#curves", "#sample", "#theme"):
            assert not find(chromium, css).is_displayed(), css
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_it_prints_every_chart(page: webdriver.Chrome) -> None:
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert [p.is_displayed() for p in page.find_elements(By.CSS_SELECTOR, "[role=tabpanel]")] == [True] * 3
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    paper = page.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    assert base64.b64decode(paper).startswith(b"%PDF")
