"""Files to texts: every format holds the same documents, and what is none of them is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from handful.errors import MissingExtraError
from handful.formats import UnreadableError, choose_column, is_json, texts

TEXTS = ["one", "two\nlines, a comma", 'a "quote" and ☃', "four " * 50_000]
ROWS: list[dict[str, Any]] = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def separated(rows: list[dict[str, Any]], by: str = ",") -> bytes:
    file = io.StringIO(newline="")
    table = csv.DictWriter(file, list(rows[0]), delimiter=by)
    table.writeheader()
    table.writerows(rows)
    return file.getvalue().encode()


def parquet(rows: list[dict[str, Any]], **columns: Any) -> bytes:
    sink = io.BytesIO()
    table = pa.table({name: [row[name] for row in rows] for name in rows[0]} | columns)
    pq.write_table(table, sink)
    return sink.getvalue()


def named(value: object) -> str:
    """A test's name holds no content: compressed, it may hold the time."""
    return value if isinstance(value, str) else "content"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(ROWS)),
        ("A.JSONL", b"\xef\xbb\xbf" + lines(ROWS).replace(b"\n", b"\r\n")),
        ("a.ndjson", lines(ROWS)),
        ("a.json", lines(ROWS)),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("a.json", json.dumps(TEXTS).encode()),
        ("a.json", json.dumps({"version": 2, "data": ROWS}).encode()),
        ("a.json", json.dumps({"id": [0, 1, 2, 3], "text": TEXTS}).encode()),
        ("a.csv", separated(ROWS)),
        ("a.csv", b"\xef\xbb\xbf" + separated(ROWS)),
        ("a.tsv", separated(ROWS, "\t")),
        ("a.csv", separated(ROWS, ";")),
        ("a.jsonl", "".join(json.dumps(text) + "\n" for text in TEXTS).encode()),
        ("a.parquet", parquet(ROWS)),
        ("a.parquet", parquet(ROWS, text=pa.array(TEXTS, pa.large_string()), vector=[[0.5] * 4] * 4)),
        ("a.parquet", parquet(ROWS, text=pa.array(TEXTS).dictionary_encode())),
    ],
    ids=named,
)
def test_every_format_holds_the_same_documents(name: str, content: bytes) -> None:
    assert list(texts(name, content)) == TEXTS
    for suffix, pack in PACKED.items():
        assert list(texts(name + suffix, pack(content))) == TEXTS


def frames(content: bytes) -> bytes:
    """Two frames, of which the first does not say how long it is."""
    half = len(content) // 2
    stream = zstandard.ZstdCompressor().compressobj()
    return stream.compress(content[:half]) + stream.flush() + zstandard.compress(content[half:])


PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": frames,
}


def test_text_is_one_document_to_the_byte() -> None:
    content = b"\xef\xbb\xbfa\r\nb\n\xff"
    assert list(texts("a.txt", content)) == list(texts("a", content)) == [content]
    assert list(texts("a.py.gz", gzip.compress(content))) == [content]


def test_a_compressed_txt_is_a_corpus() -> None:
    assert list(texts("oscar.txt.gz", gzip.compress(b"one\ntwo\n"))) == [b"one", b"two"]
    assert list(texts("cc100.txt.xz", lzma.compress(b"one\nmore\n\ntwo\r\n \r\n\nthree\n"))) == [
        b"one\nmore", b"two", b"three\n",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "column"),
    [
        ([{"text": "a", "content": "b"}], "text"),
        ([{"title": "a", "content": "b"}], "content"),
        ([{"body": "a", "id": 5, "tags": ["x"]}], "body"),
        ([{"label": "1", "sentence": "a"}, {"label": "", "sentence": "b"}], "sentence"),
        ([{"text": None, "story": "a"}, {"story": "b"}], "story"),
        ([{"question": "a", "answer": "b"}], None),
        ([{"text": 1}], None),
        ([], None),
    ],
)
def test_the_column_that_holds_the_text(rows: list[dict[str, Any]], column: str | None) -> None:
    assert choose_column(rows) == column


def test_a_column_by_name() -> None:
    rows = [{"text": "no", "answer": "yes"}, {"text": "no"}]
    assert list(texts("a.jsonl", lines(rows), "answer")) == ["yes", None]
    for name, content in (("a.csv", separated(rows)), ("a.parquet", parquet([{"text": "no", "answer": "yes"}]))):
        assert next(texts(name, content, "answer")) == "yes"
    for name, content in (("a.jsonl", lines(rows)), ("a.csv", separated(rows))):
        with pytest.raises(UnreadableError, match=r"^without a column 'body' among text, answer$"):
            list(texts(name, content, "body"))
    many = [{f"c{i}": "a" for i in range(9)}]
    with pytest.raises(UnreadableError, match=r"^without a column 'text' among c0, c1, c2, c3, …$"):
        list(texts("a.jsonl", lines(many)))


def test_a_row_without_text_is_none() -> None:
    rows = b'{"text": "a"}\n"b"\n[1]\nnot json\n{"text": 5}\n{"text": "\xff"}\n\n{"other": "b"}\n'
    assert list(texts("a.jsonl", rows)) == ["a", "b", None, None, None, None, None]
    assert list(texts("a.json", b'["a", 5, {"text": "b"}]')) == ["a", None, "b"]
    assert list(texts("a.csv", b"id,text\n1,a\n2\n")) == ["a", None]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.gz", b"not packed", "damaged .gz"),
        ("a.txt.gz", gzip.compress(b"text" * 100)[:-9], "damaged .gz"),
        ("a.bz2", bz2.compress(b"text")[:-3], "damaged .bz2"),
        ("a.xz", lzma.compress(b"text")[:-3], "damaged .xz"),
        ("a.zst", zstandard.compress(b"text" * 100)[:-3], "damaged .zst"),
        ("a.zst", b"not packed", "damaged .zst"),
        ("a.json", b"{not json", "damaged .json"),
        ("a.json", b"5", "JSON that is no list of rows"),
        ("a.csv", b"text\n\xff\n", "damaged .csv"),
        ("a.parquet", b"PAR1", "damaged .parquet"),
        ("a.parquet", parquet(ROWS)[:-20], "damaged .parquet"),
        ("a.txt", lines(ROWS), "JSON in a .txt file"),
        ("a.ipynb", json.dumps({"cells": []}).encode(), "JSON in a .ipynb file"),
        ("a", json.dumps(ROWS).encode(), "JSON without a .json name"),
        ("a.arrow", b"ARROW1\0\0", "binary .arrow"),
        ("a.tar.gz", gzip.compress(b"\0" * 512), "binary .tar"),
    ],
    ids=named,
)
def test_what_cannot_be_read_is_named(name: str, content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableError) as caught:
        list(texts(name, content))
    assert str(caught.value) == reason


def test_what_only_looks_like_json_is_text() -> None:
    for content in (b"{ int x; }", b"[1] a note\n", b"[1, 2]", b"[]", b"{}", b"[{}]", b"{}x", b"", b"[" * 100_000):
        assert not is_json(content)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), min_size=1))
def test_any_text_goes_through_rows(found: list[str]) -> None:
    rows = [{"text": text, "n": 1} for text in found]
    assert list(texts("a.jsonl", lines(rows), "text")) == found
    assert list(texts("a.csv", separated(rows), "text")) == found
    assert list(texts("a.parquet", parquet(rows), "text")) == found


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        MissingExtraError, match=r"zst file needs the package 'zstandard': pip install 'handful-moe\[zst"
    ):
        list(texts("a.zst", b""))
    with pytest.raises(MissingExtraError, match=r"needs the package 'pyarrow': pip install 'handful-moe\[parquet\]'"):
        list(texts("a.parquet", b""))
