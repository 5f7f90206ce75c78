"""The page of a served model in a real browser, on a real server: it explains itself, streams, shows what routers did.

Needs Chromium and its driver on the path; without them these tests fail. `make browser-test` runs them.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import itertools
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browsing import complaints, contrast, find, linear, started, touch
from browsing_page import PIXEL, cells, every, free_text, opened, state, texts, until
from builders import dense
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from serving import Served, chat_model, serving, tokenizer

from handful.memory import attach, pack
from handful.model import Decoder

EXPERTS, TOP_K, LAYERS = 16, 2, 2


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chromium(downloads: Path) -> Iterator[webdriver.Chrome]:
    yield from started(1280, 900, downloads)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return chat_model(router={"experts": EXPERTS, "top_k": TOP_K})


@pytest.fixture(scope="module")
def served(model: Decoder) -> Iterator[Served]:
    with serving(model) as found:
        yield found


@pytest.fixture
def page(chromium: webdriver.Chrome, served: Served) -> Iterator[webdriver.Chrome]:
    """The page, opened by somebody who has been here before; nothing in the test may have made the console complain."""
    yield from opened(chromium, served)


def keys(page: webdriver.Chrome, *pressed: str) -> None:
    """Keys to whatever has the focus."""
    actions = ActionChains(page)
    for key in pressed:
        actions.send_keys(key)
    actions.perform()


def click(page: webdriver.Chrome, element: WebElement) -> None:
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def titled(page: webdriver.Chrome, title: str) -> bool:
    return find(page, "#detail-title").text == title


def switch(page: webdriver.Chrome) -> Any:
    """Whether the chosen expert is on, as its switch says: "true" or "false"."""
    return page.execute_script("return document.querySelector('#expert-switch').getAttribute('aria-checked')")


def flip(page: webdriver.Chrome) -> None:
    """Click the switch, of a panel that may be drawn anew meanwhile."""
    for _ in range(5):
        with contextlib.suppress(StaleElementReferenceException):
            click(page, find(page, "#expert-switch"))
            return
    raise AssertionError("the switch does not stay")


# ---------------------------------------------------------------------------------------------------------------------
# The first minute.


def test_the_first_visit_explains_itself_in_five_steps(chromium: webdriver.Chrome, served: Served) -> None:
    chromium.get(served.url)
    chromium.execute_script("localStorage.clear()")
    complaints(chromium)
    chromium.get(served.url)
    until(lambda: every(chromium, ".pieces li"))
    prompt = "A router picks a few experts"
    tokens = served.post("/tokenize", prompt=prompt)["tokens"]
    path = served.post("/routing/path", tokens=tokens)
    told = path["layers"][LAYERS // 2]
    trail = texts(chromium, "#tour-trail li")
    assert trail == ["Token", "Router", "Experts", "Blend", "Next token"]
    seen = []
    for number, name in enumerate(trail, 1):
        assert find(chromium, "#tour-title").text == name
        assert find(chromium, "#tour-count").text == f"{number} of 5"
        assert find(chromium, "#tour-trail .here").text == name
        seen.append(find(chromium, "#tour-body").text)
        if number == 1:
            assert texts(chromium, ".pieces small") == [str(token) for token in tokens]
        elif number == 2:
            assert chromium.execute_script("return document.querySelectorAll('.big-bars path').length") == 2
            best = told["experts"][0]
            assert f"expert {best} has a score of {told['scores'][best]:.3f}" in seen[-1]
        elif number == 3:
            dots = chromium.execute_script("return [...document.querySelectorAll('.dots i')].map((e) => e.className)")
            assert [i for i, name in enumerate(dots) if name == "on"] == sorted(told["experts"])
            assert len(dots) == EXPERTS
        elif number == 4:
            weights = sorted(told["weights"], reverse=True)
            assert texts(chromium, "#tour-body td:last-child") == [f"× {weight:.2f}" for weight in weights]
        if number < 5:
            find(chromium, "#tour-next").click()
    assert len(every(chromium, "#tour-body tr")) == 5
    assert find(chromium, "#tour-next").text == "See it write"
    find(chromium, "#tour-next").click()
    until(lambda: state(chromium, "state.a.status") == "done")
    assert state(chromium, "state.a.ids")[: len(tokens)] == tokens
    # It is not shown a second time, but on demand.
    chromium.refresh()
    until(lambda: find(chromium, "#app").is_displayed())
    assert not find(chromium, "#tour").is_displayed()
    find(chromium, "#how").click()
    until(lambda: every(chromium, ".pieces li"))
    keys(chromium, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert find(chromium, "#tour-title").text == "Router"
    keys(chromium, Keys.ESCAPE)
    assert not find(chromium, "#tour").is_displayed()
    assert complaints(chromium) == []


def test_tokens_stream_in_coloured_and_the_map_fills(page: webdriver.Chrome, served: Served) -> None:
    free_text(page, "the cat sat on the mat")
    prompt = served.post("/tokenize", prompt="the cat sat on the mat", return_token_strs=True)
    body = {"prompt": prompt["tokens"], "max_tokens": 24, "seed": 1, "temperature": 0.7}
    same = served.post("/v1/completions", **body)["choices"][0]["text"]
    assert "".join(state(page, "state.a.tokens.map((t) => t.text)")) == "".join(prompt["token_strs"]) + same
    assert texts(page, "#text-a .turn.you .token") == [t.replace("\n", "↵\n") for t in prompt["token_strs"]]
    # Colours are the first experts', of the layer that is chosen; the last token has none yet.
    firsts = state(page, "state.a.tokens.map((_, i) => state.a.routing.first(i, 0))")
    assert firsts[-1] is None
    assert all(0 <= expert < EXPERTS for expert in firsts[:-1])
    hues = page.execute_script("return [...document.querySelectorAll('#text-a .token')].map((e) => e.dataset.hue)")
    of: dict[int | None, set[str]] = {}
    for expert, hue in zip(firsts, hues, strict=True):
        of.setdefault(expert, set()).add(hue)
    assert all(len(found) == 1 for found in of.values())
    assert of.pop(None) == {""}
    named = [next(iter(found)) for found in of.values() if found != {"rest"}]
    assert len(named) == len(set(named)) == min(8, len(of))
    # The rarest of those that have a hue is no rarer than the most frequent grey one.
    grey = [firsts.count(expert) for expert, found in of.items() if found == {"rest"}]
    assert min(firsts.count(expert) for expert, found in of.items() if found != {"rest"}) >= max(grey, default=0)
    # The legend says which hue is whose.
    legend = page.execute_script(
        "return [...document.querySelectorAll('#legend .chip')].map((e) => [e.innerText, e.dataset.hue])"
    )
    assert {int(expert): {hue} for expert, hue in legend} == {e: found for e, found in of.items() if found != {"rest"}}
    # The map: the shares of what was counted.
    counts = state(page, "[...state.a.routing.counts(0)]")
    assert sum(counts) == TOP_K * (len(firsts) - 1)
    labels = page.execute_script(
        "return [...document.querySelectorAll('.tile')].map((e) => e.getAttribute('aria-label'))"
    )
    for expert, (count, label) in enumerate(zip(counts, labels, strict=True)):
        times = count * EXPERTS / sum(counts)
        assert label.startswith(f"Expert {expert}, ")
        assert f"{times:.1f} times the even load" in label
    assert "too few to call an unused one dead" in find(page, "#map-note").text
    colours = [tuple(found) for found in cells(page, 0)]
    most, least = counts.index(max(counts)), counts.index(min(counts))
    assert math.dist(colours[most], colours[least]) > 50


def test_dead_experts_and_places_are_marked_by_shape(page: webdriver.Chrome) -> None:
    """A routing of many tokens in which one expert has nothing, and places as a server under a budget tells them."""
    free_text(page, "the cat", tokens=4)
    page.execute_async_script(
        "const done = arguments[0]; import('/web/js/state.js').then(({ state, change }) => {"
        "const { routing } = state.a, rows = 2000, experts = new Uint16Array(rows * 4);"
        "experts.forEach((_, i) => { const e = (i * 7 + (i >> 2)) % 16; experts[i] = e === 3 ? 4 : e; });"
        "routing.cut(0); Object.assign(routing, { rows, experts, weights: null });"
        "const load = Array(16).fill(1 / 16); load[5] = 0;"
        "const one = { load, places: 'mdf'.repeat(5) + 'm' };"
        "change({ lately: { layers: { 0: one, 1: one } } }); requestAnimationFrame(() => setTimeout(done)) })"
    )
    assert "1 dead expert (×)" in find(page, "#map-note").text
    labels = page.execute_script(
        "return [...document.querySelectorAll('.tile')].map((e) => e.getAttribute('aria-label'))"
    )
    assert [expert for expert, label in enumerate(labels) if "dead" in label] == [3]
    assert texts(page, ".tile .mark")[:5] == ["●", "○", "◐", "×", "○"]
    assert [label.rpartition(", ")[2] for label in labels[:3]] == ["in memory", "on disk", "on its way"]
    assert find(page, "#places").is_displayed()
    # On the map a cell in memory is full, and one on disk is hollow.
    empty = [0, 0, 0]
    assert [found == empty for found in cells(page, 0)[:3]] == [False, True, True]
    page.execute_script("document.querySelector('input[name=map][value=lately]').click()")
    until(lambda: "almost no load" in str(every(page, ".tile")[5].get_attribute("aria-label")))


def test_stop_ends_a_stream(page: webdriver.Chrome, model: Decoder) -> None:
    with serving(model) as slow:
        slow.slow(0.1)
        for _ in opened(page, slow):
            page.execute_script("document.querySelector('input[name=mode][value=completion]').click()")
            find(page, "#prompt").send_keys("the dog", Keys.ENTER)
            until(lambda: len(every(page, "#text-a .turn.model .token")) >= 2)
            assert find(page, "#go").text == "Stop"
            assert find(page, "#text-a").get_attribute("aria-busy") == "true"
            find(page, "#go").click()
            until(lambda: find(page, "#note-a").text == "Stopped.")
            assert find(page, "#go").text == "Complete"
            made = len(every(page, "#text-a .token"))
            slow.idle()  # the server too
            assert len(every(page, "#text-a .token")) == made < 60


def test_a_chat_goes_on(page: webdriver.Chrome) -> None:
    page.execute_script("document.querySelector('#max-tokens').value = 8")
    assert find(page, "input[name=mode][value=chat]").is_selected()
    find(page, "#prompt").send_keys("hello", Keys.ENTER)
    until(lambda: state(page, "state.a.status") == "done")
    assert find(page, "#prompt").get_attribute("value") == ""
    first = state(page, "state.a.ids")
    find(page, "#prompt").send_keys("again", Keys.ENTER)
    until(lambda: state(page, "state.a.status") == "done" and len(state(page, "state.a.messages")) == 4)
    assert [one["role"] for one in state(page, "state.a.messages")] == ["user", "assistant"] * 2
    whose = page.execute_script("return [...document.querySelectorAll('.turn')].map((e) => e.dataset.who)")
    assert whose[:3] == ["You", "Model", "You"]
    assert len(state(page, "state.a.ids")) > len(first)
    # Every token but the last has a routing, whatever was read again.
    assert state(page, "state.a.routing.rows") == len(state(page, "state.a.ids")) - 1


# ---------------------------------------------------------------------------------------------------------------------
# A token, an expert.


def test_a_token_shows_its_path(page: webdriver.Chrome, served: Served) -> None:
    free_text(page, "the cat sat on the mat and the dog ran")
    at = 5
    click(page, every(page, "#text-a .token")[at])
    until(lambda: every(page, "#detail .next"))
    ids = state(page, "state.a.ids")
    path = served.post("/routing/path", tokens=ids[: at + 1])
    rows = every(page, ".way")
    assert len(rows) == LAYERS
    for layer, (row, told) in enumerate(zip(rows, path["layers"], strict=True)):
        chosen = sorted(zip(told["weights"], told["experts"], strict=True), reverse=True)
        assert [chip.text for chip in row.find_elements(By.CSS_SELECTOR, ".chip")] == [
            f"expert {expert}\n{weight:.2f}" for weight, expert in chosen
        ]
        # The text's own routing says the same.
        assert {one["expert"] for one in state(page, f"state.a.routing.at({at}, {layer})")} == set(told["experts"])
    came = texts(page, ".next .came th")
    most = [one["token"] for one in path["next"]]
    assert len(came) == (ids[at + 1] in most)
    assert len(every(page, ".next tr")) == 10
    # The others of the same expert are marked.
    expert = state(page, f"state.a.routing.first({at}, 0)")
    took = state(page, f"state.a.tokens.map((_, i) => state.a.routing.took(i, 0, {expert}))")

    def marked() -> list[bool]:
        script = "return [...document.querySelectorAll('#text-a .token')].map((e) => e.classList.contains('same'))"
        return list(page.execute_script(script))

    assert marked() == took
    assert f"Expert {expert} of layer 0" in find(page, "#detail-body").text
    # Another of its experts, in another layer.
    chip = rows[1].find_elements(By.CSS_SELECTOR, ".chip")[1]
    other = int(chip.text.split()[1])
    click(page, chip)
    until(lambda: state(page, "state.layer") == 1)
    until(lambda: find(page, ".way.here .chip[aria-pressed=true]").text.startswith(f"expert {other}"))
    assert marked() == state(page, f"state.a.tokens.map((_, i) => state.a.routing.took(i, 1, {other}))")
    # The last token was not read: its own path is asked of the model all the same.
    click(page, every(page, "#text-a .token")[-1])
    until(lambda: "has not read it yet" in find(page, "#detail-body").text and every(page, "#detail .next"))
    assert len(every(page, ".way .chip")) == LAYERS * TOP_K
    keys(page, Keys.ESCAPE)
    until(lambda: not find(page, "#detail").is_displayed())


def test_an_expert_shows_what_it_took_beside_chance(page: webdriver.Chrome) -> None:
    free_text(page, "the cat the cat the dog the mat the the", tokens=40)
    counts = state(page, "[...state.a.routing.counts(0)]")
    expert = counts.index(max(counts))
    click(page, every(page, ".tile")[expert])
    until(lambda: find(page, "#detail-title").text == f"Expert {expert} of layer 0")
    ids = state(page, "state.a.ids")
    rows = state(page, "state.a.routing.rows")
    took = state(page, f"state.a.tokens.map((_, i) => state.a.routing.took(i, 0, {expert}))")
    assert f"{sum(took)} of the {rows} tokens" in find(page, "#detail-body").text
    share = sum(took) / rows
    expected = {}
    for token in set(ids[:rows]):
        of = [i for i in range(rows) if ids[i] == token]
        k = sum(took[i] for i in of)
        if k:
            ratio = k / (len(of) * share)
            expected[f"{k} of {len(of)}"] = ratio
    # All at once: the page may draw them anew at any time.
    rows_of = "[...document.querySelectorAll('.took tbody tr')]"
    shown = page.execute_script(f"return {rows_of}.map((row) => [...row.cells].slice(1).map((cell) => cell.innerText))")
    assert shown
    for count, _, above in shown:
        assert float(above.removesuffix(" ×")) == pytest.approx(
            expected[count], abs=0.5 if expected[count] > 9 else 0.051
        )
    assert "small numbers are no evidence" in find(page, "#detail-body").text
    assert "a parameter region, not a topic" in find(page, "#detail-body").text


def test_an_expert_is_turned_off_and_the_answers_stand_side_by_side(page: webdriver.Chrome, served: Served) -> None:
    free_text(page, "the cat sat")
    counts = state(page, "[...state.a.routing.counts(0)]")
    expert = counts.index(max(counts))
    click(page, every(page, ".tile")[expert])
    until(partial(titled, page, f"Expert {expert} of layer 0"))
    assert switch(page) == "true"
    flip(page)
    until(lambda: state(page, "state.b?.status") == "done")
    assert find(page, "#head-b").text == f"B · without layer 0 expert {expert}"
    assert state(page, f"state.b.routing.counts(0)[{expert}]") == 0
    prompt = state(page, "state.a.asked.ids")
    body = {"prompt": prompt, "max_tokens": 24, "seed": 1, "temperature": 0.7, "experts_off": {"0": [expert]}}
    same = served.post("/v1/completions", **body)["choices"][0]["text"]
    assert "".join(state(page, f"state.b.tokens.slice({len(prompt)}).map((t) => t.text)")) == same
    assert "A" in find(page, "#note-b").text
    tile = every(page, ".tile")[expert]
    assert "switched off" in str(tile.get_attribute("aria-label"))
    # A second one; then both on again: nothing is left beside the first answer.
    other = next(e for e in range(EXPERTS) if e != expert)
    click(page, every(page, ".tile")[other])
    until(partial(titled, page, f"Expert {other} of layer 0"))
    flip(page)
    until(lambda: state(page, "state.b?.status") == "done")
    assert state(page, "state.b.off") == {"0": sorted([expert, other])}
    for one in (expert, other):
        page.execute_script("document.querySelectorAll('.tile')[arguments[0]].click()", one)
        until(partial(titled, page, f"Expert {one} of layer 0"))
        if switch(page) == "false":
            flip(page)
            until(lambda: state(page, "state.b?.status ?? 'none'") in ("done", "none"))
    assert state(page, "state.b") is None
    assert not find(page, "#side-b").is_displayed()


def test_a_click_is_not_lost_while_the_numbers_change(page: webdriver.Chrome) -> None:
    free_text(page, "the cat sat", tokens=6)
    click(page, every(page, ".tile")[3])
    until(partial(titled, page, "Expert 3 of layer 0"))
    ActionChains(page).click_and_hold(find(page, "#expert-switch")).perform()
    page.execute_async_script(
        "const done = arguments[0]; import('/web/js/state.js').then(({ change }) => {"
        "change({ lately: { layers: { 0: { load: Array(16).fill(1 / 16), places: null } } } });"
        "requestAnimationFrame(() => setTimeout(done)) })"
    )
    ActionChains(page).release().perform()
    until(lambda: state(page, "state.b?.status") == "done")
    assert state(page, "state.b.off") == {"0": [3]}


def test_what_the_server_refuses_is_one_line_where_it_matters(page: webdriver.Chrome) -> None:
    free_text(page, "the cat sat")
    page.execute_async_script(
        "const done = arguments[0]; import('/web/js/ask.js').then(async ({ answerWithout }) => {"
        "const { state } = await import('/web/js/state.js');"
        "state.b = null; const { Run } = await import('/web/js/run.js');"
        "for (let e = 0; e < 14; e++) { state.b ??= new Run('b', state.model);"
        "  state.b.off = { 0: [...(state.b.off[0] ?? []), e] }; }"
        "await answerWithout(0, 14, true); done() })"
    )
    until(lambda: "wrong" in str(find(page, "#note-b").get_attribute("class")))
    assert "experts_off" in find(page, "#note-b").text
    assert state(page, "state.b.status") == "failed"
    complaints(page)  # of the 400


def test_a_context_that_is_full_is_said_to_be(page: webdriver.Chrome, served: Served) -> None:
    page.execute_script("document.querySelector('input[name=mode][value=completion]').click()")
    find(page, "#prompt").send_keys("the cat " * 100, Keys.ENTER)
    until(lambda: "the model's context 128: nothing fits after it" in find(page, "#note-a").text)
    # Near its end an answer is as long as there is room.
    prompt = served.post("/tokenize", prompt="the cat " * 100)["tokens"][:110]
    free_text(page, served.post("/detokenize", tokens=prompt)["prompt"], tokens=100)
    assert find(page, "#note-a").text.startswith("The context is full: ")
    assert len(state(page, "state.a.ids")) == 128


# ---------------------------------------------------------------------------------------------------------------------
# Two prompts, traces.


def test_two_prompts_side_by_side(page: webdriver.Chrome) -> None:
    find(page, "#two").click()
    page.execute_script("document.querySelector('input[name=mode][value=completion]').click()")
    find(page, "#prompt-b").send_keys("and the dog ran to the man")
    free_text(page, "the cat sat")
    until(lambda: state(page, "state.b.status") == "done")
    assert "".join(texts(page, "#text-b .turn.you .token")).endswith("and the dog ran to the man")
    # Both are there: the map shows what changed.
    until(lambda: find(page, "#scale-to").text == "more in B")
    assert find(page, "input[name=map][value=difference]").is_selected()
    shares = [np.array(state(page, f"[...state.{side}.routing.counts(0)]")) for side in "ab"]
    a, b = (found / found.sum() for found in shares)
    labels = page.execute_script(
        "return [...document.querySelectorAll('.tile')].map((e) => e.getAttribute('aria-label'))"
    )
    marks = texts(page, ".tile .mark")
    for points, label, mark in zip(100 * (b - a), labels, marks, strict=True):
        if abs(points) >= 0.005:
            assert f"{abs(points):.1f} points {'more' if points > 0 else 'less'} in B" in label
            assert mark == ("+" if points > 0 else "−")  # not by colour alone
    find(page, "#close-b").click()
    until(lambda: not find(page, "#side-b").is_displayed())
    assert not find(page, "input[name=map][value=difference]").is_displayed()


def test_a_trace_is_saved_and_opens_without_the_server(page: webdriver.Chrome, downloads: Path, served: Served) -> None:
    free_text(page, "the cat sat on\nthe mat")
    before = state(page, "[state.a.ids, [...state.a.routing.experts], state.a.tokens.map((t) => t.text)]")
    weights = state(page, "[...state.a.routing.weights]")
    for old in downloads.glob("*"):
        old.unlink()
    find(page, "#save").click()
    until(lambda: list(downloads.glob("*.trace.json")))
    (file,) = downloads.glob("*.trace.json")
    trace = json.loads(file.read_text("utf-8"))
    assert (trace["format"], trace["version"]) == ("handful-trace", 1)
    assert trace["model"] == served.http.get("/routing/model").json()
    (text,) = trace["texts"]
    experts = np.load(io.BytesIO(base64.b64decode(text["routed_experts"])))
    assert experts.shape == (len(text["tokens"]) - 1, LAYERS, TOP_K)
    assert experts.ravel().tolist() == before[1]
    np.testing.assert_allclose(np.load(io.BytesIO(base64.b64decode(text["routed_weights"]))).ravel(), weights)
    # In a page that has asked nothing else, and asks nothing for it.
    page.refresh()
    until(lambda: find(page, "#app").is_displayed())
    page.execute_script("performance.clearResourceTimings()")
    find(page, "#file").send_keys(str(file))
    until(lambda: state(page, "state.a.file"))
    assert state(page, "[state.a.ids, [...state.a.routing.experts], state.a.tokens.map((t) => t.text)]") == before
    click(page, every(page, "#text-a .token")[3])
    until(lambda: len(every(page, ".way .chip")) == LAYERS * TOP_K)
    assert "not in a trace" in find(page, "#detail-body").text
    click(page, every(page, ".tile")[0])
    until(lambda: find(page, "#detail-title").text == "Expert 0 of layer 0")
    until(lambda: page.execute_script("return document.querySelector('#expert-switch[aria-disabled=true]') !== null"))
    assert file.name in find(page, "#note-a").text
    fetched = page.execute_script(
        "return performance.getEntriesByType('resource').map((e) => new URL(e.name).pathname)"
    )
    assert "/routing/path" not in fetched
    assert "/v1/completions" not in fetched
    # And from there on the model answers again.
    free_text(page, "the cat")
    assert state(page, "state.a.file") is None


def trace(model: dict[str, Any] | None = None, **changes: Any) -> str:
    """A trace's content, of which something is wrong."""
    text = {"tokens": [1], "texts": ["<b>"], "turns": [], "routed_experts": "AAAA"}
    sizes = {"parameters": {"total": 9, "active": 3}, "bytes": {"total": 36, "token": 12}}
    described = {"model": "m", "layers": 1, "moe_layers": [0], "experts": 4, "top_k": 1, **sizes, **(model or {})}
    return json.dumps({"format": "handful-trace", "version": 1, "model": described, "texts": [text]} | changes)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "it is not JSON"),
        ("[]", "its format is not handful-trace"),
        (trace(version=2), "its version is 2"),
        (trace({"parameters": {"total": 1}}), "its model is not described"),
        (trace({"experts": 10**9}), "1000000000 experts"),
        (trace(texts=[]), "it has one text or two"),
        (trace(texts=[{"tokens": [1], "texts": []}]), "not every token has a text"),
        (trace(), "not .npy"),
    ],
)
def test_a_wrong_trace_is_one_line(page: webdriver.Chrome, tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(content, encoding="utf-8")
    find(page, "#file").send_keys(str(file))
    until(lambda: says in find(page, "#wrong").text)
    assert state(page, "state.a.status") == "empty"


def test_a_texts_markup_is_text(page: webdriver.Chrome) -> None:
    nasty = "<img src=x onerror=alert(1)><b>&amp;"
    free_text(page, nasty, tokens=4)
    assert nasty in "".join(texts(page, "#text-a .turn.you .token"))
    assert not every(page, "#text-a img, #text-a b")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of the page's own modules.


def test_npy_is_numpys(page: webdriver.Chrome) -> None:
    rng = np.random.default_rng(0)
    halves = np.array([0, -0.0, 1, -2.5, 65504, 6e-8, 6.1e-5, np.inf, 1 / 3], dtype="<f2").reshape(9, 1, 1)
    arrays = [
        rng.integers(0, 256, (5, 3, 2)).astype("|u1"), rng.integers(0, 512, (4, 2, 8)).astype("<u2"), halves,
        rng.standard_normal((3, 2, 2)).astype("<f4"), np.zeros((0, 3, 2), dtype="|u1"),
    ]  # fmt: skip
    for array, version in itertools.product(arrays, [(1, 0), (2, 0)]):
        file = io.BytesIO()
        np.lib.format.write_array(file, array, version=version)
        shape, data = page.execute_async_script(
            "const [text, done] = arguments; import('/web/js/npy.js').then(({ decode }) => { const a = decode(text);"
            "done([a.shape, [...a.data].map((v) => v === Infinity ? 'inf' : v)]) })",
            base64.b64encode(file.getvalue()).decode(),
        )
        assert shape == list(array.shape)
        np.testing.assert_array_equal([float(value) for value in data], array.ravel().astype(float))
    for kind, dtype, values in (("Uint16Array", "<u2", [1, 2, 3, 65535, 0, 7]), ("Float32Array", "<f4", [0.5] * 6)):
        written = page.execute_async_script(
            "const [kind, values, done] = arguments; import('/web/js/npy.js').then(({ encode }) =>"
            "done(encode(new globalThis[kind](values), [3, 1, 2])))",
            kind,
            values,
        )
        read = np.load(io.BytesIO(base64.b64decode(written)))
        assert (read.dtype.str, read.shape, read.ravel().tolist()) == (dtype, (3, 1, 2), values)


def test_what_was_not_computed_counts_for_nobody(page: webdriver.Chrome) -> None:
    """E and above: the expert was full, or did not choose the token. Rows come in several chunks."""
    experts = np.array([[[0, 1]], [[5, 2]], [[6, 7]], [[3, 5]], [[0, 0 + 4]]], dtype="|u1")  # E = 4
    weights = np.array([[[0.1, 0.9]], [[0, 1]], [[0, 0]], [[0.5, 0]], [[0.25, 0]]], dtype="<f2")
    chunks = [[npy(experts[a:b]), npy(weights[a:b])] for a, b in ((0, 2), (2, 2), (2, 5))]
    found = page.execute_async_script(
        "const [chunks, done] = arguments; import('/web/js/run.js').then(({ Routing }) => {"
        "const r = new Routing(1, 4);"
        "for (const [e, w] of chunks) r.append(e, w);"
        "const all = () => [[...r.counts(0)], [0, 1, 2, 3, 4].map((t) => r.first(t, 0)),"
        "[0, 1, 2, 3, 4].map((t) => r.at(t, 0).map((one) => one.expert)), r.took(1, 0, 1), r.took(1, 0, 2)];"
        "const before = all(); r.cut(1); done([before, [...r.counts(0)]]) })",
        chunks,
    )
    counts, first, chosen, one, two = found[0]
    assert counts == [2, 1, 1, 1]
    assert first == [1, 2, None, 3, 0]
    assert chosen == [[1, 0], [2], [], [3], [0]]
    assert (one, two) == (False, True)
    assert found[1] == [1, 1, 0, 0]


def npy(array: Any) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def test_chance_is_the_binomials(page: webdriver.Chrome) -> None:
    cases = [
        (0, 5, 0.3),
        (3, 5, 0.3),
        (5, 5, 0.3),
        (1, 1, 0.01),
        (40, 300, 0.1),
        (420, 2000, 0.2),
        (2, 9, 1.0),
        (1, 9, 0.0),
    ]
    found = page.execute_async_script(
        "const [cases, done] = arguments; import('/web/js/stats.js').then(({ tail }) =>"
        "done(cases.map(([k, n, p]) => tail(k, n, p))))",
        cases,
    )
    for (k, n, p), value in zip(cases, found, strict=True):
        share = Fraction(str(p))
        exact = sum(math.comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(k, n + 1))
        assert value == pytest.approx(float(exact), rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Keyboard, colours, small screens.


def test_by_the_keyboard_alone(page: webdriver.Chrome) -> None:
    free_text(page, "the cat sat on the mat")

    def focused(css: str) -> bool:
        return bool(page.execute_script("return document.activeElement.matches(arguments[0])", css))

    def tab_to(css: str, most: int = 30) -> None:
        for _ in range(most):
            if focused(css):
                return
            keys(page, Keys.TAB)
        raise AssertionError(f"the tab key does not come to {css}")

    page.execute_script("document.activeElement.blur(); window.getSelection().removeAllRanges()")
    find(page, "#theme").send_keys("")  # begin at the top
    page.execute_script("document.querySelector('#theme').focus()")
    tab_to(".token")
    keys(page, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert focused(".token[data-i='2']")
    assert "in layer 0: expert" in find(page, "#token-readout").text
    keys(page, Keys.END, Keys.HOME, Keys.ARROW_RIGHT, Keys.ENTER)
    until(lambda: find(page, "#detail").is_displayed())
    assert focused(".token[data-i='1']")
    assert find(page, ".token[data-i='1']").get_attribute("aria-selected") == "true"
    tab_to("#map")
    keys(page, Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    until(lambda: find(page, "#map-readout").text.startswith("Layer 1, expert 2: "))
    keys(page, Keys.ENTER)
    until(lambda: find(page, "#detail-title").text == "Expert 2 of layer 1")
    assert state(page, "state.layer") == 1
    tab_to(".tile")
    keys(page, Keys.ARROW_RIGHT, Keys.ENTER)
    until(lambda: find(page, "#detail-title").text == "Expert 1 of layer 1")
    tab_to("#expert-switch")
    keys(page, Keys.SPACE)
    until(lambda: state(page, "state.b?.status") == "done")
    until(lambda: focused("#expert-switch"))
    keys(page, Keys.ESCAPE)
    until(lambda: not find(page, "#detail").is_displayed())
    assert focused(".tile[data-expert='1']")
    # Everything that can be worked has a name.
    nameless = page.execute_script(
        "return [...document.querySelectorAll('button, input, select, textarea, canvas, [role=option]')].filter((e) =>"
        "!(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)"
    )
    assert nameless == []


# Viénot, Brettel and Mollon 1999: how who lacks one kind of cone sees linear RGB.
BLIND = {
    "protan": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    "deutan": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
}


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb.clip(0, 1)
    f = [t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz / [0.9505, 1.0, 1.089]]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_read_and_told_apart(page: webdriver.Chrome, theme: str) -> None:
    page.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    colours = page.execute_script(
        PIXEL + "const named = (...names) => names.map((name) => of(`var(--${name})`));"
        "const out = { paper: of('var(--paper)'), raised: of('var(--raised)'), ink: of('var(--ink)'),"
        "words: named('ink', 'muted', 'alarm'), fills: named('none', 'heat', 'more', 'less'),"
        "tints: [...Array(7).keys()].map((e) => of(`color-mix(in oklab, var(--e${e}) 36%, var(--paper))`)),"
        "hues: named('e0', 'e1', 'e2', 'e3', 'e4', 'e5', 'e6', 'e7', 'rule') }; probe.remove(); return out;"
    )
    assert (sum(colours["paper"]) > 600) == (theme == "light")
    assert min(contrast(word, colours[ground]) for word in colours["words"] for ground in ("paper", "raised")) >= 4.5
    assert min(contrast(colours["ink"], fill) for fill in (*colours["fills"], *colours["tints"])) >= 4.5
    for name, matrix in {"all cones": np.eye(3), **BLIND}.items():
        seen = [lab(np.array(matrix) @ np.array(linear(hue))) for hue in colours["hues"]]
        near = min(math.dist(a, b) for a, b in itertools.combinations(seen, 2))
        assert near > 8, name


def test_the_theme_button_and_the_system(page: webdriver.Chrome) -> None:
    def ground() -> str:
        found = page.execute_script(PIXEL + "probe.remove(); return rgb(document.body, 'backgroundColor')")
        return "light" if sum(found) > 600 else "dark"

    button = find(page, "#theme")
    for scheme in ("dark", "light"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        assert ground() == scheme
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    seen = []
    for _ in range(3):
        button.click()
        seen.append((button.text, ground()))
    assert seen[:2] == [("Theme: light", "light"), ("Theme: dark", "dark")]
    assert seen[2][0] == "Theme: auto"
    button.click()
    button.click()
    # The map is drawn in the new colours, and a page that is loaded again begins with them.
    until(lambda: max(sum(found) for found in cells(page, 1)) < 300)
    page.refresh()
    until(lambda: find(page, "#app").is_displayed())
    assert (find(page, "#theme").text, ground()) == ("Theme: dark", "dark")


@pytest.mark.parametrize("width", [390, 320])
def test_it_fits_a_phone(page: webdriver.Chrome, width: int) -> None:
    screen = {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        wide = "return document.documentElement.scrollWidth"
        find(page, "#how").click()
        until(lambda: every(page, ".pieces li"))
        for _ in range(4):
            assert page.execute_script(wide) <= width
            find(page, "#tour-next").click()
        find(page, "#tour-skip").click()
        free_text(page, "the cat sat on the mat " + "x" * 60)
        assert page.execute_script(wide) <= width
        # A finger finds what it means: targets of 24 CSS pixels and more (WCAG 2.2, 2.5.8).
        small = page.execute_script(
            "const all = 'button, select, input:not([type=radio], [type=file]), .segments label';"
            "return [...document.querySelectorAll(all)]"
            ".filter((e) => e.checkVisibility()).map((e) => [e.id || e.className, e.getBoundingClientRect()])"
            ".filter(([, b]) => b.width < 24 || b.height < 24).map(([name]) => name)"
        )
        assert small == []
        touch(page, every(page, "#text-a .token")[4])
        until(lambda: every(page, "#detail .next"))
        assert page.execute_script(wide) <= width
        box = find(page, "#detail").rect
        assert box["width"] == width
        # What was touched is still to be seen over its page.
        token = page.execute_script(
            "return document.querySelector('.token[aria-selected=true]').getBoundingClientRect()"
        )
        sheet = page.execute_script("return document.querySelector('#detail').getBoundingClientRect()")
        assert token["bottom"] <= sheet["top"]
        find(page, "#detail-close").click()
        find(page, "#two").click()
        assert page.execute_script(wide) <= width
        # The map is touched too.
        touch(page, find(page, "#map"))
        until(lambda: find(page, "#detail-title").text.startswith("Expert"))
    finally:
        page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# ---------------------------------------------------------------------------------------------------------------------
# Other servers.


def test_a_key_is_asked_for_and_kept_in_the_tab(chromium: webdriver.Chrome, model: Decoder) -> None:
    with serving(model, api_key="open-sesame") as served:
        chromium.get(served.url)
        chromium.execute_script("localStorage.clear(); sessionStorage.clear()")
        chromium.get(served.url)
        until(lambda: find(chromium, "#key").is_displayed())
        field = find(chromium, "#key-value")
        field.send_keys("wrong", Keys.ENTER)
        until(lambda: "wrong" in find(chromium, "#key-wrong").text)
        field.send_keys("open-sesame", Keys.ENTER)
        until(lambda: every(chromium, ".pieces li"))
        find(chromium, "#tour-skip").click()
        free_text(chromium, "the cat", tokens=4)
        chromium.refresh()
        until(lambda: find(chromium, "#app").is_displayed())
        assert not find(chromium, "#key").is_displayed()
        assert "open-sesame" not in json.dumps(chromium.execute_script("return {...localStorage}"))
        said = [one["message"] for one in complaints(chromium)]
        assert all("401" in one for one in said), said


def test_under_a_budget_it_shows_where_experts_are(chromium: webdriver.Chrome, model: Decoder, tmp_path: Path) -> None:
    own = copy.deepcopy(model)
    own.tokenizer = model.tokenizer
    pack(own, tmp_path / "experts.pack")
    size = sum(p.nbytes for name, p in own.named_parameters() if ".experts." in name)
    whole = sum(p.nbytes for p in own.parameters())
    store = attach(own, tmp_path / "experts.pack", whole - size // 2)
    with store, serving(own, store=store) as served:
        for page in opened(chromium, served):
            free_text(page, "the cat sat on the mat")
            facts = served.http.get("/routing/model").json()["memory"]
            assert 0 < facts["slots"] < facts["experts"] == LAYERS * EXPERTS
            assert find(page, "#memory-text").text.startswith(f"{facts['slots']} of {facts['experts']} ")
            places = served.http.get("/routing/experts").json()["layers"]["0"]["places"]
            assert {"m", "d"} <= set(places)
            signs = {"m": "●", "d": "○", "f": "◐"}
            until(partial(marks_are, page, [signs[place] for place in places]))
            hollow = [i for i, found in enumerate(cells(page, 0)) if found == [0, 0, 0]]
            assert hollow == [i for i, place in enumerate(places) if place != "m"]


def marks_are(page: webdriver.Chrome, marks: list[str]) -> bool:
    return texts(page, ".tile .mark") == marks


def test_a_dense_model_is_said_to_be_one(chromium: webdriver.Chrome) -> None:
    own = tokenizer()
    torch.manual_seed(0)
    plain = Decoder(dense(vocab=own.vocab_size, context=64)).eval()
    plain.tokenizer = own
    with serving(plain) as served:
        for page in opened(chromium, served):
            page.execute_script("localStorage.clear()")
            page.refresh()
            until(find(page, "#app").is_displayed)
            assert "This model is dense" in find(page, "#dense").text
            assert not find(page, "#tour").is_displayed()
            assert not find(page, "#map").is_displayed()
            assert not find(page, "#how").is_displayed()
            free_text(page, "the cat sat", tokens=6)
            click(page, every(page, "#text-a .token")[2])
            until(find(page, "#detail").is_displayed)
            assert "through every parameter" in find(page, "#detail-body").text


def test_a_server_that_is_gone_is_said_to_be(page: webdriver.Chrome, model: Decoder) -> None:
    with serving(model) as short:
        for _ in opened(page, short):
            free_text(page, "the cat", tokens=4)
            page.execute_cdp_cmd("Network.enable", {})
            offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
            page.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
            try:
                find(page, "#prompt").send_keys(Keys.ENTER)
                until(lambda: "does not answer" in find(page, "#note-a").text)
            finally:
                back = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
                page.execute_cdp_cmd("Network.emulateNetworkConditions", back)
            complaints(page)
