"""What the page says of a server's ranks: of real ones, and of answers that are put in the place of the server's.

Needs Chromium and its driver on the path; without them these tests fail. `make browser-test` runs them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import contrast, find, started
from browsing_page import PIXEL, cells, free_text, opened, texts, until
from selenium import webdriver
from serving import chat_model, serving
from serving_ranks import running, whole

from handful.families.io import save
from handful.model import Decoder

EXPERTS, LAYERS = 16, 2
PAGE = 4096  # bytes that an expert takes: these are small

# Every page that is loaded asks `window.told` for its ranks, and the server for all else; null: no answer.
ANSWERED = """
const real = window.fetch;
window.told = FIRST;
window.fetch = async (path, ...rest) => {
  if (path !== "ranks") return real(path, ...rest);
  if (window.told === null) throw new TypeError("no answer");
  return Response.json(window.told);
};
"""
ASK = """
const [answer, done] = arguments;
window.told = answer;
import("/web/js/ranks.js").then(async ({ askRanks }) => {
  await askRanks();
  requestAnimationFrame(() => setTimeout(done));
});
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    yield from started(1280, 900)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return chat_model(router={"experts": EXPERTS, "top_k": 2})


def rank_rows(page: webdriver.Chrome) -> list[list[str]]:
    """The table of ranks, cell by cell."""
    return list(
        page.execute_script(
            "return [...document.querySelectorAll('#ranks tbody tr')]"
            ".map((row) => [...row.children].map((cell) => cell.textContent))"
        )
    ) or [[""] * 6]


def labels_of(page: webdriver.Chrome) -> list[str]:
    """What the tiles of the layer are called."""
    return list(
        page.execute_script("return [...document.querySelectorAll('.tile')].map((e) => e.getAttribute('aria-label'))")
    )


def test_ranks_that_come_and_go(chromium: webdriver.Chrome, model: Decoder, tmp_path: Path) -> None:
    """Real ones, that have no room for each other's experts: the one that is stopped leaves a gap, and comes back."""
    save(model, tmp_path / "tiny")
    said = f"Answers are made without {{}} of {LAYERS * EXPERTS} experts: "
    with running(tmp_path / "tiny", "--memory", str((EXPERTS + 2) * PAGE), ranks=2) as ranks:
        held = {rank["rank"]: rank["experts"] for rank in ranks.until(whole)["ranks"]}
        pid, counts = ranks.pid(0), [sum(map(len, held[rank].values())) for rank in (0, 1)]
        lost = held[0]["0"]
        with contextlib.contextmanager(opened)(chromium, ranks) as page:
            note = find(page, "#ranks-note")
            until(lambda: rank_rows(page)[0][0] == "0 there")
            free_text(page, "the cat sat on the mat")
            until(lambda: rank_rows(page)[0][1] != "–")
            rows = rank_rows(page)
            assert [row[0] for row in rows] == ["0 there", "1 there"]
            assert sum(int(row[1].removesuffix("\u00a0%")) for row in rows) == pytest.approx(100, abs=1)
            assert [int(row[2]) for row in rows] == counts
            assert all(row[3].endswith("B") and row[4].endswith("B") and row[5].endswith("s") for row in rows)
            assert note.text == ""
            os.kill(pid, signal.SIGSTOP)
            try:
                until(lambda: rank_rows(page)[0] == ["0 gone", *"–––––"])
                until(lambda: note.text.startswith(said.format(counts[0])))
                until(lambda: "nats a token" in note.text, 60)
                marks = ["!" if expert in lost else "●" for expert in range(EXPERTS)]
                until(lambda: texts(page, ".tile .mark") == marks)
                labels = labels_of(page)
                assert [expert for expert, label in enumerate(labels) if label.endswith(", missing")] == lost
                assert not any("on disk" in label for label in labels)
                empty = [expert for expert, found in enumerate(cells(page, 0)) if found == [0, 0, 0]]
                assert empty == lost
                assert "! dashed: missing" in find(page, "#places").text
            finally:
                os.kill(pid, signal.SIGCONT)
            until(lambda: rank_rows(page)[0][0] == "0 there", 40)
            until(lambda: "!" not in texts(page, ".tile .mark"))
            assert note.text == ""


@pytest.fixture
def page(chromium: webdriver.Chrome, model: Decoder) -> Iterator[webdriver.Chrome]:
    """The page of a server that has no ranks itself, whose answers about them are the test's."""
    source = ANSWERED.replace("FIRST", json.dumps(FIRST))
    script = chromium.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    try:
        with serving(model) as served:
            yield from opened(chromium, served)
    finally:
        chromium.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def rank(number: int, experts: int, **changes: Any) -> dict[str, Any]:
    """As /ranks tells it; experts: of the first layer, it has none of the second one."""
    own = {"pid": 7 + number, "linked": True, "holdable": 8, "experts": {"0": list(range(experts)), "1": []}}
    work = {"assignments": 0, "bytes_sent": 1.5e6, "bytes_received": 20, "waited_seconds": 61.2}
    return {"rank": number, **own, **work, **changes}


def answer(*ranks: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"ranks": list(ranks), "gone": [], "outages": [], "degraded": None, **changes}


FIRST = answer(rank(0, 4, assignments=300), rank(1, 4, assignments=100), rank(2, 0), gone=[2, 3])


def test_shares_are_of_late(page: webdriver.Chrome) -> None:
    until(lambda: len(rank_rows(page)) == 4)
    traffic = ["1.5\u00a0MB", "20\u00a0B", "61\u00a0s"]
    assert rank_rows(page) == [
        ["0 there", "75\u00a0%", "4", *traffic],
        ["1 there", "25\u00a0%", "4", *traffic],
        ["2 joining", *"–––––"],
        ["3 gone", *"–––––"],
    ]
    wide = page.execute_script("return [...document.querySelectorAll('#ranks .bar')].map((e) => e.offsetWidth)")
    assert wide[0] == pytest.approx(3 * wide[1], abs=2)
    # What came since, and all of a rank that began anew.
    page.execute_async_script(ASK, answer(rank(0, 4, assignments=310), rank(1, 4, assignments=30, pid=99), gone=[2]))
    assert [row[1] for row in rank_rows(page)] == ["25\u00a0%", "75\u00a0%", "–"]
    # An answer in which nothing was computed takes nothing away.
    for _ in range(40):
        page.execute_async_script(ASK, answer(rank(0, 4, assignments=310), rank(1, 4, assignments=30, pid=99)))
    assert [row[1] for row in rank_rows(page)] == ["25\u00a0%", "75\u00a0%"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_what_is_missing_is_said(page: webdriver.Chrome, theme: str) -> None:
    page.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    note = find(page, "#ranks-note")
    assert note.get_attribute("role") == "status"
    loss = {"without": 4.134, "whole": 4.101, "more": 0.033, "tokens": 2040}
    for known, said in (
        (None, "what that costs is not measured yet."),
        (loss, "the loss is 0.033 nats a token higher (4.134 beside 4.101, on 2,040 tokens)."),
    ):
        lacks = {"layers": {"0": [3, 7, 8]}, "experts": 3, "of": 32, "loss": known}
        there = rank(0, 4, linked=False), rank(1, 4)
        page.execute_async_script(ASK, answer(*there, gone=[0], outages=[{"rank": 0}], degraded=lacks))
        assert [row[0] for row in rank_rows(page)] == ["0 coming back", "1 there"]
        assert note.text == f"Answers are made without 3 of 32 experts: {said}"
    *words, paper = page.execute_script(
        PIXEL + "probe.remove(); const colour = (css) => rgb(document.querySelector(css), 'color');"
        "return [colour('#ranks .absent .state'), colour('#ranks .state'), colour('#ranks-note'),"
        "rgb(document.body, 'backgroundColor')]"
    )
    assert min(contrast(word, paper) for word in words) >= 4.5
    page.execute_async_script(ASK, answer(gone=[0, 1]))
    assert note.text == "No rank is there: requests wait for one."
    page.execute_async_script(ASK, None)
    assert note.text == "The server does not answer: this is what it said last."


def test_ranks_fit_a_phone(page: webdriver.Chrome) -> None:
    screen = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        page.execute_async_script(ASK, answer(rank(0, 4, assignments=350), rank(1, 4, linked=False), gone=[1]))
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        wide = "const box = document.querySelector('#ranks .scroll'); return [box.scrollWidth, box.clientWidth]"
        needed, there = page.execute_script(wide)
        assert needed <= there
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_server_without_ranks_shows_nothing_of_them(chromium: webdriver.Chrome, model: Decoder) -> None:
    with serving(model) as served:
        for page in opened(chromium, served):
            free_text(page, "the cat", tokens=4)
            assert not find(page, "#ranks").is_displayed()
