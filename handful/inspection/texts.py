"""Files to documents with labels, and documents to windows of tokens: what a subject is looked at on.

Legend: S tokens of a window
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from handful.documents import content_hash, cut, heldout_files, left_out, read_files
from handful.errors import DataError
from handful.text import Tokenizer

__all__ = ["KINDS", "Document", "Window", "held_out", "read", "windows"]

KINDS = ("text", "folder", "suffix", "file")
MANY = 40  # documents that a text is cut into where it has fewer, and that share the tokens
SECTION = 512  # bytes: no section is shorter
_NAMED = re.compile(r"([\w][\w .+-]*)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class Document:
    """UTF-8 text, and its label of each of KINDS: the name given to its text, the folder that it is in below what all
    files have in common, the suffix of its file's name, its file."""

    content: bytes
    labels: dict[str, str]


@dataclass(frozen=True)
class Window:
    """Some tokens of a document in a row, each of which predicts the one after it."""

    document: int
    tokens: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens that are read: all but the last, which is predicted only."""
        return len(self.tokens) - 1


def read(sources: Sequence[str], column: str | None = None) -> tuple[str, list[Document], list[str]]:
    """What the text is called, its documents, and what is to be said of it. A source is what `--data` takes, or
    NAME=that, so that NAME is its label. DataError as `documents.read_files`."""
    files: list[tuple[str, str, list[bytes]]] = []
    said = []
    for source in sources:
        named = None if Path(source).expanduser().exists() else _NAMED.fullmatch(source)
        name, found, skipped = read_files(named[2] if named else source, column)
        files += [(named[1] if named else name, file, documents) for file, documents in found]
        if skipped:
            said.append(f"{name}: {left_out(skipped)}")
    return ", ".join(dict.fromkeys(name for name, _, _ in files)), *_labelled(files, said)


def held_out(source: str | None, column: str | None = None) -> tuple[str, list[Document], list[str]]:
    """The same of what a training on that source holds out."""
    name = "held out of " + ("the Python standard library" if source is None else source)
    files = [(name, file, documents) for file, documents in heldout_files(source, column)]
    return name, *_labelled(files, [])


def _labelled(files: list[tuple[str, str, list[bytes]]], said: list[str]) -> tuple[list[Document], list[str]]:
    paths = [file for _, file, _ in files if not file.startswith("hf:")]
    folders = [os.path.dirname(os.path.abspath(path)) for path in paths]
    common = os.path.commonpath(folders) if folders else ""
    documents = []
    known: set[bytes] = set()
    for name, file, contents in files:
        if file.startswith("hf:"):
            folder = suffix = file
        else:
            below = os.path.relpath(os.path.dirname(os.path.abspath(file)), common)
            folder, suffix = below.split(os.sep)[0], Path(file).suffix or "no suffix"
        labels = {"text": name, "folder": folder, "suffix": suffix, "file": file}
        for content in contents:
            if (digest := content_hash(content)) not in known:  # a copy in the other half would agree with itself
                known.add(digest)
                documents.append(Document(content, labels))
    copies = sum(len(contents) for _, _, contents in files) - len(documents)
    if copies:
        said.append(f"{copies:,} {'copy of a document is' if copies == 1 else 'copies of documents are'} left out")
    if len(documents) < MANY:
        longest = max(SECTION, sum(len(document.content) for document in documents) // MANY)
        parts = [Document(part, document.labels) for document in documents for part in cut(document.content, longest)]
        if len(parts) > len(documents):
            said.append(
                f"{len(documents):,} {'document' if len(documents) == 1 else 'documents'} cut into {len(parts):,} "
                "sections: they count as documents"
            )
        documents = parts
    if len(documents) < 4:
        many = "1 document" if len(documents) == 1 else f"{len(documents)} documents"
        raise DataError(f"text: {many}, where 4 at least are needed, to be split in halves")
    return documents, said


def windows(
    documents: Iterable[Document], tokenizer: Tokenizer, context: int, tokens: int, seed: int
) -> tuple[list[Document], list[Window]]:
    """At most about `tokens` tokens of the documents, drawn at random, in windows of `context`: those that are read,
    in a random order, and their windows in order.

    A document begins and ends as in training. No more than a 40th of the tokens is taken from one (but a window at
    least): a run of whole windows, from a random place.
    """
    draw = random.Random(seed)
    order = list(documents)
    draw.shuffle(order)
    most = max(1, round(tokens / min(MANY, len(order)) / context))  # windows of a document
    first, before, after = tokenizer.frame
    chosen: list[Document] = []
    found: list[Window] = []
    held = 0
    for at in range(0, len(order), MANY):
        group = order[at : at + MANY]
        for document, ids in zip(group, tokenizer.encode_batch([d.content.decode() for d in group]), strict=True):
            if held >= tokens:
                return chosen, found
            row = [*first, *before, *ids, *after]
            starts = range(0, len(row) - 1, context)
            begin = draw.randrange(max(1, len(starts) - most + 1))
            parts = [tuple(row[start : start + context + 1]) for start in starts[begin : begin + most]]
            if parts:
                found += [Window(len(chosen), part) for part in parts]
                held += sum(len(part) - 1 for part in parts)
                chosen.append(document)
    return chosen, found
