"""The page of `handful inspect` in a real browser: it draws, it answers to pointer and keys, it fits a phone.

Needs Chromium and its driver on the path; without them these tests fail. `make browser-test` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browsing import started
from builders import moe
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from serving import tokenizer

from handful.inspection import inspect_model, page
from handful.model import Decoder

EXPERTS = 6


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    yield from started(1200, 1000)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses: of one model with its ablation, of two texts, and of a text of which little can be said."""
    folder = tmp_path_factory.mktemp("pages")
    own = tokenizer()
    torch.manual_seed(0)
    model = Decoder(moe({"experts": EXPERTS}, vocab=own.vocab_size, context=64, tied=False))
    model.tokenizer = own
    for kind, words in (("code", "def self return == ( ) :"), ("prose", "the of and a router , .")):
        for i in range(20):
            file = folder / kind / f"{i}.txt"
            file.parent.mkdir(exist_ok=True)
            listed = words.split()
            file.write_text(" ".join(listed[(i * j + j * j) % 7] for j in range(120)) + f" {i}\n")
    quick: dict[str, Any] = {"permutations": 20, "tokens": 4000, "context": 32}
    both, code = f"{folder}/*/*.txt", str(folder / "code")
    documents = {
        "one": inspect_model(model, both, ablate_tokens=200, **quick),
        "two": inspect_model(model, both, text2=code, ablate_tokens=0, **quick),
        "little": inspect_model(model, code, ablate_tokens=0, **(quick | {"tokens": 200})),
    }
    long = "a_name_without_a_place_to_break_it_" * 4
    for side in documents["little"]["sides"]:
        side |= {"notes": [f"{long}: skipped 3"], "model": long, "text": long}
    return {name: page.write(document, folder / name).as_uri() for name, document in documents.items()}


def at(browser: webdriver.Chrome, css: str) -> Any:
    return browser.find_element(By.CSS_SELECTOR, css)


MAPS = {"one": 6, "two": 2 * 5, "little": 3}


@pytest.mark.parametrize("name", MAPS)
def test_it_draws_without_a_complaint_and_fetches_nothing(
    chromium: webdriver.Chrome, pages: dict[str, str], name: str
) -> None:
    chromium.get_log("browser")  # type: ignore[no-untyped-call]
    chromium.get(pages[name])
    assert chromium.get_log("browser") == []  # type: ignore[no-untyped-call]
    assert chromium.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert len(chromium.find_elements(By.CSS_SELECTOR, "svg.heat")) == MAPS[name]
    assert len(chromium.find_elements(By.CSS_SELECTOR, "rect.cell")) == MAPS[name] * 2 * EXPERTS


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", MAPS)
def test_it_fits_a_phone(chromium: webdriver.Chrome, pages: dict[str, str], name: str, theme: str) -> None:
    screen = {"width": 390, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    wish = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)
    try:
        chromium.get(pages[name])
        chromium.execute_script("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        assert chromium.execute_script("return document.documentElement.scrollWidth") == 390
        paper = chromium.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert ("252" in paper) == (theme == "light")
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_arrow_keys_and_the_pointer_read_cells(chromium: webdriver.Chrome, pages: dict[str, str]) -> None:
    chromium.get(pages["one"])
    root, readout = at(chromium, "#map-token svg.heat"), at(chromium, "#map-token .readout")
    assert root.get_attribute("tabindex") == "0"
    assert "Follows token identity of every expert" in root.get_attribute("aria-label")
    assert readout.get_attribute("role") == "status"
    chromium.execute_script("arguments[0].focus()", root)
    ActionChains(chromium).send_keys(Keys.ARROW_RIGHT).perform()
    assert readout.text.startswith("Layer 0, expert 0: ")
    ActionChains(chromium).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN).perform()
    assert readout.text.startswith("Layer 1, expert 1: token identity explains ")
    assert "the halves agree by r = " in readout.text
    cost = at(chromium, "#map-cost svg.heat")
    chromium.execute_script("arguments[0].scrollIntoView({block: 'center'})", cost)
    ActionChains(chromium).move_to_element_with_offset(cost, round(0.45 * cost.rect["width"]), 0).perform()
    assert f"expert {EXPERTS - 1}: " in at(chromium, "#map-cost .readout").text
    assert " nats a token, q = " in at(chromium, "#map-cost .readout").text


def test_the_theme_is_a_button(chromium: webdriver.Chrome, pages: dict[str, str]) -> None:
    chromium.get(pages["one"])
    button = at(chromium, "#theme")
    button.click()
    assert button.text == "Theme: light"
    button.click()
    assert chromium.execute_script("return document.documentElement.dataset.theme") == "dark"
    button.click()
    assert button.text == "Theme: auto"


def test_without_javascript_the_finding_and_the_tables_are_there(
    chromium: webdriver.Chrome, pages: dict[str, str], tmp_path: Path
) -> None:
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        chromium.get(pages["one"])
        assert at(chromium, ".finding").text.startswith(f"Of {2 * EXPERTS} experts in 2 layers")
        assert len(chromium.find_elements(By.CSS_SELECTOR, ".trio svg circle")) == 3 * 2
        assert not at(chromium, "#h-maps").is_displayed()
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
