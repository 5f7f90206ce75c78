"""Tables on a terminal of any width: whole, in groups of their columns, or line by line; a number is never cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

__all__ = ["show"]

LONG_WORD = 20  # letters: a word of a table that is longer, such as a path, may be cut in two
WIDE = 10_000  # columns: a terminal that sets no limit


def show(*tables: Table) -> None:
    """Print tables on stdout. One that is wider than the terminal is taken apart: into groups of its columns, or into
    lines. A number is never cut."""
    console = Console()
    for table in tables:
        for column in table.columns:
            lines = _lines_of(column)
            # Numbers stay whole; words may go on in the next line, and a long one is folded.
            whole = column.justify == "right" or column.no_wrap
            words = lines if whole else [word[:LONG_WORD] for line in lines for word in line.split()]
            column.min_width = max(map(cell_len, words), default=1)
            column.no_wrap = whole
            column.overflow = "fold"

        def fits(part: Table) -> bool:
            return console.measure(part, options=console.options.update(width=WIDE)).minimum <= console.width

        if fits(table):
            _print(console, table)
            continue
        names, *others = table.columns
        named = table.show_header and not _text(names.header).plain
        if named and all(fits(_part(table, [names, column])) for column in others):
            while others:
                count = len(others)
                while not fits(_part(table, [names, *others[:count]])):
                    count -= 1
                _print(console, _part(table, [names, *others[:count]]))
                others = others[count:]
            continue
        for line in _lines(table):
            console.print(line, markup=False, highlight=False, overflow="fold")


def _print(console: Console, table: Table) -> None:
    """A table that fits. Where not all of its lines do, its widest columns are made narrower: rich would shrink them
    below their least widths, take those after all, and cut off what is then too wide."""
    bare = _part(table, table.columns)  # without a width of its own
    least = [column.min_width or 1 for column in table.columns]
    lines = console.measure(bare, options=console.options.update(width=WIDE)).minimum - sum(least)
    widths = [max(map(cell_len, _lines_of(column)), default=1) for column in table.columns]
    if sum(widths) + lines > console.width:
        while sum(widths) + lines > console.width:
            widest = max((width, place) for place, width in enumerate(widths) if width > least[place])[1]
            widths[widest] -= 1
        for column, width in zip(table.columns, widths, strict=True):
            column.width = width
    console.print(table)


def _lines_of(column: Column) -> list[str]:
    return [line for cell in (column.header, *column.cells) for line in _text(cell).plain.splitlines()]


def _part(table: Table, columns: Sequence[Column]) -> Table:
    """A table of some of another's columns."""
    made = Table(title=table.title, title_justify=table.title_justify, box=table.box, padding=table.padding)
    made.columns = [replace(column, _index=place) for place, column in enumerate(columns)]
    made.rows = list(table.rows)
    return made


def _lines(table: Table) -> list[Text]:
    """A table as lines. Rows that have names are told column by column; others row by row, under their headings."""
    title = _text(table.title)
    lines = [title, Text()] if title.plain else []
    headings = [Text(" ").join(_text(column.header).split()) for column in table.columns]
    cells = [[_text(cell) for cell in column.cells] for column in table.columns]
    if not table.show_header:  # names and values
        for name, value in zip(*cells, strict=True):
            lines += [name, Text("  ").append_text(value)]
        return lines
    if headings[0].plain:
        parts = [(Text(), list(zip(headings, row, strict=True))) for row in zip(*cells, strict=True)]
    else:
        others = zip(headings[1:], cells[1:], strict=True)
        parts = [(head, list(zip(cells[0], rest, strict=True))) for head, rest in others]
    for head, pairs in parts:
        lines += [head] if head.plain else []
        lines += [Text.assemble("  ", (name.plain, "dim"), "  ", value) for name, value in pairs if value.plain]
        lines.append(Text())
    return lines[:-1]


def _text(value: Any) -> Text:
    return value.copy() if isinstance(value, Text) else Text.from_markup(str(value or ""))
