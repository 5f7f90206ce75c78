"""A file to its texts: what a corpus is stored as, told by the file's name.

    .jsonl .ndjson    a document a line: an object that has it in a column, or a text
    .json             the same lines; or one list of such objects, or of texts; or an object that holds either
    .csv .tsv         a document a row, under the names in the first row
    .parquet          a document a row (pyarrow)
    any other         one document, as it is

    … .gz .zst .bz2 .xz       any of these, compressed

A compressed .txt is a corpus: a document ends at an empty line (as in CC-100), or where there is none at every line (as
in OSCAR).

A column is the one that is named, or else `text`, or else `content`, or else the only one that holds text.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import PurePath
from typing import Any

from handful.errors import MissingExtraError

__all__ = ["UnreadableError", "choose_column", "is_json", "texts"]

USUAL_COLUMNS = ("text", "content")
SAMPLE = 100  # rows that are looked at to choose a column
SEPARATORS = ",;\t|"  # of a table in text
NAMED = 4  # columns that a message names at most


class UnreadableError(Exception):
    """A file that holds no text that can be had; the message says why, in the words of a count: "2 damaged .gz"."""


def texts(name: str, content: bytes, column: str | None = None) -> Iterator[bytes | str | None]:
    """The texts in a file of that name, in order: bytes of a file that is one text, strings of one that has rows.

    A row that has no text is None. UnreadableError where that is so of the whole file; MissingExtraError for a package.
    """
    packed = ""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    if suffixes and suffixes[-1] in _DECOMPRESS:
        packed = suffixes.pop()
        try:
            content = _DECOMPRESS[packed](content)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError):
            raise UnreadableError(f"damaged {packed}") from None
    kind = suffixes[-1] if suffixes else ""
    if kind not in _ROWS:
        if b"\0" in content:
            raise UnreadableError(f"binary {kind}".rstrip())
        if is_json(content):
            raise UnreadableError(f"JSON in a {kind} file" if kind else "JSON without a .json name")
        return iter(_corpus(content) if packed and kind == ".txt" else [content])
    return _column(_ROWS[kind](content, column), column)


def _corpus(content: bytes) -> list[bytes]:
    parts = [part for part in re.split(rb"\r?\n(?:[ \t]*\r?\n)+", content) if part.strip()]
    return parts if len(parts) > 1 else content.splitlines()


def is_json(content: bytes) -> bool:
    """Whether a text is data to be parsed: an object, or a list of them, as a whole or in its first line."""
    start = content.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:1] not in (b"{", b"["):
        return False
    for part in (start.partition(b"\n")[0], start):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        rows = value if isinstance(value, list) else [value]
        if rows and all(isinstance(row, dict) and row for row in rows):
            return True
    return False


def choose_column(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The column of some rows that holds their text, if it is plain which one: see the top of the file."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    filled = [name for name in names if _has_text(row.get(name) for row in rows)]
    for usual in USUAL_COLUMNS:
        if usual in filled:
            return usual
    return filled[0] if len(filled) == 1 else None


def _has_text(values: Iterable[Any]) -> bool:
    """A number in a CSV file is a string too, and no text."""
    return any(isinstance(value, str) and not _is_number(value) for value in values)


def _is_number(value: str) -> bool:
    try:
        float(value or "0")
    except ValueError:
        return False
    return True


def _column(rows: Iterator[Mapping[str, Any] | str | None], column: str | None) -> Iterator[str | None]:
    """The text of every row. A row that is a string is its own, and None a row that is none."""
    sample = list(islice(rows, SAMPLE))
    tables = [row for row in sample if isinstance(row, Mapping)]
    chosen = column or choose_column(tables)
    names = list(dict.fromkeys(name for row in tables for name in row))
    if tables and (chosen is None or chosen not in names):
        listed = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
        raise UnreadableError(f"without a column {column or 'text'!r} among {listed or 'none'}")

    def text(row: Mapping[str, Any] | str | None) -> str | None:
        value = row.get(chosen) if isinstance(row, Mapping) and chosen is not None else row
        return value if isinstance(value, str) else None

    return map(text, chain(sample, rows))


# ---------------------------------------------------------------------------------------------------------------------
# Rows.


def _lines(content: bytes, column: str | None) -> Iterator[Mapping[str, Any] | str | None]:
    for line in content.removeprefix(b"\xef\xbb\xbf").splitlines():
        if line.strip():
            yield _object(line)


def _object(line: bytes) -> Mapping[str, Any] | str | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return value if isinstance(value, dict | str) else None


def _json(content: bytes, column: str | None) -> Iterator[Mapping[str, Any] | str | None]:
    try:
        value = json.loads(content.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        rows = list(_lines(content, column))
        if not any(rows):
            raise UnreadableError("damaged .json") from None
        return iter(rows)
    if isinstance(value, dict):
        value = _rows_within(value, column)
    if not isinstance(value, list):
        raise UnreadableError("JSON that is no list of rows")
    return (row if isinstance(row, dict | str) else None for row in value)


def _rows_within(value: dict[str, Any], column: str | None) -> list[Any]:
    """An object is one row; or holds its rows in its only list; or, by columns, a list for each."""
    lists = {name: inner for name, inner in value.items() if isinstance(inner, list)}
    for name in (column, *USUAL_COLUMNS):
        if name in lists and all(isinstance(inner, str) for inner in lists[name]):
            return lists[name]
    if len(lists) == 1:
        (only,) = lists.values()
        if all(isinstance(row, dict) for row in only):
            return only
    return [value]


def _separated(by: str) -> Callable[[bytes, str | None], Iterator[Mapping[str, Any] | None]]:
    def rows(content: bytes, column: str | None) -> Iterator[Mapping[str, Any] | None]:
        csv.field_size_limit(sys.maxsize)  # a document may be longer than the module's 128 KiB
        try:
            text = content.decode("utf-8-sig")
            names = text.partition("\n")[0]
            # Spreadsheets of half the world put semicolons into what they call .csv.
            mark = max(by, *SEPARATORS, key=lambda each: (names.count(each), each == by))
            yield from csv.DictReader(io.StringIO(text, newline=""), delimiter=mark)
        except (UnicodeDecodeError, csv.Error):
            raise UnreadableError("damaged .csv" if by == "," else "damaged .tsv") from None

    return rows


def _parquet(content: bytes, column: str | None) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingExtraError("pyarrow", "a .parquet file", extra="parquet") from None
    try:
        file = ParquetFile(pyarrow.BufferReader(content))
        # Lists, images and the like are not looked at: they may be most of the file.
        names = [field.name for field in file.schema_arrow if _is_text(field.type)]
        chosen = [column] if column in names else [n for n in USUAL_COLUMNS if n in names][:1] or names
        for batch in file.iter_batches(columns=chosen):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
        raise UnreadableError("damaged .parquet") from None


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


_ROWS: dict[str, Callable[[bytes, str | None], Iterator[Any]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}


# ---------------------------------------------------------------------------------------------------------------------
# Compression.


def _zstd(content: bytes) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise MissingExtraError("zstandard", "a .zst file", extra="zst") from None
    parts = []
    while content:  # a frame after the other, each of an unknown length
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(content))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
        if not frame.eof:
            raise ValueError("cut short")
        content = frame.unused_data
    return b"".join(parts)


_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _zstd,
}
