"""Sources, what is left out, and the split by document."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handful import documents as module
from handful.documents import read_documents, split_documents
from handful.errors import DataError

WORDS = ["import", "return", "lambda", "yield", "self.assertEqual", "naïve", "☃", "x", "=", "1", "range(10):\n"]


def document(number: int, words: int = 60) -> str:
    rng = np.random.default_rng(number)
    return " ".join(rng.choice(WORDS, words)) + f" # {number}\n"


# ---------------------------------------------------------------------------------------------------------------------
# Sources and documents.


def test_folder_skips_with_a_count_by_reason(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("second")
    (tmp_path / "a.py").write_bytes(
        b"first\r\n\xef\xbb\xbf" * 9
    )  # read to the byte: neither ends of lines nor marks change
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*- é".encode("latin-1"))
    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_text(" \n\t\n")
    (tmp_path / "image").write_bytes(b"GIF\0\xff")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("hidden")
    (tmp_path / ".hidden").write_text("hidden")
    name, documents, skipped = read_documents(str(tmp_path))
    assert name == str(tmp_path)
    assert documents == [b"first\r\n\xef\xbb\xbf" * 9, b"second"]
    assert skipped == {"not UTF-8": 1, "empty": 2, "binary": 1, "unreadable": 2}


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("closed", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert read_documents(str(tmp_path))[1:] == ([b"open"], {"unreadable": 1})


def test_rows_that_are_no_documents_are_counted(tmp_path: Path) -> None:
    good = [b'{"text": "one\\nline \\u2603"}', b'{"text": "two", "id": 2}'] * 6
    bad = [
        b"",
        b'{"text": ""}',
        b'{"title": "no text"}',
        b'{"text": 5}',
        b"[1]",
        b"not json",
        b"[" * 100_000,
        b'{"text": "half a pair \\ud83d"}',
        b'{"text": "\xff"}',
        b'{"text": "nul \\u0000"}',
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(bad + good))
    _, documents, skipped = read_documents(str(tmp_path / "rows.jsonl"))
    assert documents == ["one\nline ☃".encode(), b"two"] * 6
    assert skipped == {"empty": 1, "without text": 6, "not UTF-8": 1, "binary": 1}


def test_a_source_of_which_most_is_left_out_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "read.txt").write_text("some text " * 10)  # 100 bytes
    (tmp_path / "photo.png").write_bytes(b"\0" * 100)
    assert read_documents(str(tmp_path))[1] == [b"some text " * 10]  # as much as is read: not more
    (tmp_path / "rows.txt").write_text('{"text": "not asked for by its name"}\n' * 2)  # 76
    (tmp_path / "ids.csv").write_text("id,label\n1,0\n")  # 13
    with pytest.raises(DataError) as caught:
        read_documents(str(tmp_path))
    assert str(caught.value) == (
        f"data {str(tmp_path)!r}: 189 of 289 bytes are not read: skipped 3 (1 without a column 'text' among id, label, "
        "1 binary .png, 1 JSON in a .txt file); name what is meant, by a pattern such as 'folder/**/*.txt', or "
        "its column by --column"
    )
    assert read_documents(str(tmp_path / "*.txt"))[1] == [b"some text " * 10]  # 76 of 176
    with pytest.raises(DataError, match=r"rows.txt': no text: skipped 1 \(1 JSON in a \.txt file\)$"):
        read_documents(str(tmp_path / "rows.txt"))
    # Of a file of rows, the share of those that have no text.
    rows = ['{"text": "a"}'] * 4 + ['{"text": null}'] * 5
    (tmp_path / "few.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"bytes are not read: skipped 5 \(5 without text\)"):
        read_documents(str(tmp_path / "few.jsonl"))


def test_glob_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.md", "a.md", "c.txt", "sub/d.md", "[x].md"):
        (tmp_path / name).write_text(name)
    assert read_documents(str(tmp_path / "?.md"))[1] == [b"a.md", b"b.md"]
    assert read_documents(str(tmp_path / "**" / "*.md"))[1] == [b"[x].md", b"a.md", b"b.md", b"sub/d.md"]
    assert read_documents(str(tmp_path / "[x].md"))[1] == [b"[x].md"]  # a file of that name comes before a pattern
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_documents("~/c.txt")[1] == [b"c.txt"]


def test_default_text_is_pythons_own_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, documents, _ = read_documents(None)
    assert name == f"Python {sys.version.split()[0]} standard library"
    assert Path(json.__file__).read_bytes() in documents
    assert sum(map(len, documents)) > 5e6

    for file in ("ok.py", "test/ok2.py", "site-packages/no.py", "__pycache__/no.py", "no.so", "dist-packages/no.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(file)
    monkeypatch.setattr(sysconfig, "get_path", lambda key: str(tmp_path))
    assert read_documents(None)[1] == [b"ok.py", b"test/ok2.py"]


# ---------------------------------------------------------------------------------------------------------------------
# The split.


@settings(deadline=None)
@given(numbers=st.lists(st.integers(0, 150), min_size=2, max_size=200), data=st.data())
def test_copies_are_never_on_both_sides(numbers: list[int], data: st.DataObject) -> None:
    documents = [document(number, words=10 + number % 7).encode() for number in numbers]
    train, heldout = split_documents(documents)
    assert not set(train) & set(heldout)
    assert Counter(train + heldout) == Counter(documents)  # too short to be cut: nothing lost, nothing added
    assert bool(heldout) == (len(set(documents)) > 1)
    # The side depends on the content alone: neither on the order nor on where a copy stands.
    shuffled = data.draw(st.permutations(documents))
    assert set(split_documents(shuffled)[1]) == set(heldout)


def test_share_of_many_documents() -> None:
    documents = [document(number).encode() for number in range(1000)]
    train, heldout = split_documents(documents)
    share = sum(map(len, heldout)) / sum(map(len, documents))
    assert 0.04 <= share <= 0.05
    assert [d for d in documents if d in set(heldout)] == heldout  # in the order given
    assert [d for d in documents if d in set(train)] == train
    # Most stay on their side when the text grows, for the hash of each orders them.
    more = split_documents([*documents, *(document(number).encode() for number in range(1000, 1100))])[1]
    assert len(set(heldout) & set(more)) >= 0.9 * len(heldout)


@given(lengths=st.lists(st.integers(0, 80), min_size=5, max_size=50))
def test_a_long_document_is_cut_at_line_ends(lengths: list[int]) -> None:
    lines = [f"{number} " + "☃" * length for number, length in enumerate(lengths * 40)]
    text = "\n".join(lines).encode()
    longest = 1000
    sections = list(module.cut(text, longest))
    assert b"".join(sections) == text
    assert all(0 < len(section) <= 1.5 * longest for section in sections)
    assert all(section.endswith(b"\n") for section in sections[:-1])
    train, heldout = split_documents([text])
    assert not set(train) & set(heldout)
    assert sum(map(len, train + heldout)) == len(text)
    assert b"".join(train + heldout).count(b"\n") == len(lines) - 1
    if len(text) > 10_000:  # in a shorter one a section of 256 bytes and more may be over the limit
        assert 0.03 * len(text) < sum(map(len, heldout)) <= 0.05 * len(text)


def test_a_document_of_one_line_is_cut_between_characters() -> None:
    text = ("☃" * 3000).encode()
    sections = list(module.cut(text, 1000))
    assert b"".join(sections) == text
    assert len(sections) == 9
    assert {len(section.decode()) for section in sections} <= {332, 333, 334}


def test_few_documents() -> None:
    small, large = b"a" * 100, b"b" * 200
    assert split_documents([large, small, large, small]) == ([large, large], [small, small])
    assert split_documents([small, small]) == ([small, small], [])
