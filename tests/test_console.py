"""What people see: numbers, durations, tables at any width, progress in a terminal and in a log."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import Event, moe, of_kind, tiny_data, training

from handful.console import RunProgress, comparison_table, cost_tables, duration, facts
from handful.cost import cost
from handful.presets import PRESETS, small_model
from handful.train import train
from handful.units import si, size


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
        "parameters": {"total": 1_250_000, "active": 310_000},
        "train_flops_per_token": 1_860_000,
        "weight_bytes": 5_000_000,
        "heldout_loss": measured(losses),
        "bits_per_byte": measured([loss / 2 for loss in losses]),
        "train_tokens_per_second": 12345.6,
        "decode_tokens_per_second": 987.6,
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
    assert rows[0] == ["", "Team 1 · small dense", "Team 2 · mixture of experts", "Team 3 · big dense"]
    assert {row[0]: row[1:] for row in rows[1:9]} == {
        "total parameters": ["1.25 M"] * 3,
        "active parameters": ["310 k"] * 3,
        "training FLOPs a token": ["1.86 M"] * 3,
        "weight memory": ["5.00 MB"] * 3,
        "held-out loss, nats a token": ["2.5000", "2.2500", "2.1250"],
        "held-out bits a byte": ["1.2500", "1.1250", "1.0625"],
        "training tokens/s": ["12,346"] * 3,
        "decode tokens/s": ["988"] * 3,
    }
    assert rows[9:] == [
        ["training time", "3:05", "3:05", "3:05"],
        ["the small dense loss after: tokens", "41.0 k", "41.0 k", "not reached"],
        ["FLOPs", "76.0 G", "76.0 G", "not reached"],
        ["training time", "1:00", "1:00", "not reached"],
    ]


def test_the_spread_over_seeds() -> None:
    rows = {row[0]: row[1:] for row in cells(shown(comparison_table(three([[2.5, 2.25], [2.0, 2.0], [1.5, 2.0]]))))}
    loss = rows["held-out loss, nats a token"]
    assert loss == ["2.3750 (spread 0.2500)", "2.0000 (spread 0.0000)", "1.7500 (spread 0.5000)"]
    assert rows["held-out bits a byte"][0] == "1.1875 (spread 0.1250)"


def test_one_team_alone() -> None:
    """A training run's document: nothing to reach, and nothing decoded."""
    alone = {"title": "runs/a", "teams": [team("moe", "a", [2.5], reached=None, decode_tokens_per_second=None)]}
    rows = cells(shown(comparison_table(alone)))
    assert rows[0] == ["", "a"]
    assert ["decode tokens/s", "not measured"] in rows
    assert rows[-1] == ["training time", "3:05"]
    assert len(rows) == 10


@pytest.mark.parametrize("teams", [1, 3])
@pytest.mark.parametrize("width", [60, 120])
def test_a_comparison_fits_the_terminal_and_loses_no_value(width: int, teams: int) -> None:
    document = three([[2.5, 2.25], [2.0, 2.0], [1.5, 2.0]])
    document["teams"] = document["teams"][:teams]
    text = shown(comparison_table(document), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for column in range(teams):
        joined = " ".join(row[column + 1] for row in cells(text))
        for value in ("1.25 M", "(spread", "12,346", "988"):
            assert value in joined


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
    first, last = of_kind("eval", events)
    assert text.splitlines() == [
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


def test_a_terminal_shows_loss_rate_and_time_left(events: list[Event]) -> None:
    step = {"event": "step", "step": 1, "seconds": 20.0, "loss": 5.4321, "tokens_per_second": 12345.6}
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
