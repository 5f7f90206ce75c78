"""The page of a served model in a browser, as tests open it, use it and read it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from browsing import complaints, find
from selenium import webdriver
from selenium.webdriver import Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from serving import Served
from serving_ranks import Ranks

# JavaScript: `of` a colour of the style sheet, and `rgb` of a property of an element; then `probe` is to be removed.
PIXEL = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgb = (node, name) => {
  canvas.fillStyle = getComputedStyle(node)[name];
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const probe = document.createElement("p");
document.body.append(probe);
const of = (color) => { probe.style.color = color; return rgb(probe, "color"); };
"""


def opened(chromium: webdriver.Chrome, served: Served | Ranks) -> Iterator[webdriver.Chrome]:
    chromium.get(served.url)
    chromium.execute_script("localStorage.clear(); sessionStorage.clear(); localStorage.setItem('handful.tour', '1')")
    complaints(chromium)
    chromium.get(served.url)
    until(lambda: find(chromium, "#app").is_displayed())
    yield chromium
    # Violations of the policy are complaints too.
    assert complaints(chromium) == []


def until(true: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def every(page: webdriver.Chrome, css: str) -> list[WebElement]:
    return page.find_elements(By.CSS_SELECTOR, css)


def texts(page: webdriver.Chrome, css: str) -> list[str]:
    return list(
        page.execute_script("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", css)
    )


def state(page: webdriver.Chrome, expression: str) -> Any:
    """A JavaScript expression of the page's own state, which is drawn by the time that this returns."""
    return page.execute_async_script(
        "const done = arguments[0]; import('/web/js/state.js').then(({ state }) =>"
        "{ const found = " + expression + "; requestAnimationFrame(() => setTimeout(() => done(found))) })"
    )


def free_text(page: webdriver.Chrome, prompt: str, tokens: int = 24, side: str = "a") -> None:
    """Let the model go on, to its end."""
    page.execute_script(
        "document.querySelector('input[name=mode][value=completion]').click();"
        "document.querySelector('#max-tokens').value = arguments[0]",
        tokens,
    )
    field = find(page, "#prompt" if side == "a" else "#prompt-b")
    field.clear()
    field.send_keys(prompt.replace("\n", f"{Keys.SHIFT}{Keys.ENTER}{Keys.NULL}"))
    assert field.get_attribute("value") == prompt
    find(page, "#go").click()
    until(lambda: state(page, f"state.{side}.status") not in ("empty", "busy"))
    assert state(page, f"state.{side}.status") == "done", find(page, f"#note-{side}").text


def cells(page: webdriver.Chrome, layer: int) -> list[list[int]]:
    """The colours in the middle of a layer's cells on the map."""
    return list(
        page.execute_script(
            "const c = document.querySelector('#map'), n = document.querySelectorAll('.tile').length,"
            "s = c.width / c.clientWidth, cell = Math.min(44, (c.parentElement.clientWidth - 32) / n),"
            "rows = document.querySelectorAll('#layer option').length, row = (c.clientHeight - 2) / rows,"
            "copy = new OffscreenCanvas(c.width, c.height).getContext('2d', {willReadFrequently: true});"
            "copy.drawImage(c, 0, 0);"
            "return Array.from({length: n}, (_, e) => [...copy.getImageData("
            "s * (28 + (e + 0.35) * cell), s * (1 + (arguments[0] + 0.4) * row), 1, 1).data].slice(0, 3))",
            layer,
        )
    )
