"""Sources to documents: what counts as a document, what is left out and counted, and which side of the split it is on.

    read_documents(source)      a file, a folder, a glob, a data set or the default text -> its documents as bytes
    split_documents(documents)  the training part and the held-out part; copies of a document are on the same side
    content_hash(document)      what decides the side

A document is UTF-8 text and is never changed: line ends and byte-order marks stay as they are. All of a source is held
in memory: of a data set that does not fit, a part is asked for (hf:org/name:train[:100000]), by streaming.
"""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import stat
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from handful.errors import DataError, MissingExtraError
from handful.formats import UnreadableError, texts
from handful.hub_rows import rows_of

__all__ = [
    "SMALLEST_SECTION",
    "content_hash",
    "cut",
    "heldout_files",
    "heldout_of",
    "left_out",
    "read_documents",
    "read_files",
    "split_documents",
]

REASONS = 4  # that a message counts

HELD_OUT = 0.04  # the share of the bytes that is held out …
HELD_OUT_LIMIT = 0.05  # … and what it never exceeds, a text of a few documents aside
SMALLEST_SECTION = 256  # bytes


def read_documents(source: str | None, column: str | None = None) -> tuple[str, list[bytes], Counter[str]]:
    """The name of a source, its documents as UTF-8, in order, and how many were left out, by reason.

    column   of rows, the one that holds the text; None: "text", or "content", or the only one with text in it.

    DataError where nothing is there, where no text is, and where more bytes are left out than are read.
    """
    name, files, skipped = read_files(source, column)
    return name, [document for _, documents in files for document in documents], skipped


def heldout_of(source: str | None, column: str | None = None) -> list[tuple[str, list[bytes]]]:
    """What a training on that source holds out, as `read_files` gives files."""
    name, documents, _ = read_documents(source, column)
    return [(f"held out of {name}", split_documents(documents)[1])]


def heldout_files(source: str | None, column: str | None = None) -> list[tuple[str, list[bytes]]]:
    """The same, file by file: (its path, its held-out documents or sections) of each that has some."""
    _, files, _ = read_files(source, column)
    longest = _longest(sum(len(document) for _, documents in files for document in documents))
    _, held = split_documents([document for _, documents in files for document in documents])
    held_out = set(map(content_hash, held))
    found = [
        (file, [part for document in documents for part in cut(document, longest) if content_hash(part) in held_out])
        for file, documents in files
    ]
    return [(file, parts) for file, parts in found if parts]


def read_files(
    source: str | None, column: str | None = None
) -> tuple[str, list[tuple[str, list[bytes]]], Counter[str]]:
    """`read_documents`, file by file: (its path, its documents) of each that has some."""
    files: list[tuple[str, list[bytes]]] = []
    skipped: Counter[str] = Counter()
    read = lost = 0  # bytes

    def kept(text: bytes | str | None, documents: list[bytes]) -> bool:
        """Whether it is a document; white space is none, and no loss."""
        reason: str | None = None
        try:
            content = text if isinstance(text, bytes) else (text or "").encode()
            content.decode()
        except UnicodeError:
            content, reason = b"", "not UTF-8"
        if reason is None:
            reason = "without text" if text is None else "empty" if not content or content.isspace() else None
        if reason is None and b"\0" in content:
            reason = "binary"
        if reason is None:
            documents.append(content)
        else:
            skipped[reason] += 1
        return reason is None or reason == "empty"

    if source is not None and source.startswith("hf:"):
        name, rows = source, list[bytes]()
        for row in rows_of(source, column):
            kept(row, rows)
        files.append((name, rows))
    else:
        name, paths = _paths(source)
        for path in paths:
            try:
                # Reading a pipe would wait for ever.
                if not stat.S_ISREG(os.stat(path).st_mode):
                    raise OSError("not a regular file")
                content = path.read_bytes()
            except OSError:
                skipped["unreadable"] += 1
                continue
            documents: list[bytes] = []
            try:
                found = [kept(text, documents) for text in texts(path.name, content, column)]
            except UnreadableError as error:
                skipped[str(error)] += 1
                lost += len(content)
                continue
            except MissingExtraError as error:
                raise MissingExtraError(error.package, f"data {str(path)!r}", extra=error.extra) from None
            files.append((str(path), documents))
            share = sum(found) / max(1, len(found))
            read += round(share * len(content))
            lost += round((1 - share) * len(content))
    files = [(file, documents) for file, documents in files if documents]
    if not files:
        raise DataError(f"data {name!r}: no text: {left_out(skipped)}")
    if lost > read:
        raise DataError(
            f"data {name!r}: {lost:,} of {lost + read:,} bytes are not read: {left_out(skipped)}; name what is meant, "
            "by a pattern such as 'folder/**/*.txt', or its column by --column"
        )
    return name, files, skipped


def left_out(skipped: Counter[str]) -> str:
    """What was left out, in words: "skipped 5 (4 empty, 1 binary)"."""
    shown = [f"{count:,} {reason}" for reason, count in skipped.most_common(REASONS)]
    others = len(skipped) - len(shown)
    more = [f"{others} other {'reason' if others == 1 else 'reasons'}"] if others else []
    return f"skipped {skipped.total():,} ({', '.join(shown + more)})" if skipped else "skipped none"


def _paths(source: str | None) -> tuple[str, list[Path]]:
    if source is None:
        # Python's own sources alone: what lies beside them was installed by somebody.
        files = _files(Path(sysconfig.get_path("stdlib")), without={"__pycache__", "site-packages", "dist-packages"})
        return f"Python {platform.python_version()} standard library", [path for path in files if path.suffix == ".py"]
    path = Path(source).expanduser()
    if os.path.isdir(path):
        return source, _files(path)
    if os.path.exists(path):
        return source, [path]
    found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not found:
        raise DataError(f"data {source!r}: no such file or folder, and nothing that matches it as a pattern")
    return source, [path for path in found if not os.path.isdir(path)]


def _files(folder: Path, without: Collection[str] = ()) -> list[Path]:
    """Every file below a folder, sorted, except hidden ones; links to folders are not followed.

    A folder that cannot be listed stands for the files in it, to be counted as unreadable.
    """
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=lambda error: found.append(Path(error.filename))):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        found.extend(Path(parent, name) for name in files if not name.startswith("."))
    return sorted(found)


def split_documents(documents: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """The training part and the held-out part of some documents, each in the order given.

    Documents are held out in the order of the hash of their content until they are 4% of the bytes; one that would
    bring them above 5% is passed over. Copies of a document share its hash, and so its side. A document of more than
    1% of the text is first cut into sections at line ends, so that one long file can be split too; sections are then
    documents like any other. Where documents are so few that none fits in 5%, the smallest one is held out; a part
    may be empty when all documents are the same.
    """
    total = sum(map(len, documents))
    longest = _longest(total)
    sections = [section for document in documents for section in cut(document, longest)]
    digests = [content_hash(section) for section in sections]
    sizes: Counter[bytes] = Counter()
    for digest, section in zip(digests, sections, strict=True):
        sizes[digest] += len(section)

    held: set[bytes] = set()
    held_bytes = 0
    for digest in sorted(sizes):
        if held_bytes >= HELD_OUT * total:
            break
        if held_bytes + sizes[digest] <= HELD_OUT_LIMIT * total:
            held.add(digest)
            held_bytes += sizes[digest]
    if not held and len(sizes) > 1:
        held = {min(sizes, key=lambda digest: (sizes[digest], digest))}
    train = [section for digest, section in zip(digests, sections, strict=True) if digest not in held]
    return train, [section for digest, section in zip(digests, sections, strict=True) if digest in held]


def _longest(total: int) -> int:
    """Bytes of a section, of a text of so many."""
    return max(SMALLEST_SECTION, total // 100)


def cut(document: bytes, longest: int) -> Iterator[bytes]:
    """A document in about equal sections of at most 1.5 × `longest` bytes, cut behind a line that ends there."""
    count = -(-len(document) // longest)
    start = 0
    for number in range(1, count):
        goal = len(document) * number // count
        end = document.rfind(b"\n", goal - longest // 2, goal) + 1
        if not end:
            end = goal
            while document[end] & 0xC0 == 0x80:  # inside a UTF-8 character
                end -= 1
        yield document[start:end]
        start = end
    yield document[start:]


def content_hash(content: bytes) -> bytes:
    """A hash of a document's content: it decides the side of the split, and is what the cache knows a text by."""
    return hashlib.blake2b(content, digest_size=16).digest()
