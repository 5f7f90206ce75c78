"""What people see: numbers, durations, tables at any width, progress in a terminal and in a log."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import Event, moe, of_kind, tiny_data, training
from rich.console import Console
from rich.table import Table

from handful.config import ModelConfig
from handful.console import (
    comparison_table,
    cost_sentence,
    cost_tables,
    facts,
    presets_table,
    scores_table,
)
from handful.cost import cost
from handful.presets import PRESETS, small_model
from handful.progress import RunProgress
from handful.train import train
from handful.units import duration, si, size
from handful.width import show


def shown(*things: Any, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    for thing in things:
        console.print(thing)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(text: str) -> list[list[str]]:
    """The rows of a table that was drawn with lines, each cell without the spaces around it."""
    marks = str.maketrans("┃", "│")
    lines = [line.translate(marks).strip("│").split("│") for line in text.splitlines() if line[:1] in "│┃"]
    return [[cell.strip() for cell in line] for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# Durations.


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (7.2, "7 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (185, "3:05"),
        (3599.4, "59:59"),
        (3599.6, "1:00:00"),
        (3600, "1:00:00"),
        (7800, "2:10:00"),
        (360_000, "100:00:00"),
        (math.inf, "inf s"),
        (math.nan, "nan s"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---------------------------------------------------------------------------------------------------------------------
# The comparison.


def measured(values: list[float]) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "spread": max(values) - min(values), "values": values}


def team(name: str, label: str, losses: list[float], **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "model": {"router": {"experts": 8, "top_k": 2} if name == "moe" else None},
        "parameters": {"total": 1_250_000, "active": 310_000},
        "train_flops_per_token": 1_860_000,
        "weight_bytes": 5_000_000,
        "heldout_loss": measured(losses),
        "bits_per_byte": measured([loss / 2 for loss in losses]),
        "train_tokens_per_second": 12345.6,
        "train_range": None,
        "decode_tokens_per_second": 987.6,
        "decode_range": [900.4, 1000.6],
        "train_seconds": 185.0,
        "reached": {"tokens": 40960.0, "flops": 7.6e10, "seconds": 59.6},
        **changes,
    }


def three(losses: list[list[float]]) -> dict[str, Any]:
    return {
        "title": "Three teams, one text",
        "teams": [
            team("dense-active", "Team 1 · small dense", losses[0]),
            team("moe", "Team 2 · mixture of experts", losses[1]),
            team("dense-total", "Team 3 · big dense", losses[2], reached=None),
        ],
    }


def test_the_comparison_of_three_teams() -> None:
    text = shown(comparison_table(three([[2.5], [2.25], [2.125]])))
    rows = cells(text)
    assert text.startswith("Three teams, one text")
    assert rows[:2] == [["", "Team 1", "Team 2", "Team 3"], ["", "small dense", "mixture of experts", "big dense"]]
    assert {row[0]: row[1:] for row in rows[2:10]} == {
        "total parameters": ["1.25 M"] * 3,
        "active parameters": ["310 k"] * 3,
        "training FLOPs a token": ["1.86 M"] * 3,
        "weight memory": ["5.00 MB"] * 3,
        "held-out loss, nats a token": ["2.5000", "2.2500", "2.1250"],
        "held-out bits a byte": ["1.2500", "1.1250", "1.0625"],
        "training tokens/s": ["12,346"] * 3,
        "decode tokens/s": ["988"] * 3,
    }
    assert rows[10:] == [
        ["", *["900–1,001"] * 3],  # the slowest and the quickest of five
        ["training time", "3:05", "3:05", "3:05"],
        ["the small dense loss after: tokens", "41.0 k", "41.0 k", "not reached"],
        ["FLOPs", "76.0 G", "76.0 G", "not reached"],
        ["training time", "1:00", "1:00", "not reached"],
    ]


def test_the_spread_over_seeds() -> None:
    rows = cells(shown(comparison_table(three([[2.5, 2.25], [2.0, 2.0], [1.5, 2.0]]))))
    at = [row[0] for row in rows].index("held-out loss, nats a token")
    assert rows[at][1:] == ["2.3750", "2.0000", "1.7500"]
    assert rows[at + 1][1:] == ["spread 0.2500", "spread 0.0000", "spread 0.5000"]
    assert [row[1] for row in rows[at + 2 : at + 4]] == ["1.1875", "spread 0.1250"]


def test_one_team_alone() -> None:
    """A training run's document: nothing to reach, and nothing decoded."""
    alone = {"title": "runs/a", "teams": [team("moe", "a", [2.5], reached=None, decode_tokens_per_second=None)]}
    rows = cells(shown(comparison_table(alone)))
    assert rows[0] == ["", "a"]
    assert ["decode tokens/s", "not measured"] in rows
    assert rows[-1] == ["training time", "3:05"]
    assert len(rows) == 10


def test_where_the_first_evaluation_is_past_it() -> None:
    document = three([[2.5], [2.25], [2.125]])
    document["teams"][1]["reached"]["at_most"] = True
    rows = cells(shown(comparison_table(document)))
    assert rows[-3:] == [
        ["the small dense loss after: tokens", "41.0 k", "≤ 41.0 k", "not reached"],
        ["FLOPs", "76.0 G", "≤ 76.0 G", "not reached"],
        ["training time", "1:00", "≤ 1:00", "not reached"],
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Any width.


def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, *tables: Table
) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    capsys.readouterr()
    show(*tables)
    return capsys.readouterr().out.splitlines()


def numbers(lines: list[str]) -> Counter[str]:
    """Every number, wherever it stands."""
    return Counter(re.findall(r"[\d][\d,.]*\d|\d", " ".join(lines)))


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 100])
def test_at_any_width_no_number_is_cut(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mixtral = PRESETS["mixtral"].model
    assert mixtral is not None
    document = three([[2.5, 2.25], [2.0, 2.0], [1.5, 2.0]])
    rows = [
        {"file": "notes/a.txt", "bytes": 1_234_567, "difference": {"bits_per_byte": -0.0123, "error": 0.0045},
         "models": [{"loss": 3.4567, "bits_per_byte": 1.2345}, {"loss": 3.3333, "bits_per_byte": 1.2222}]}
    ]  # fmt: skip
    every: list[Callable[[], list[Table]]] = [
        lambda: [comparison_table(document)],
        lambda: cost_tables("mixtral", cost(mixtral, ranks=8)),
        lambda: [scores_table(["runs/one", "runs/two"], rows)],
        lambda: [facts("This machine", [("memory", "8.23 GB, 1.25 GB available"), ("products", "1.25 TFLOP/s")])],
    ]
    for make in every:
        wide = printed(monkeypatch, capsys, 300, *make())
        narrow = printed(monkeypatch, capsys, width, *make())
        assert max(map(len, narrow)) <= width
        assert "…" not in "".join(narrow)
        # A table in parts repeats the names of its rows, numbers among them too.
        assert numbers(wide) - numbers(narrow) == Counter()


def test_a_table_is_cut_between_its_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = comparison_table(three([[2.5], [2.25], [2.125]]))
    assert sum("Team" in line for line in printed(monkeypatch, capsys, 110, table)) == 1
    parts = printed(monkeypatch, capsys, 60, table)
    assert [line.split("┃")[2:-1] for line in parts if "Team" in line] != []
    assert sum(line.startswith("Three teams") for line in parts) == 2
    assert sum("held-out bits" in line for line in parts) == 2
    # Too narrow for any column: line by line.
    assert "Team 2" in "".join(printed(monkeypatch, capsys, 20, table))


@pytest.mark.parametrize("width", range(40, 181, 4))
def test_at_any_width_no_letter_is_cut(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def letters(lines: list[str]) -> Counter[str]:
        return Counter("".join("".join(lines).split()))

    def make() -> Table:
        return presets_table(PRESETS, dict.fromkeys(PRESETS))

    wide, narrow = printed(monkeypatch, capsys, 300, make()), printed(monkeypatch, capsys, width, make())
    assert max(map(len, narrow)) <= width
    assert letters(wide) - letters(narrow) == Counter()


def test_two_models_stand_side_by_side_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = [{"loss": 7.7810, "bits_per_byte": 3.3512}] * 2
    row = {"file": "held out of txt", "bytes": 27_669, "models": scores}
    table = scores_table(["one", "two"], [{**row, "difference": {"bits_per_byte": 0.0015, "error": 0.0076}}])
    lines = printed(monkeypatch, capsys, 80, table)
    (values,) = [line.split() for line in lines if line.startswith("held out of txt")]
    assert values[4:] == ["27,669", "7.7810", "3.3512", "7.7810", "3.3512", "+0.0015", "±", "0.0076"]
    # Line by line, a heading of several lines is one.
    lines = printed(monkeypatch, capsys, 40, table)
    assert "  B nats a token  7.7810" in [line.rstrip() for line in lines]


def test_a_log_is_told_of_every_minute(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("handful.progress.time.monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=120)
    step = {"event": "step", "seconds": 20.0, "loss": 5.4321, "tokens_per_second": 12345.6}
    with RunProgress(console) as progress:
        progress("moe", events[0])
        for at, number in ((30.0, 1), (61.0, 2), (100.0, 3), (122.0, 4)):
            clock[0] = at
            progress("moe", {**step, "step": number})
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "moe: step 2 of 4, 20 s, loss 5.432, 12,346 tokens/s",
        "moe: step 4 of 4, 20 s, loss 5.432, 12,346 tokens/s",
    ]


def test_cost_says_first_what_people_want_to_hear() -> None:
    mixtral = PRESETS["mixtral"].model
    assert mixtral is not None
    assert cost_sentence(cost(mixtral)) == "computes like a 12.9 B dense model, holds like a 46.7 B one"
    assert cost_sentence(cost(small_model(2048))) == "computes like a 230 k dense model, holds like a 1.37 M one"
    olmoe = PRESETS["olmoe"].model
    assert olmoe is not None
    assert cost_sentence(cost(replace(olmoe, layers=20))).endswith(", holds like an 8.6 B one")
    dense = ModelConfig(vocab=11, width=8, layers=2, heads=2, ffn=13)
    assert "every token uses all of them" in cost_sentence(cost(dense))


def test_brackets_in_titles_and_labels_are_printed_as_they_are() -> None:
    document = {"title": "runs/[red]", "teams": [team("moe", "[bold] run[/]", [2.5])]}
    text = shown(comparison_table(document))
    assert "runs/[red]" in text
    assert "[bold] run[/]" in text
    assert "[i]name[/i]  [b]value[/b]" in shown(facts("[u]title", [("[i]name[/i]", "[b]value[/b]")]))
    assert "[u]title" in shown(facts("[u]title", [("a long enough name", "value")]))
    small = small_model(60)
    assert "run/[dim]: parameters" in shown(*cost_tables("run/[dim]", cost(small)))


# ---------------------------------------------------------------------------------------------------------------------
# The price.


@pytest.mark.parametrize("name", PRESETS)
def test_the_price_of_every_preset(name: str) -> None:
    model = PRESETS[name].model or small_model(2048, PRESETS[name])
    price = cost(model, context=1024)
    tables = cost_tables(name, price)
    assert len(tables) == 3
    counts = {row[0]: row[1:] for row in cells(shown(tables[0]))}
    total, active = price.total_parameters, price.active_parameters
    assert counts["with all embeddings"] == [
        f"{total.incl_all_embeddings:,}",
        f"{active.incl_all_embeddings:,}",
    ]
    # Parts that the model does not have are left out; the rest adds up.
    parts = [row for row in counts if row in {part.replace("_", " ") for part in vars(total.parts)}]
    assert ("dense ffn" in parts) == bool(total.parts.dense_ffn)
    assert sum(int(counts[part][0].replace(",", "")) for part in parts) == total.incl_all_embeddings
    rest = shown(*tables[1:])
    for value in (
        si(price.flops.decode, "FLOP"), si(price.flops.training, "FLOP"), size(price.bytes.cache), "context of 1,024",
        "weights, bfloat16",
    ):  # fmt: skip
        assert value in rest
    for width in (60, 120):
        assert max(map(len, shown(*tables, width=width).splitlines())) <= width


def test_what_ranks_send_each_other() -> None:
    model = PRESETS["mixtral"].model
    assert model is not None
    price = cost(model, ranks=8)
    *_, sent = cost_tables("mixtral", price)
    text = shown(sent)
    assert "sent between 8 ranks per token" in text
    assert size(price.communication.per_assignment.forward) in text
    assert f"{price.communication.ranks_per_token:.2f}" in text


# ---------------------------------------------------------------------------------------------------------------------
# Progress.


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """A training, and a warning such as a collapsing router gives."""
    data = tiny_data(tmp_path_factory.mktemp("console"))
    found = list(train(moe(vocab=data.tokenizer.vocab_size), training(steps=4), data))
    warning = {"event": "warning", "step": 2, "message": "layer 0: [4] of 8 experts get no tokens"}
    found.insert(next(i for i, e in enumerate(found) if e.get("step") == 3), warning)
    return found


def fed(run: str, events: list[Event], *, terminal: bool, width: int = 120) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    with RunProgress(console) as progress:
        progress.expect(run)
        for event in events:
            progress(run, event)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_gets_a_line_at_each_evaluation(events: list[Event]) -> None:
    text = fed("moe", events, terminal=False)
    start, first, last = of_kind("eval", events)
    assert text.splitlines() == [
        f"moe: step 0 of 4, 0 s, held-out loss {start['loss']:.4f} ({start['bits_per_byte']:.4f} bits/byte)",
        f"moe: step 2 of 4, {duration(first['seconds'])}, held-out loss {first['loss']:.4f} "
        f"({first['bits_per_byte']:.4f} bits/byte)",
        "warning: moe, step 2: layer 0: [4] of 8 experts get no tokens",
        f"moe: step 4 of 4, {duration(last['seconds'])}, held-out loss {last['loss']:.4f} "
        f"({last['bits_per_byte']:.4f} bits/byte)",
    ]


def test_a_terminal_gets_a_bar_per_run(events: list[Event]) -> None:
    text = fed("moe", events, terminal=True)
    end = events[-1]
    assert "warning: moe, step 2: layer 0: [4] of 8 experts get no tokens" in text
    assert f"loss {end['loss']:.4f} held out  {end['tokens_per_second']:,.0f} tokens/s" in text
    assert "━" in text
    assert "step 2 of 4" not in text


def test_a_terminal_shows_loss_rate_and_time_left(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"event": "step", "step": 1, "seconds": 5.0, "loss": 5.4321, "tokens_per_second": 12345.6}
    clock = iter([0.0, 0.0, 20.0])  # 15 of the 20 seconds were another run's turn
    with monkeypatch.context() as patch:
        patch.setattr("handful.progress.time.monotonic", lambda: next(clock, 20.0))
        text = fed("moe", [events[0], step], terminal=True)
    assert "loss 5.432   12,346 tokens/s  1:00 left" in text  # three steps are to come
    assert "waiting" in fed("moe", [], terminal=True)


def test_runs_are_named_as_they_are_called(events: list[Event]) -> None:
    for terminal in (True, False):
        text = fed("a [red]run[/red]", events, terminal=terminal)
        assert "a [red]run[/red]" in text
    assert "warning: a [red]run[/red], step 2" in text


def test_the_measured_dtype_is_told(events: list[Event]) -> None:
    start = events[0] | {"dtype": "bfloat16", "dtype_reason": "measured 1 ms"}
    for terminal in (True, False):
        assert "moe: bfloat16 (measured 1 ms)" in fed("moe", [start], terminal=terminal)
        assert "float32" not in fed("moe", [events[0]], terminal=terminal)


def test_a_long_line_is_not_cut(events: list[Event]) -> None:
    warning = {"event": "warning", "step": 1, "message": "word " * 40 + "end"}
    assert f"warning: moe, step 1: {warning['message']}\n" in fed("moe", [events[0], warning], terminal=False, width=60)


def test_progress_of_a_run_that_nobody_expected(events: list[Event], tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with RunProgress(console) as progress:
        for event in events:
            progress("surprise", event)
    assert isinstance(console.file, io.StringIO)
    assert "surprise" in console.file.getvalue()
