"""The report in a real browser: it draws, it answers to pointer, touch and keys, and it fits a phone.

Needs Chromium and its driver on the path; without them these tests fail. `make browser-test` runs them.
"""

from __future__ import annotations

import base64
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
from browsing import complaints, contrast, find, started, touch
from comparisons import document, several
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from handful import report


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    yield from started(1200, 1000)


@pytest.fixture(scope="module")
def comparison() -> dict[str, Any]:
    return dict(document())


@pytest.fixture(scope="module")
def pages(comparison: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of a comparison, of one whose routing collapsed, of a single run, of a run with nothing to draw, of one
    that was evaluated once, of a comparison of several mixtures, and of one with an early peak and a warning of it."""
    folder = tmp_path_factory.mktemp("pages")
    single, bare = document(), document()
    single["teams"] = [single["teams"][1]]
    bare["teams"] = [{**bare["teams"][0], "curve": []}]
    bare["sample"] = None
    short = document()
    for team in short["teams"]:
        team["curve"] = team["curve"][-1:]
        team["stability"] = []
    short["teams"][1]["routing"] = {key: values[-1:] for key, values in short["teams"][1]["routing"].items()}
    short["lesson"] = None
    documents = {
        "short": short,
        "three": comparison,
        "collapsed": document(collapsed=True),
        "single": single,
        "bare": bare,
    }
    documents["several"], documents["warned"] = several(), document()
    documents["warned"]["teams"][1]["warnings"] = ["step 10: routing collapsed in layer 2"]
    return {name: report.write(doc, folder / f"{name}.html").as_uri() for name, doc in documents.items()}


@pytest.fixture
def page(chromium: webdriver.Chrome, pages: dict[str, str]) -> Iterator[webdriver.Chrome]:
    """The comparison, opened afresh; nothing in the test may have made the console complain."""
    complaints(chromium)
    chromium.get(pages["three"])
    yield chromium
    assert complaints(chromium) == []


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


# ---------------------------------------------------------------------------------------------------------------------
# The lesson.


def test_the_way_of_a_token_by_keys_and_pointer(page: webdriver.Chrome, comparison: dict[str, Any]) -> None:
    told = comparison["lesson"]["way"]["tokens"]
    stage, says, place = find(page, ".way-stage"), find(page, ".way-says"), find(page, ".way-place")
    buttons = page.find_elements(By.CSS_SELECTOR, ".way-tokens button")
    assert len(buttons) == len(told) == 8

    def chosen() -> list[int]:
        bars = stage.find_elements(By.CSS_SELECTOR, "rect.score")
        return [i for i, bar in enumerate(bars) if "chosen" in str(bar.get_attribute("class"))]

    buttons[2].click()
    assert [button.get_attribute("aria-pressed") for button in buttons].index("true") == 2
    assert place.text == "step 1 of 14"
    assert not find(page, ".way-back").is_enabled()
    first = told[2]["layers"][0]
    # Scores of all, the chosen two, what each gives, the blend; then the next layer.
    find(page, ".way-next").click()
    assert "gives each of the 64 experts a score" in says.text
    assert len(stage.find_elements(By.CSS_SELECTOR, "rect.score")) == 64
    assert chosen() == []
    keys(page, stage, Keys.ARROW_RIGHT)
    assert (
        f"Only expert {first['experts'][0]} and expert {first['experts'][1]} will work; the other 62 rest" in says.text
    )
    assert chosen() == sorted(first["experts"])
    keys(page, stage, Keys.ARROW_RIGHT)
    rows = [[cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")]
            for row in stage.find_elements(By.CSS_SELECTOR, ".parts tbody tr")]  # fmt: skip
    assert [row[1] for row in rows] == [f"{weight:.3f} ×" for weight in first["weights"]]
    assert [row[-1] for row in rows] == ["90 %", "10 %"]
    keys(page, stage, Keys.ARROW_RIGHT)
    cells = stage.find_elements(By.CSS_SELECTOR, ".parts .sum td")
    assert [cell.text for cell in cells[1:7]] == [f"{value:.2f}" for value in first["blend"]]
    assert "goes from 40 to 52" in stage.text
    keys(page, stage, Keys.ARROW_RIGHT)
    assert says.text.startswith("Layer 1. The router")
    keys(page, stage, Keys.END)
    assert place.text == "step 14 of 14"
    assert [item.text.split() for item in stage.find_elements(By.CSS_SELECTOR, "li")] == [
        ["<i>", "50.0", "%"],
        ["a", "25.0", "%"],
    ]
    assert not find(page, ".way-next").is_enabled()
    keys(page, stage, Keys.HOME)
    assert place.text == "step 1 of 14"


def test_apprentices_are_counted(page: webdriver.Chrome, comparison: dict[str, Any]) -> None:
    layers = comparison["sample"]["experts"]
    ten = [len({e for token in layer[:10] for e in token}) for layer in layers]
    assert f"10 tokens: {sum(ten) / 3:.0f} ·" in find(page, "#apprentices .how").text
    chart = find(page, "#apprentices svg")
    keys(page, chart, Keys.HOME, *[Keys.ARROW_RIGHT] * 9)
    each = ", ".join(f"layer {layer} {count}" for layer, count in enumerate(ten))
    assert f"After 10 tokens: {each}; experts drawn at random would be 17." in str(
        chart.get_attribute("aria-valuetext")
    )


def test_cards_of_experts(page: webdriver.Chrome) -> None:
    section = find(page, "#experts")

    def shown() -> list[str]:
        return [str(card.get_attribute("data-expert")) for card in section.find_elements(By.CSS_SELECTOR, ".card")]

    assert "9 of 192 experts change the loss by more than noise. The costliest is expert 63 of layer 0" in section.text
    Select(find(page, "#card-order")).select_by_value("cost")
    assert shown() == [str(e) for e in range(63, 55, -1)]
    first = find(page, ".card").text
    assert "+0.0630 ± 0.0005 nats" in first
    assert "within noise" not in first
    assert "<b>&" in first
    assert "within noise" in section.find_elements(By.CSS_SELECTOR, ".card")[-1].text
    # A partner leads to its card, whether or not it is among those that are shown.
    find(page, ".card .partner").click()
    assert len(shown()) == 64
    assert page.switch_to.active_element.get_attribute("data-expert") == "0"
    find(page, "#experts .more").click()
    assert len(shown()) == 8
    Select(find(page, "#card-layer")).select_by_visible_text("layer 2")
    assert "of layer 2" in str(find(page, ".card").get_attribute("aria-label"))


def test_a_word_in_two_contexts(page: webdriver.Chrome) -> None:
    section = find(page, "#word")
    assert "they share 2 of 6 choices" in section.text
    assert "the word itself decides much of the routing" in section.text  # 3.5 shared beside 0.25 of any two tokens
    assert "does not stand twice" not in section.text  # it is the word that was asked for
    chips = [chip.text.split()[0] for chip in section.find_elements(By.CSS_SELECTOR, ".chip.same")]
    assert chips == ["2", "3", "2", "3"]
    assert "the </pre> of  Paris" in str(
        section.find_elements(By.CSS_SELECTOR, ".context")[1].get_attribute("textContent")
    )


def test_losses_of_every_token(page: webdriver.Chrome, comparison: dict[str, Any]) -> None:
    losses, text = comparison["lesson"]["losses"], find(page, "#losses .text")
    readout, summary = find(page, "#losses .readout"), find(page, "#losses .controls + .how")
    more = [a - b for a, b in zip(losses["dense-active"][1:], losses["moe"][1:], strict=True)]
    assert f"Blue is ahead on {sum(v > 0 for v in more)} of {len(more)} tokens" in summary.text
    keys(page, text, Keys.ARROW_RIGHT)
    assert "begins a sequence" in readout.text
    keys(page, text, Keys.ARROW_RIGHT)
    assert f"mixture of experts {losses['moe'][1]:.2f}" in readout.text
    Select(find(page, "#loss-view")).select_by_visible_text("loss of big dense")
    mean = sum(losses["dense-total"][1:]) / len(more)
    assert summary.text.startswith(f"big dense: {mean:.3f} nats per token")
    assert [node.text for node in page.find_elements(By.CSS_SELECTOR, "#go-on dt")][-1] == "What really follows"
    assert find(page, "#go-on dd").text == "self, </pre><b>"


def test_the_strip_plays_and_stops(page: webdriver.Chrome) -> None:
    play, when = find(page, ".play"), find(page, ".step output")
    assert when.text.startswith("step 500")
    play.click()
    assert when.text.startswith("step 10 ")
    WebDriverWait(page, 3).until(lambda _: not when.text.startswith("step 10 "))
    play.click()
    stopped = when.text
    time.sleep(0.5)
    assert when.text == stopped
    assert play.text == "▶ Play"


def test_with_and_without_balance(chromium: webdriver.Chrome, pages: dict[str, str]) -> None:
    chromium.get(pages["several"])
    pairs = chromium.find_elements(By.CSS_SELECTOR, ".balance-pair")
    assert [[h.text for h in pair.find_elements(By.CSS_SELECTOR, "h3")] for pair in pairs] == [
        ["Team 2 · mixture of experts", "Team · free"],
        ["Team · wide", "Team · free"],
    ]
    assert len(pairs[0].find_elements(By.CSS_SELECTOR, ".profile")) == 6
    assert "balance none" in pairs[0].text


def test_a_peak_that_a_warning_speaks_of_is_in_the_chart(chromium: webdriver.Chrome, pages: dict[str, str]) -> None:
    """Of every line of the small charts, its highest point is below the top of the plot."""
    above = """return [...document.querySelectorAll('.routing .trio svg')].map((root) => {
      const top = +root.querySelector('clipPath rect').getAttribute('y');
      const points = [...root.querySelectorAll('path.line')].map((p) => p.getAttribute('d').match(/,-?[\\d.]+/g));
      return Math.min(...points.flat().map((y) => +y.slice(1))) < top - 0.5; })"""
    for name in ("collapsed", "warned"):
        chromium.get(pages[name])
        assert chromium.execute_script(above) == [False] * 4
    # Without a warning an early peak may stand above the chart, which says so beside it.
    chromium.get(pages["three"])
    found = chromium.execute_script(above)
    notes = [note.text for note in chromium.find_elements(By.CSS_SELECTOR, ".routing .trio p")]
    assert found == ["Early on it was up to" in note for note in notes] == [True, True, False, False]


def test_short_runs_have_no_empty_charts(chromium: webdriver.Chrome, pages: dict[str, str]) -> None:
    chromium.get(pages["short"])
    assert complaints(chromium) == []
    for css in ("#curves svg", ".routing .trio", ".routing input", "#way", "#word"):
        assert chromium.find_elements(By.CSS_SELECTOR, css) == [], css
    assert "evaluated once" in find(chromium, ".note").text + chromium.find_element(By.TAG_NAME, "main").text
    assert find(chromium, "svg.heat").is_displayed()


def test_a_finger_finds_a_cell_and_a_step(chromium: webdriver.Chrome, pages: dict[str, str]) -> None:
    screen = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    chromium.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        chromium.get(pages["three"])
        assert chromium.execute_script("return document.documentElement.scrollWidth") == 390
        # WCAG 2.5.8: 24 pixels at least; buttons are larger.
        box = find(chromium, "rect.cell").rect
        assert min(box["width"], box["height"]) >= 24
        for css in (".way-next", ".way-tokens button", ".card .partner", ".play", ".expert-legend button"):
            assert find(chromium, css).rect["height"] >= 44, css
        cell = chromium.find_elements(By.CSS_SELECTOR, "rect.cell")[64 + 30]
        touch(chromium, cell)
        assert find(chromium, ".routing .readout").text.startswith("Layer 1, expert 30:")
        touch(chromium, find(chromium, ".way-next"))
        assert find(chromium, ".way-place").text == "step 2 of 14"
    finally:
        chromium.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_words_lead_to_their_meaning(page: webdriver.Chrome) -> None:
    find(page, "#experts a[href='#term-load']").click()
    meaning = find(page, "#term-load + dd")
    assert meaning.text == "the share of the assignments that each expert got; even is 1/E."
    assert page.execute_script("return arguments[0].getBoundingClientRect().top < innerHeight", meaning)


def test_a_few_colours_and_the_rest_by_pointing(page: webdriver.Chrome) -> None:
    colors = page.execute_script(
        "return [...document.querySelectorAll('#sample .text span')].map((s) => s.style.getPropertyValue('--b'))"
    )
    assert len(set(colors)) == 7
    chips = page.find_elements(By.CSS_SELECTOR, ".expert-legend button")
    assert len(chips) == 6
    chips[0].click()
    marked = page.find_elements(By.CSS_SELECTOR, "#sample .text .same")
    assert chips[0].text.endswith(f"first for {len(marked)}")
    assert chips[0].get_attribute("aria-pressed") == "true"
    chips[0].click()
    assert page.find_elements(By.CSS_SELECTOR, "#sample .text .same") == []


PIXEL = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgb = (node, name) => {
  canvas.fillStyle = getComputedStyle(node)[name];
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
"""


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
