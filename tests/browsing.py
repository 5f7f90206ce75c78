"""A headless Chromium for tests, and what they do in it.

Needs Chromium and its driver on the path.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

QUIET = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync")  # fmt: skip


def started(width: int, height: int, downloads: Path | None = None) -> Iterator[webdriver.Chrome]:
    """A browser until the generator ends; downloads: where it keeps files."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert browser, "chromium is not on the path: apt-get install chromium chromium-driver"
    assert driver, "chromedriver is not on the path: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},{height}", *QUIET):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if downloads is not None:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    chromium = webdriver.Chrome(options=options, service=Service(driver))
    yield chromium
    chromium.quit()


def complaints(browser: Any) -> list[Any]:
    """What the console said since the last call."""
    return list(browser.get_log("browser"))


def find(page: webdriver.Chrome, css: str) -> WebElement:
    return page.find_element(By.CSS_SELECTOR, css)


def touch(page: webdriver.Chrome, element: WebElement) -> None:
    """A finger in the middle of an element, of a broken line in that of its first part."""
    x, y = page.execute_script(
        "arguments[0].scrollIntoView({block: 'center'}); const b = arguments[0].getClientRects()[0];"
        "return [b.x + b.width / 2, b.y + b.height / 2]",
        element,
    )
    page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
    page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def linear(rgb: list[int]) -> list[float]:
    """sRGB, from 0 to 255, as shares of light."""
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in rgb)]


def contrast(a: list[int], b: list[int]) -> float:
    """WCAG 2 contrast ratio of two sRGB colours."""
    bright, dim = sorted((0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in map(linear, (a, b))), reverse=True)
    return (bright + 0.05) / (dim + 0.05)
