"""Documents to tokens to batches: the cache of tokens, bits per byte, and the order that training follows.

    load_data(source)            text -> a `Data`: memory-mapped tokens, a training part and a held-out part
    Batches(tokens, …).at(step)  a training batch, as a function of the seed and the step alone
    heldout_batches(tokens, …)   the held-out sequences, the same for every model
    bits_per_byte(loss, …)       a loss that can be compared between tokenizers

A part is one row of tokens: eos, document, eos, document, eos, … or, where the tokenizer begins a text with a token of
its own, <s>, document, eos, <s>, document, eos, … So every document's first token has something to be predicted from,
and every end of a document is predicted too.

Legend: B sequences · S tokens in one · V vocabulary
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from torch import Tensor

from handful.documents import SMALLEST_SECTION, content_hash, left_out, read_documents, split_documents
from handful.errors import ConfigError, DataError
from handful.text import SMALLEST_VOCAB, Tokenizer, load_tokenizer, train_tokenizer, trained

__all__ = ["Batches", "Data", "bits_per_byte", "heldout_batches", "load_data"]

Tokens = np.memmap[Any, np.dtype[Any]]

_MAGIC = b"handful tokens 1"  # of a cache file; the number changes with its format, the split or the training
_DIGEST = 32
_SAMPLE = 64 << 20  # bytes of text that a tokenizer is trained on at most
_GROUP = 8 << 20  # bytes of text tokenised at once: enough to keep all cores busy, little enough for memory


def load_data(
    source: str | None,
    *,
    column: str | None = None,
    tokenizer: str | None = None,
    vocab: int = 2048,
    cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Data:
    """Read a text, split it by document, and give its tokens, from the cache if the same text was here before.

    source      a file, a folder, a glob, `hf:org/name[:config][:split]` (needs the package datasets), or None: the
                sources of Python's standard library. Files of rows (`formats.py`) hold a document a row.
    column      the one that holds the text of a row; None: "text", "content", or the only one with text in it.
    tokenizer   as for `load_tokenizer`; None trains one of `vocab` tokens on the training part (where that has more
                than 64 MiB, on every second, third, … document of it).
    cache       the folder of token files; None: $HANDFUL_CACHE, or else the user's cache folder.
    progress    called with a line of text as the work goes on.

    Files that are empty, binary (a NUL byte), not UTF-8 or unreadable, and rows without text, are left out and counted
    in `Data.skipped`. DataError when nothing is left or most bytes are left out, when nothing can be held out, and when
    the cache cannot be written.
    """
    say = progress or (lambda line: None)
    given = load_tokenizer(tokenizer) if tokenizer is not None else None
    if given is None and vocab < SMALLEST_VOCAB:
        raise ConfigError(f"data.vocab = {vocab}: at least {SMALLEST_VOCAB}")

    name, documents, skipped = read_documents(source, column)
    text_bytes = sum(map(len, documents))
    say(f"{name}: {len(documents):,} documents, {text_bytes / 1e6:,.1f} MB; {left_out(skipped)}")

    key = hashlib.blake2b(_MAGIC, digest_size=16)
    key.update((given.fingerprint if given else f"trained {vocab}").encode())
    if given is not None and given.frame[1]:
        key.update(repr(given.frame).encode())
    for document in documents:
        key.update(content_hash(document))
    path = (cache or default_cache()) / "tokens" / f"{key.hexdigest()}.tokens"
    stored = _read_cache(path)
    if stored is None:
        if path.exists():
            say(f"the cache file {path} is damaged: it is made again")
        train, heldout = split_documents(documents)
        if not train or not heldout:
            raise DataError(
                f"data {name!r}: all of its {text_bytes:,} bytes (at most as many tokens) are one document: to hold a "
                f"part out, two documents that differ are needed, or a file of more than {SMALLEST_SECTION} bytes"
            )
        if given is None:
            sample = train[:: -(-sum(map(len, train)) // _SAMPLE)]  # every one, or every second, third, …
            say(f"training a tokenizer of {vocab:,} tokens on {sum(map(len, sample)) / 1e6:,.1f} MB")
            given = train_tokenizer((document.decode() for document in sample), vocab)
        row_type = np.dtype("<u2" if given.vocab_size <= 1 << 16 else "<u4")
        rows = [_tokenize(part, given, row_type, say) for part in (train, heldout)]
        _write_cache(path, given, rows, heldout_bytes=sum(map(len, heldout)))
        stored = _read_cache(path)
        if stored is None:
            raise DataError(f"cache {str(path)!r}: it was written, and cannot be read back")
    header, parts = stored
    return Data(
        name=name,
        tokenizer=given or trained(tokenizers.Tokenizer.from_str(header["tokenizer"]), header["eos"]),
        train=parts[0],
        heldout=parts[1],
        documents=len(documents),
        skipped=dict(skipped),
        heldout_bytes=header["heldout_bytes"],
        fingerprint=key.hexdigest(),
        origin={"source": source, "column": column, "tokenizer": tokenizer, "vocab": vocab},
    )


def bits_per_byte(loss_nats_per_token: float, bytes_per_token: float) -> float:
    """A mean loss in nats per token as bits per byte of text: nats / ln 2 / (bytes per token)."""
    return loss_nats_per_token / math.log(2) / bytes_per_token


def heldout_batches(tokens: NDArray[Any], batch: int, context: int, max_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Held-out sequences (inputs_BS, targets_BS), int64: the same ones for every model, seed and batch size.

    They do not overlap. Where they hold more than `max_tokens` tokens, as many as that allows (at least one) are
    spread evenly over the part. The last batch may be smaller: weigh losses by targets. DataError, at once, for fewer
    tokens than one sequence needs.
    """
    starts = _heldout_starts(tokens, context, max_tokens)
    return (_sequences(tokens, starts[at : at + batch], context) for at in range(0, len(starts), batch))


def _heldout_starts(tokens: NDArray[Any], context: int, max_tokens: int) -> NDArray[np.int64]:
    windows = _windows(len(tokens), context, "held-out")
    taken = min(windows, max(1, max_tokens // context))
    return np.arange(taken, dtype=np.int64) * windows // taken * context


def _windows(tokens: int, context: int, part: str) -> int:
    """How many sequences a row of tokens holds; each needs one token more than its context, the last target."""
    if tokens < context + 1:
        raise DataError(
            f"the {part} part has {tokens:,} tokens: one sequence of context {context} needs {context + 1:,}"
        )
    return (tokens - 1) // context


def _sequences(tokens: NDArray[Any], starts_B: NDArray[np.int64], context: int) -> tuple[Tensor, Tensor]:
    rows = np.asarray(tokens)[starts_B[:, None] + np.arange(context + 1)].astype(np.int64)
    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())


# ---------------------------------------------------------------------------------------------------------------------
# Tokens.


def _tokenize(
    documents: Sequence[bytes], tokenizer: Tokenizer, row_type: np.dtype[Any], say: Callable[[str], None]
) -> NDArray[Any]:
    first, before, after = (np.array(tokens, row_type) for tokens in tokenizer.frame)
    row = [first]
    group: list[str] = []
    size, done, told, total = 0, 0, 0, sum(map(len, documents))
    for number, document in enumerate(documents, 1):
        group.append(document.decode())
        size += len(document)
        if size < _GROUP and number < len(documents):
            continue
        for ids in tokenizer.encode_batch(group):
            row += [before, np.array(ids, row_type), after]
        group, size, done = [], 0, done + size
        if 10 * done // total > told:
            told = 10 * done // total
            say(f"tokenised {done / 1e6:,.1f} of {total / 1e6:,.1f} MB")
    return np.concatenate(row)


# ---------------------------------------------------------------------------------------------------------------------
# The cache: one file for a text and a tokenizer. Magic, length of the header, header (JSON, padded so that tokens are
# aligned), training tokens, held-out tokens, and a hash of all that.


def default_cache() -> Path:
    chosen = os.environ.get("HANDFUL_CACHE")
    return Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "handful").expanduser()


def _read_cache(path: Path) -> tuple[dict[str, Any], list[Tokens]] | None:
    """Header, training and held-out tokens; None when there is no such file or it is not whole."""
    try:
        content: Tokens = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError):  # absent, or empty
        return None
    start = len(_MAGIC) + 8
    seal = hashlib.blake2b(content[:-_DIGEST].data, digest_size=_DIGEST).digest()
    if content[: len(_MAGIC)].tobytes() != _MAGIC or content[-_DIGEST:].tobytes() != seal:
        return None
    at = start + int.from_bytes(content[len(_MAGIC) : start].tobytes(), "little")
    header: dict[str, Any] = json.loads(content[start:at].tobytes())
    row = content[at:-_DIGEST].view(header["dtype"])
    return header, [row[: header["train_tokens"]], row[header["train_tokens"] :]]


def _write_cache(path: Path, tokenizer: Tokenizer, parts: Sequence[NDArray[Any]], *, heldout_bytes: int) -> None:
    header = {
        "tokenizer": tokenizer.to_str(),
        "eos": tokenizer.eos,
        "dtype": parts[0].dtype.str,
        "train_tokens": len(parts[0]),
        "heldout_bytes": heldout_bytes,
    }
    line = json.dumps(header).encode()
    line += b" " * (-(len(_MAGIC) + 8 + len(line)) % 64)
    contents: list[bytes | memoryview] = [_MAGIC, len(line).to_bytes(8, "little"), line]
    contents += [part.data for part in parts]
    seal = hashlib.blake2b(digest_size=_DIGEST)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(".*.tmp"):  # by a writer that was killed
            with contextlib.suppress(FileNotFoundError):  # or by one that lives, and has just finished
                if time.time() - left.stat().st_mtime > 86400:
                    left.unlink()
        with _atomic_file(path) as file:
            for content in contents:
                seal.update(content)
                file.write(content)
            file.write(seal.digest())
    except OSError as error:
        raise DataError(
            f"cache {str(path.parent)!r}: cannot be written: {error.strerror}: set HANDFUL_CACHE to another folder"
        ) from None


@contextlib.contextmanager
def _atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` whole or not at all. The temporary name is this writer's alone, so that
    two at once do not meet: the later one puts the same bytes in the place of the same bytes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# What training uses.


@dataclass(frozen=True, eq=False)
class Data:
    """A text as tokens.

    name           what people call it.
    tokenizer      the tokenizer of these tokens.
    train, heldout the tokens of the two parts, memory-mapped: 1-D, uint16 or (vocabularies above 65,536) uint32.
    documents      how many were read, and `skipped`, how many files, lines or rows were not, by reason.
    heldout_bytes  UTF-8 bytes of the held-out documents.
    fingerprint    a hash of the text and the tokenizer (or how it was trained): the same data, the same fingerprint.
    origin         the arguments of `load_data` that it came from: how to have it again.
    """

    name: str
    tokenizer: Tokenizer
    train: Tokens
    heldout: Tokens
    documents: int
    skipped: dict[str, int]
    heldout_bytes: int
    fingerprint: str
    origin: dict[str, Any]

    @property
    def train_tokens(self) -> int:
        return len(self.train)

    @property
    def heldout_tokens(self) -> int:
        return len(self.heldout)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the held-out text per predicted token: all but the first eos, which nothing precedes.

        An eos covers no bytes, but its nats count: saying where a document ends is a part of saying the text.
        """
        return self.heldout_bytes / (self.heldout_tokens - 1)

    def evaluated_bytes_per_token(self, context: int, max_tokens: int) -> float:
        """`bytes_per_token` of exactly the targets in `heldout_batches(self.heldout, any, context, max_tokens)`.

        With it, bits per byte is exact for an evaluation that covers a part of the held-out text.
        """
        tokens = range(self.tokenizer.vocab_size)
        lengths_V = np.array([len(self.tokenizer.token_bytes(token, special=False)) for token in tokens])
        lengths_V[self.tokenizer.eos_id] = 0
        starts_B = _heldout_starts(self.heldout, context, max_tokens)
        targets_BS = np.asarray(self.heldout)[starts_B[:, None] + np.arange(1, context + 1)]
        return float(lengths_V[targets_BS].mean())

    def summary(self) -> dict[str, Any]:
        """The figures, as plain values."""
        return {
            "name": self.name,
            "documents": self.documents,
            "skipped": self.skipped,
            "train_tokens": self.train_tokens,
            "heldout_tokens": self.heldout_tokens,
            "bytes_per_token": self.bytes_per_token,
        }


class Batches:
    """The order of training: a batch is a function of the seed and the step, so a step is all that resuming needs.

    An epoch cuts the tokens into sequences that do not overlap, from an offset of its own, and visits each once, in a
    permutation of its own. The next epoch begins where the last one ends, within a batch if need be.

    tokens    1-D. DataError when there are fewer than one sequence needs: context + 1.
    windows   sequences in an epoch.
    """

    def __init__(self, tokens: NDArray[Any], *, batch: int, context: int, seed: int) -> None:
        _windows(len(tokens), context, "training")
        self.tokens = np.asarray(tokens)
        self.batch = batch
        self.context = context
        self.seed = seed
        # Offsets up to context - 1, where the tokens are enough, at the same number of sequences for each of them.
        self._offsets = min(context, len(tokens) - context)
        self.windows = (len(tokens) - self._offsets) // context
        self._starts = functools.lru_cache(maxsize=2)(self._epoch_starts)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step (from 0): inputs_BS and targets_BS, int64, each target the token after its input."""
        epochs_B, places_B = np.divmod(np.arange(step * self.batch, (step + 1) * self.batch), self.windows)
        starts = [self._starts(epoch)[places_B[epochs_B == epoch]] for epoch in range(epochs_B[0], epochs_B[-1] + 1)]
        return _sequences(self.tokens, np.concatenate(starts), self.context)

    def _epoch_starts(self, epoch: int) -> NDArray[np.int64]:
        random = np.random.default_rng([self.seed, epoch])
        offset = random.integers(self._offsets)
        return offset + random.permutation(self.windows) * self.context
