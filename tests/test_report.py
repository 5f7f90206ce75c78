"""The report: what it says, that it is safe and whole, and what a run's events become."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from comparisons import document, routing_of, several
from hypothesis import given
from hypothesis import strategies as st

from handful import report
from handful.config import ModelConfig, RouterConfig, TrainConfig
from handful.config_io import to_dict
from handful.errors import DataError
from handful.picture import dots
from handful.terms import TERMS


class Page(HTMLParser):
    """Checks that elements close in order, and gathers what the tests look at."""

    VOID = frozenset({"meta", "link", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        assert not [name for name in values if name.startswith("on")]
        if tag == "script":
            self.scripts.append(values)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.words.setdefault(self.open[-1], []).append(data)

    @property
    def data(self) -> Any:
        return json.loads(self.words["script"][0])

    def cells(self, row: str) -> list[str]:
        """The text of a table row, by its first cell."""
        found = re.search(rf"<th[^>]*>{row} <span.*?</tr>", self.text, re.S)
        assert found, row
        return [re.sub(r"<[^>]+>", " ", cell).strip() for cell in re.findall(r"<td>(.*?)</td>", found[0], re.S)]


def page_of(doc: dict[str, Any], folder: Path) -> Page:
    return Page(report.write(doc, folder / "report.html").read_text("utf-8"))


def test_the_page_is_whole_and_asks_for_nothing(tmp_path: Path) -> None:
    page = page_of(document(), tmp_path)
    # The icon is in the page, and every link leads to a word's meaning there.
    assert page.links[0] == "data:,"
    assert len(page.links) > 5
    assert {link.removeprefix("#") for link in page.links[1:]} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    text = page.text
    named = re.findall(r'\bterm\("([\w -]+)"', text)
    assert len(named) > 5
    assert {f"term-{name.replace(' ', '-')}" for name in named} <= set(page.ids)
    # The SVG namespace is a name, not an address.
    assert re.findall(r"https?://[^\"' ]*", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|\bimport\(", text)
    assert not re.search(r"\{\{\w+\}\}", text)
    assert [script.get("type") for script in page.scripts] == ["application/json", None]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_what_must_be_there_without_javascript_is_html(tmp_path: Path) -> None:
    text = page_of(document(), tmp_path).text.split('<script type="application/json"')[0]
    for words in (
        "0.120 lower",
        "beats the small dense model by 0.120 nats per token, 30.0 times the spread over 2 seeds.",
        "Team 2 · mixture of experts",
        "handful compare --seeds 2",
        "10,412,877",
        "need JavaScript",
        "skipped 11 not UTF-8, 1 empty",
        "memory 8.23 GB",
    ):
        assert words in text


def test_text_of_any_kind_stays_text(tmp_path: Path) -> None:
    nasty = "</script><script>alert(1)</script><!-- <b>&\u2028\ud800{{css}}"
    doc = document(collapsed=True)
    doc["title"] = doc["command"] = doc["data"]["name"] = nasty
    doc["teams"][1]["label"] = nasty
    doc["teams"][1]["warnings"] = [nasty]
    doc["sample"]["pieces"][0] = nasty
    doc["lesson"]["word"]["word"] = doc["lesson"]["continuations"]["teams"]["moe"] = nasty
    page = page_of(doc, tmp_path)
    assert len(page.scripts) == 2
    assert page.data["sample"]["pieces"] == doc["sample"]["pieces"]
    assert page.data["teams"][1]["label"] == nasty
    assert "alert(1)" not in "".join(page.words["script"][1:])
    assert "b" not in page.words


@given(st.text())
def test_json_in_a_script_element_reads_back(text: str) -> None:
    block = report.script_json({"text": [text]})
    assert not set("<>&") & set(block)
    assert block.isascii()
    assert json.loads(block) == {"text": [text]}


def test_numbers_that_are_not_numbers_are_null_or_a_dash(tmp_path: Path) -> None:
    doc = document()
    moe = doc["teams"][1]
    moe["heldout_loss"] = {"mean": math.nan, "spread": math.nan, "values": [math.nan, 3.4]}
    moe["bits_per_byte"] = {"mean": None, "spread": None, "values": []}
    moe["train_tokens_per_second"] = math.inf
    moe["decode_tokens_per_second"] = None
    moe["reached"] = None
    moe["curve"][3]["loss"] = moe["curve"][3]["high"] = math.nan
    page = page_of(doc, tmp_path)
    assert page.data["teams"][1]["curve"][3]["loss"] is None
    assert [page.cells(row)[1].split()[0] for row in ("Loss", "Compression", "Training", "Decoding")] == ["—"] * 4
    assert not re.search(r"\b(nan|inf|None)\b", page.text.split("<details>")[0].split("<body>")[1])
    assert report.finding(doc) == [
        "The mixture of experts has no finite held-out loss: its training diverged or was cut short."
    ]


def test_table_lines_up_and_gives_ratios(tmp_path: Path) -> None:
    page = page_of(document(), tmp_path)
    assert [cell.split() for cell in page.cells("Total parameters")] == [
        ["0.292"],
        ["3.743", "12.83×"],
        ["3.720", "12.75×"],
    ]
    assert '<th scope="row">Total parameters <span class="unit">M</span></th>' in page.text
    assert [cell.split() for cell in page.cells("Weight memory")] == [
        ["1.17"],
        ["14.97", "12.83×"],
        ["14.88", "12.75×"],
    ]
    assert page.cells("Loss")[1] == "3.393 spread 0.004"
    assert [cell.split()[0] for cell in page.cells("Training")] == ["28.50", "22.40", "5.10"]
    doc = document()
    doc["teams"][1]["reached"] = None
    assert [cell.split()[0] for cell in page_of(doc, tmp_path).cells("Tokens")] == ["4.10", "—", "2.36"]


@pytest.mark.parametrize(
    ("numbers", "unit", "expected"),
    [
        ([950.0, 20.0], "tokens/s", ("tokens/s", ["950.0", "20.0"])),
        ([1.5e9, 3e6, None], "", ("G", ["1.500", "0.003", "—"])),
        ([12.0, 119.0], "s", ("s", ["12.0", "119.0"])),
        ([60.0, 240.0], "s", ("min", ["1.00", "4.00"])),
        ([7200.0], "s", ("h", ["2.00"])),
        ([0.0], "B", ("B", ["0.00"])),
        ([1234.0], "B", ("kB", ["1.23"])),
    ],
)
def test_one_unit_for_a_row(numbers: list[float | None], unit: str, expected: tuple[str, list[str]]) -> None:
    assert report._row(numbers, unit) == expected


def test_the_finding_of_three_teams() -> None:
    assert report.finding(document()) == [
        "With the active parameters of the small dense model, the mixture of experts ends at a held-out loss of 3.393 "
        "nats per token, 0.120 lower than the small dense model’s 3.513; the spread over 2 seeds is 0.004.",
        "The mixture of experts reached the small dense model’s final loss with 70% of its tokens, 73% of its FLOPs "
        "and 89% of its time.",
        "The dense model with as many total parameters ends at 3.241, 0.152 lower than the mixture of experts, "
        "at 14.8× its FLOPs per token.",
        "The price of the mixture of experts, next to the small dense model: 12.8× the weight memory, 0.79× the "
        "training speed, 0.82× the decoding speed (their ups and downs overlap).",
    ]


def with_losses(small: list[float], moe: list[float], big: list[float]) -> dict[str, Any]:
    doc = document()
    for team, values in zip(doc["teams"], (small, moe, big), strict=True):
        team["heldout_loss"] = {
            "mean": sum(values) / len(values),
            "spread": max(values) - min(values),
            "values": values,
        }
    doc["seeds"] = list(range(len(small)))
    return doc


def test_the_headline_says_who_by_how_much_and_whether_it_is_real() -> None:
    def said(small: list[float], moe: list[float], **changes: Any) -> str:
        return report.headline(with_losses(small, moe, [3.3] * len(small)) | changes)

    assert said([3.50, 3.52], [3.40, 3.41]) == (
        "The mixture of experts beats the small dense model by 0.105 nats per token, 5.2 times the spread over 2 seeds."
    )
    assert said([3.50], [3.56]) == (
        "The mixture of experts loses to the small dense model by 0.060 nats per token, 2.0 times that by which seeds "
        "differ, from one seed."
    )
    assert said([3.50, 3.54], [3.49, 3.53]) == (
        "No difference beyond chance between the mixture of experts and the small dense model: 0.010 nats per token."
    )
    assert report.headline(several()) == (
        "The mixture free beats the small dense model by 0.170 nats per token, 42.5 times the spread over 2 seeds; it "
        "is level with wide."
    )
    short = with_losses([3.50, 3.52], [3.40, 3.41], [3.30, 3.30])
    for team in short["teams"]:
        for point in team["curve"]:
            point["tokens"] //= 2
    assert report.headline(short) == (
        "Too short to judge: the mixture of experts is 0.105 nats per token ahead of the small dense model so far."
    )
    alone = report.from_events(run_events())
    assert report.headline(alone) == report.finding(alone)[1]


def test_dots_are_parameters() -> None:
    """160 for the largest team; of a mixture those that always work stand first, a handful of the others among them."""
    assert dots(100, 100, 100, None) == [True] * 160
    assert dots(25, 25, 100, None) == [True] * 40
    # 20 of 100 always work and 80 are experts, of which a token takes a quarter.
    found = dots(100, 40, 100, {"experts": 8, "top_k": 2})
    assert (len(found), sum(found)) == (160, 64)
    assert found[:32] == [True] * 32
    assert sum(found[32:96]) == sum(found[96:]) == 16
    assert dots(1, 1, 10_000, None) == [True]


def test_words_of_the_page_are_the_glossary_s() -> None:
    glossary = (Path(__file__).parent.parent / "docs" / "glossary.md").read_text("utf-8")
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", glossary)
    plain = " ".join(plain.replace("**", "").split())
    for name, meaning in TERMS.items():
        # "Active parameters: those that one token uses. Total parameters: those that …"
        assert re.search(rf"{re.escape(name)}( \([^)]*\))?: {re.escape(meaning)}", plain, re.I), name


def test_a_lead_within_the_spread_is_called_that() -> None:
    first, _, big, _ = report.finding(with_losses([3.50, 3.54], [3.49, 3.53], [3.48, 3.54]))
    assert "0.010 lower than" in first
    assert first.endswith("the spread over 2 seeds is 0.040, so these runs show no difference.")
    assert "the same as the mixture of experts, within chance" in big


def test_a_worse_mixture_of_experts_is_called_worse() -> None:
    doc = with_losses([3.50, 3.52], [3.60, 3.61], [3.70, 3.70])
    doc["teams"][1]["reached"] = None
    first, reached, big, _ = report.finding(doc)
    assert "0.095 higher than the small dense model’s 3.510; the spread over 2 seeds is 0.020." in first
    assert reached == "The mixture of experts did not reach the small dense model’s final loss."
    assert "ends at 3.700, 0.095 higher than the mixture of experts, at" in big


def test_one_seed_claims_no_spread() -> None:
    first = report.finding(with_losses([3.50], [3.40], [3.30]))[0]
    assert first.endswith(
        "0.100 lower than the small dense model’s 3.500; this is one seed, and seeds of the default comparison "
        "differ by 0.03."
    )


def test_a_short_run_is_called_that() -> None:
    doc = with_losses([3.50, 3.52], [3.40, 3.41], [3.30, 3.30])
    for team in doc["teams"]:
        for point in team["curve"]:
            point["tokens"] //= 2
    first = report.finding(doc)[0]
    assert (
        "0.105 lower than the small dense model’s 3.510; the spread over 2 seeds is 0.020; too short to judge: "
        in first
    )
    assert "an expert was trained on 5.2 tokens for each of its weights; about 8 are needed" in first


def test_where_the_first_evaluation_is_past_it(tmp_path: Path) -> None:
    doc = document()
    doc["teams"][1]["reached"]["at_most"] = True
    assert "loss with at most 70% of its tokens" in report.finding(doc)[1]
    cells = page_of(doc, tmp_path).cells("Tokens")
    assert [cell.startswith("≤ ") for cell in cells] == [False, True, False]


def test_several_mixtures_are_ranked(tmp_path: Path) -> None:
    doc = several()
    first, twins, reached, big, price = report.finding(doc)
    assert first == (
        "Held-out loss, nats per token: free 3.343, wide 3.343, even 3.393. free is level with wide, and is 0.170 "
        "lower than the small dense model’s 3.513; the spread over 2 seeds is 0.004."
    )
    doc["teams"][3]["model"]["router"]["top_k"] = 1
    assert report.finding(doc)[0] == (
        "Too short to judge: an expert was trained on 5.2 tokens for each of its weights; about 8 are needed before "
        "its lead can show. Held-out loss so far, nats per token: free 3.343, wide 3.343, even 3.393, beside the small "
        "dense model’s 3.513; the spread over 2 seeds is 0.004."
    )
    doc = several()
    assert twins == "The dense twins have the active and the total parameters of even, the first."
    assert reached.startswith("The mixture even reached the small dense model’s final loss with 70%")
    assert "0.152 lower than the mixture even" in big
    assert price.startswith("The price of the mixture even, ")
    page = page_of(doc, tmp_path)
    assert page.cells("Experts") == ["—", *["64, 2 a token"] * 3, "—"]
    assert page.cells("Balance") == ["—", "switch 0.03", "none", "switch 0.03", "—"]
    assert [cell == "—" for cell in page.cells("MaxVio")] == [True, False, False, False, True]
    assert page.cells("Dead experts")[1] == "0.00"
    colors = [team["color"] for team in page.data["teams"]]
    assert len(set(colors)) == 5
    assert all(color.removeprefix("var(").removesuffix(")") + ":" in page.text for color in colors)
    assert "Experts" not in page_of(document(), tmp_path).text.split("<table")[1].split("Total parameters")[0]


def test_unequal_sizes_are_named() -> None:
    doc = document()
    doc["teams"][1]["parameters"] = {"total": 2_000_000, "active": 408_487}
    first, _, big, _ = report.finding(doc)
    assert first.startswith("With 1.40× the active parameters of the small dense model, ")
    assert big.startswith("The dense model with 1.86× the total parameters ends")


def test_collapse_is_judged_late() -> None:
    even = [[1 / 8] * 8] * 2
    bad = [[1 / 8] * 8, [0.5, 0.5] + [0.0] * 6]
    assert report.collapse(routing_of([bad] * 8 + [even] * 2), 2) == {}
    found = report.collapse(routing_of([even] * 8 + [bad] * 2), 2)
    assert list(found) == [1]
    assert "6 of 8 experts are dead" in found[1]
    # One bad reading among the last two is averaged with a good one: uneven, but nobody is dead.
    assert "dead" not in report.collapse(routing_of([even] * 9 + [bad]), 2).get(1, "")


def test_banners(tmp_path: Path) -> None:
    text = page_of(document(), tmp_path).text
    assert "Routing collapsed" not in text
    assert "Warnings while" not in text
    doc = document(collapsed=True)
    doc["teams"][1]["warnings"] *= 2
    text = page_of(doc, tmp_path).text
    assert "<strong>Routing collapsed</strong> in 1 of 3 MoE layers of Team 2" in text
    assert "<li>Layer 1: 61 of 64 experts are dead" in text
    assert text.count("<li>step 120: layer 1&#x27;s busiest expert") == 1


def test_layers_are_named_by_their_place_in_the_model(tmp_path: Path) -> None:
    doc = document(collapsed=True)
    model = to_dict(ModelConfig(vocab=8, width=8, layers=7, heads=1, ffn=8, expert_width=8, dense_first=1, moe_every=2,
                                router=RouterConfig(experts=64, top_k=2)))  # fmt: skip
    doc["teams"][1]["model"] = model
    page = page_of(doc, tmp_path)
    assert page.data["teams"][1]["routing"]["layers"] == [1, 3, 5]
    assert "<li>Layer 3: 61 of 64" in page.text


def test_a_long_record_is_thinned_to_its_ends(tmp_path: Path) -> None:
    doc = document()
    doc["teams"][1]["routing"] = routing_of([[[0.5, 0.5]] * 3] * 1001, every=1)
    routing = page_of(doc, tmp_path).data["teams"][1]["routing"]
    assert [len(routing[key]) for key in ("steps", "load", "dropped")] == [report.MAX_SNAPSHOTS] * 3
    assert (routing["steps"][0], routing["steps"][-1]) == (1, 1001)
    assert len(doc["teams"][1]["routing"]["steps"]) == 1001


def test_any_number_of_teams(tmp_path: Path) -> None:
    for keep in ([0], [1], [2], [0, 1], [1, 2]):
        doc = document()
        doc["teams"] = [doc["teams"][i] for i in keep]
        page = page_of(doc, tmp_path)
        assert len(page.data["teams"]) == len(keep)
        assert ("Reached the small dense" in page.text) == (keep == [0, 1])


def run_events() -> list[dict[str, Any]]:
    model = ModelConfig(vocab=64, width=8, layers=2, heads=1, expert_width=8, dense_first=1, ffn=16,
                        router=RouterConfig(experts=4, top_k=1))  # fmt: skip
    data = {"name": "some.txt", "documents": 2, "skipped": {}, "train_tokens": 900, "heldout_tokens": 100}
    start = {
        "event": "start",
        "model": to_dict(model),
        "train": to_dict(TrainConfig(steps=4, lr=0.01, seed=3)),
        "data": data | {"bytes_per_token": 2.5},
        "parameters": {"total": 5000, "active": 4000},
        "train_flops_per_token": 24000,
        "dtype": "float32",
        "threads": 2,
        "device": "cpu",
    }
    events: list[dict[str, Any]] = [start]
    for step in range(1, 5):
        events.append(
            {
                "event": "step",
                "step": step,
                "tokens": 100 * step,
                "seconds": 0.5 * step,
                "loss": 4.0,
                "tokens_per_second": 200.0,
            }
        )
        load = [[0.25] * 4] if step < 4 else [[1.0, 0.0, 0.0, 0.0]]
        events.append(
            {
                "event": "routing",
                "step": step,
                "tokens": 100 * step,
                "load": load,
                "max_vio": [0.0],
                "dead": [0],
                "entropy": [1.0],
                "dropped": [0.0],
            }
        )
        if step == 4:
            events.append({"event": "warning", "step": 4, "message": "routing collapsed in layer 1"})
        events.append(
            {
                "event": "eval",
                "step": step,
                "tokens": 100 * step,
                "seconds": 0.5 * step,
                "loss": 5.0 - step / 2,
                "bits_per_byte": 1.0,
            }
        )
        events.append({"event": "checkpoint", "step": step, "path": f"checkpoints/step-{step:06d}"})
    events.append(
        {"event": "end", "step": 4, "loss": 3.0, "bits_per_byte": 1.73, "seconds": 2.0, "tokens_per_second": 200.0}
    )
    return events


def test_from_events_makes_a_training_report(tmp_path: Path) -> None:
    doc = report.from_events(run_events(), title="A run", command="handful train", machine={"cpu": "x", "cores": 2})
    (team,) = doc["teams"]
    assert (team["name"], team["label"]) == ("moe", "mixture of 4 experts, 1 per token")
    assert team["heldout_loss"] == {"mean": 3.0, "spread": 0.0, "values": [3.0]}
    assert (team["weight_bytes"], team["lr"], doc["seeds"]) == (20_000, 0.01, [3])
    assert (team["train_seconds"], team["train_tokens_per_second"], team["reached"]) == (2.0, 200.0, None)
    assert team["curve"][1] == {"tokens": 200, "flops": 4_800_000, "seconds": 1.0, "loss": 4.0, "low": 4.0, "high": 4.0}
    assert team["routing"]["steps"] == [1, 2, 3, 4]
    assert team["routing"]["load"][-1] == [[1.0, 0.0, 0.0, 0.0]]
    assert doc["machine"] == {"cpu": "x", "cores": 2, "device": "cpu", "threads": 2, "dtype": "float32"}
    page = page_of(doc, tmp_path)
    assert "<strong>Routing collapsed</strong> in 1 of 1 MoE layers" in page.text
    assert page.data["teams"][0]["routing"]["layers"] == [1]
    assert report.finding(doc) == [
        "Mixture of 4 experts, 1 per token: every token uses 4 k of its 5 k parameters.",
        "After 400 tokens the held-out loss is 3.000 nats per token, 1.730 bits per byte.",
    ]


def test_stability_is_between_evaluations() -> None:
    events = run_events()
    chosen = [[[[0], [1]]], [[[0], [2]]], [[[0], [2]]], [[[3], [2]]]]
    for event, choices in zip([e for e in events if e["event"] == "eval"], chosen, strict=True):
        event["choices"] = choices
    assert report.stability(events) == [
        {"step": 2, "tokens": 200, "kept": [0.5], "final": [0.5]},
        {"step": 3, "tokens": 300, "kept": [1.0], "final": [0.5]},
        {"step": 4, "tokens": 400, "kept": [0.5], "final": [1.0]},
    ]
    assert report.stability(run_events()) == []


def test_mixtures_that_differ_in_balance_alone_stand_side_by_side(tmp_path: Path) -> None:
    doc = several()
    assert page_of(doc, tmp_path).data["balances"] == [[1, 2], [3, 2]]
    doc["teams"][3]["model"]["width"] = 32
    assert page_of(doc, tmp_path).data["balances"] == [[1, 2]]
    assert page_of(document(), tmp_path).data["balances"] == []


def test_a_document_of_before_has_no_lesson(tmp_path: Path) -> None:
    doc = document()
    del doc["lesson"]
    for team in doc["teams"]:
        del team["stability"]
    data = page_of(doc, tmp_path).data
    assert data["lesson"] is None
    assert [team["stability"] for team in data["teams"]] == [[], [], []]
    assert [layer[0] for layer in data["sample"]["touched"]] == [2, 2, 2]


def test_a_resumed_run_counts_every_step_once() -> None:
    whole = run_events()
    cut = next(i for i, event in enumerate(whole) if event["event"] == "checkpoint" and event["step"] == 2) + 1
    killed = next(i for i, event in enumerate(whole) if event["event"] == "eval" and event["step"] == 4)
    # Steps 3 and a part of 4 were lost with the process, and done again with other numbers.
    lost = [{**event, "tokens_per_second": 1.0, "loss": 9.0} for event in whole[cut:killed]]
    assert report.from_events([*whole[:cut], *lost, *whole[cut:]]) == report.from_events(whole)
    assert report.from_events([*whole[:cut], *lost, whole[0], *whole[cut:]]) == report.from_events(whole)
    assert report.routing_history([*whole[:cut], *lost, *whole[cut:]]) == report.routing_history(whole)


def test_a_run_cut_short_reports_what_it_has(tmp_path: Path) -> None:
    whole = run_events()
    started = report.from_events(whole[:1])
    assert started["teams"][0]["heldout_loss"]["mean"] is None
    assert started["teams"][0]["routing"] is None
    page = page_of(started, tmp_path)
    assert "There is no finite held-out loss" in page.text
    after_an_eval = report.from_events(whole[:4])["teams"][0]
    assert after_an_eval["heldout_loss"]["mean"] == 4.5
    assert after_an_eval["train_seconds"] == 0.5


def test_events_without_a_start_are_refused() -> None:
    with pytest.raises(DataError, match="no 'start' event"):
        report.from_events(run_events()[1:])


def test_writing_changes_nothing_and_replaces_the_file(tmp_path: Path) -> None:
    doc = document()
    before = copy.deepcopy(doc)
    target = tmp_path / "deep" / "report.html"
    assert report.write(doc, target) == target
    first = target.read_bytes()
    assert doc == before
    report.write(doc, str(target))
    assert target.read_bytes() == first
