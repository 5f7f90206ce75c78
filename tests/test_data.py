"""Tokens and their cache, bits per byte, and the order of batches.

Legend: B sequences · S tokens in one · V vocabulary
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from handful import data as module
from handful.data import Batches, Data, bits_per_byte, heldout_batches, load_data
from handful.documents import read_documents, split_documents
from handful.errors import ConfigError, DataError
from handful.text import END_OF_TEXT, train_tokenizer

WORDS = ["import", "return", "lambda", "yield", "self.assertEqual", "naïve", "☃", "x", "=", "1", "range(10):\n"]


def document(number: int, words: int = 60) -> str:
    rng = np.random.default_rng(number)
    return " ".join(rng.choice(WORDS, words)) + f" # {number}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eighty documents that differ."""
    path = tmp_path / "text"
    path.mkdir()
    for number in range(80):
        (path / f"{number:03}.txt").write_text(document(number), encoding="utf-8")
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def texts_of(data: Data, tokens: np.ndarray[Any, Any]) -> list[str]:
    """The documents that a row of tokens spells: eos, document, eos, document, …, eos."""
    ends = np.flatnonzero(np.asarray(tokens) == data.tokenizer.eos_id)
    assert ends[0] == 0
    assert ends[-1] == len(tokens) - 1
    return [data.tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(ends)]


# ---------------------------------------------------------------------------------------------------------------------
# load_data and its cache.


def test_tokens_spell_the_documents(folder: Path, cache: Path) -> None:
    lines: list[str] = []
    (folder / "bad").write_bytes(b"\xff")
    data = load_data(str(folder), vocab=400, cache=cache, progress=lines.append)
    train, heldout = split_documents(read_documents(str(folder))[1])
    assert texts_of(data, data.train) == [text.decode() for text in train]
    assert texts_of(data, data.heldout) == [text.decode() for text in heldout]
    assert (data.documents, data.skipped) == (80, {"not UTF-8": 1})
    assert lines[0].endswith("80 documents, 0.0 MB; skipped 1 (1 not UTF-8)")
    assert data.heldout_bytes == sum(map(len, heldout))
    assert isinstance(data.train, np.memmap)
    assert data.train.dtype == np.uint16
    assert data.tokenizer.vocab_size <= 400
    assert data.summary() == {
        "name": str(folder),
        "documents": 80,
        "skipped": {"not UTF-8": 1},
        "train_tokens": len(data.train),
        "heldout_tokens": len(data.heldout),
        "bytes_per_token": data.heldout_bytes / (len(data.heldout) - 1),
    }
    json.dumps(data.summary())


def test_groups_of_documents_are_tokenised_in_order(
    folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = load_data(str(folder), vocab=300, cache=cache)
    monkeypatch.setattr(module, "_GROUP", 1500)
    lines: list[str] = []
    grouped = load_data(str(folder), vocab=300, cache=tmp_path / "other", progress=lines.append)
    np.testing.assert_array_equal(grouped.train, at_once.train)
    np.testing.assert_array_equal(grouped.heldout, at_once.heldout)
    # A line for the text, one for the tokenizer, ten at most for each part, the last of them at its end.
    assert len(lines) == 2 + 10 + 1
    assert lines[1] == "training a tokenizer of 300 tokens on 0.0 MB"
    assert lines[-1] == "tokenised 0.0 of 0.0 MB"


def test_held_out_text_trains_no_tokenizer(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def train(texts: Any, vocab: int) -> Any:
        seen.extend(texts)
        return train_tokenizer(seen, vocab)

    monkeypatch.setattr(module, "train_tokenizer", train)
    data = load_data(str(folder), vocab=300, cache=cache)
    assert seen == texts_of(data, data.train)
    assert not set(seen) & set(texts_of(data, data.heldout))

    # Of a text above the limit: every third document, where a third of it is within.
    before, seen = seen, []
    monkeypatch.setattr(module, "_SAMPLE", sum(len(text.encode()) for text in before) // 3 + 1)
    load_data(str(folder), vocab=300, cache=cache / "other")
    assert seen == before[::3]


def test_the_second_time_it_is_read(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_data(str(folder), vocab=300, cache=cache)
    tokenizer = folder.parent / "tokenizer.json"
    first.tokenizer.save(tokenizer)
    given = load_data(str(folder), tokenizer=str(tokenizer), cache=cache)
    assert given.tokenizer.fingerprint == first.tokenizer.fingerprint
    np.testing.assert_array_equal(given.train, first.train)
    assert len(list(cache.rglob("*"))) == 3  # the folder, and a file for each

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(module, "_tokenize", fail)
    monkeypatch.setattr(module, "train_tokenizer", fail)
    # By content: another name, the same text.
    moved = folder.rename(folder.parent / "moved")
    for again, before in [
        (load_data(str(moved), vocab=300, cache=cache), first),
        (load_data(str(moved), tokenizer=str(tokenizer), cache=cache), given),
    ]:
        assert again.fingerprint == before.fingerprint
        assert again.tokenizer.fingerprint == before.tokenizer.fingerprint
        assert (again.heldout_bytes, again.documents) == (before.heldout_bytes, before.documents)
        np.testing.assert_array_equal(again.train, before.train)
        np.testing.assert_array_equal(again.heldout, before.heldout)
    with pytest.raises(AssertionError, match="made again"):
        load_data(str(moved), vocab=301, cache=cache)
    (moved / "000.txt").write_text("changed")
    with pytest.raises(AssertionError, match="made again"):
        load_data(str(moved), vocab=300, cache=cache)


def test_where_the_cache_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HANDFUL_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    load_data(str(folder), vocab=300)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_data(str(folder), vocab=300)
    monkeypatch.setenv("HANDFUL_CACHE", str(tmp_path / "own"))
    load_data(str(folder), vocab=300)
    for place in ("home/.cache/handful", "xdg/handful", "own"):
        assert len(list((tmp_path / place).glob("tokens/*.tokens"))) == 1


def test_large_vocabularies_take_four_bytes(folder: Path, cache: Path) -> None:
    vocab = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 70_000)}
    inner = tokenizers.Tokenizer(models.BPE({f"{n:05}": n for n in range(70_000)} | vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT])
    inner.save(str(folder.parent / "tokenizer.json"))
    data = load_data(str(folder), tokenizer=str(folder.parent / "tokenizer.json"), cache=cache)
    assert data.train.dtype == np.uint32
    assert data.tokenizer.eos_id == 70_256
    assert data.train.max() == 70_256
    assert texts_of(data, data.heldout) == [
        text.decode() for text in split_documents(read_documents(str(folder))[1])[1]
    ]
    inputs_BS, _ = Batches(data.train, batch=2, context=8, seed=0).at(0)
    assert inputs_BS.dtype == torch.int64


def test_a_damaged_cache_is_made_again(folder: Path, cache: Path) -> None:
    data = load_data(str(folder), vocab=300, cache=cache)
    train = np.array(data.train)
    (file,) = cache.glob("tokens/*.tokens")
    whole = file.read_bytes()

    def flipped(at: int) -> bytes:
        return whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]

    header = whole.index(b"{")
    damages = [whole[:length] for length in (0, 1, 16, 31, 40, header + 9, len(whole) // 2, len(whole) - 1)]
    damages += [flipped(at) for at in (3, 17, header + 30, len(whole) // 2, len(whole) - 40, len(whole) - 1)]
    damages += [whole + b"\0", os.urandom(2000), b"\0" * 2000]
    for damage in damages:
        file.unlink()
        file.write_bytes(damage)
        lines: list[str] = []
        again = load_data(str(folder), vocab=300, cache=cache, progress=lines.append)
        assert any("is damaged" in line for line in lines)
        np.testing.assert_array_equal(again.train, train)
        assert file.read_bytes() == whole


LOAD = """
import os, signal, sys
from pathlib import Path
from handful.data import load_data
if sys.argv[3] == "die":
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
print(load_data(sys.argv[1], vocab=300, cache=Path(sys.argv[2])).fingerprint)
"""


def test_killed_writers_and_writers_at_once(folder: Path, cache: Path) -> None:
    assert fresh.python("-c", LOAD, folder, cache, "die").returncode == -signal.SIGKILL
    (left,) = (cache / "tokens").iterdir()  # what it wrote, under a name that nobody reads
    assert left.suffix == ".tmp"

    writers = [fresh.Process("-c", LOAD, folder, cache, "live") for _ in range(2)]
    ends = [writer.wait() for writer in writers]
    assert [end.returncode for end in ends] == [0, 0]
    fingerprints = {end.stdout.strip() for end in ends}
    lines: list[str] = []
    data = load_data(str(folder), vocab=300, cache=cache, progress=lines.append)
    assert fingerprints == {data.fingerprint}
    assert len(lines) == 1  # read, not made
    assert sorted(file.suffix for file in (cache / "tokens").iterdir()) == [".tmp", ".tokens"]

    # What was left more than a day ago, nobody is writing any more.
    os.utime(left, (time.time() - 90_000,) * 2)
    load_data(str(folder), vocab=301, cache=cache)
    assert {file.suffix for file in (cache / "tokens").iterdir()} == {".tokens"}


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"^cache '.*': cannot be written: Not a directory: set HANDFUL_CACHE"):
        load_data(str(folder), vocab=300, cache=tmp_path / "file")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        load_data(str(folder), vocab=300, cache=tmp_path / "full")
    assert list((tmp_path / "full" / "tokens").iterdir()) == []


def test_errors_are_one_line(folder: Path, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.vocab = 200: at least 257$"):
        load_data(str(folder), vocab=200, cache=cache)
    for source in (str(tmp_path / "nowhere"), str(tmp_path / "*.nothing")):
        with pytest.raises(DataError, match=r"no such file or folder, and nothing that matches it as a pattern$"):
            load_data(source, cache=cache)
    (tmp_path / "bad").mkdir()
    with pytest.raises(DataError, match=r"bad': no text: skipped none$"):
        load_data(str(tmp_path / "bad"), cache=cache)
    (tmp_path / "bad" / "1").touch()
    (tmp_path / "bad" / "2").write_bytes(b"\0")
    (tmp_path / "bad" / "3").touch()
    with pytest.raises(DataError, match=r"bad': no text: skipped 3 \(2 empty, 1 binary\)$"):
        load_data(str(tmp_path / "bad"), cache=cache)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone': no text: skipped 1 \(1 unreadable\)$"):
        load_data(str(tmp_path / "gone"), cache=cache)
    (tmp_path / "tiny").write_text("hello")
    with pytest.raises(DataError, match=r"tiny': all of its 5 bytes \(at most as many tokens\) are one document"):
        load_data(str(tmp_path / "tiny"), cache=cache)
    tokens = np.zeros(128, np.uint16)
    with pytest.raises(DataError, match=r"^the training part has 128 tokens: one sequence of context 128 needs 129$"):
        Batches(tokens, batch=2, context=128, seed=0)
    with pytest.raises(DataError, match=r"^the held-out part has 128 tokens: one sequence of context 128 needs 129$"):
        heldout_batches(tokens, 2, 128, 1000)


def test_one_file_is_enough(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(document(number) for number in range(40)), encoding="utf-8")
    data = load_data(str(tmp_path / "book.txt"), vocab=300, cache=cache)
    assert data.documents == 1
    assert 0.02 < data.heldout_tokens / (data.train_tokens + data.heldout_tokens) < 0.08


# ---------------------------------------------------------------------------------------------------------------------
# Bits per byte.


def test_bits_per_byte_by_hand() -> None:
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8)  # every byte equally likely, a token each
    assert bits_per_byte(math.log(4), 4.0) == pytest.approx(0.5)  # 2 bits for 4 bytes


@pytest.mark.parametrize("vocab", [257, 300, 400])
def test_bits_per_byte_is_exact_and_the_same_for_any_tokenizer(folder: Path, cache: Path, vocab: int) -> None:
    data = load_data(str(folder), vocab=vocab, cache=cache)
    # A model that spends 8 bits on every byte and 3 on every end of a document, whatever the tokens.
    spent_V = [8.0 * len(data.tokenizer.token_bytes(token)) for token in range(data.tokenizer.vocab_size)]
    spent_V[data.tokenizer.eos_id] = 3.0
    bits_V = torch.tensor(spent_V, dtype=torch.float64)
    targets = torch.cat([targets_BS.flatten() for _, targets_BS in heldout_batches(data.heldout, 7, 1, 10**9)])
    assert len(targets) == data.heldout_tokens - 1  # all but the eos that comes first
    loss = float(bits_V[targets].mean()) * math.log(2)
    held = split_documents(read_documents(str(folder))[1])[1]
    expected = 8 + 3 * len(held) / sum(map(len, held))
    assert bits_per_byte(loss, data.bytes_per_token) == pytest.approx(expected, rel=1e-12)
    assert data.evaluated_bytes_per_token(1, 10**9) == pytest.approx(data.bytes_per_token, rel=1e-12)

    # An evaluation of a part: exact for what it covers.
    parts = torch.cat([targets_BS.flatten() for _, targets_BS in heldout_batches(data.heldout, 2, 16, 64)])
    texts = [data.tokenizer.token_bytes(token, special=False) for token in parts.tolist()]
    assert data.evaluated_bytes_per_token(16, 64) == pytest.approx(sum(map(len, texts)) / 64, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Batches.

SHAPES = {"batch": st.integers(1, 9), "context": st.integers(1, 12), "seed": st.integers(0, 2**40)}


@given(extra=st.integers(0, 90), **SHAPES)
def test_each_epoch_visits_each_window_once(extra: int, batch: int, context: int, seed: int) -> None:
    tokens = np.arange(context + 1 + extra, dtype=np.uint16)
    batches = Batches(tokens, batch=batch, context=context, seed=seed)
    assert (len(tokens) - 1) // context - 1 <= batches.windows <= (len(tokens) - 1) // context
    assert batches.windows >= 1
    epochs = 3
    rows = []
    for step in range(-(-epochs * batches.windows // batch)):
        inputs_BS, targets_BS = batches.at(step)
        assert inputs_BS.shape == targets_BS.shape == (batch, context)
        assert inputs_BS.dtype == targets_BS.dtype == torch.int64
        assert torch.equal(targets_BS, inputs_BS + 1)  # the next token of the text
        assert torch.equal(inputs_BS, inputs_BS[:, :1] + torch.arange(context))
        rows += inputs_BS[:, 0].tolist()
    for epoch in range(epochs):
        starts = sorted(rows[epoch * batches.windows : (epoch + 1) * batches.windows])
        assert starts == list(range(starts[0], len(tokens) - context, context))[: batches.windows]
        assert len(starts) == batches.windows
        assert 0 <= starts[0] < context


@given(steps=st.lists(st.integers(0, 10_000), min_size=1, max_size=8), extra=st.integers(0, 200), **SHAPES)
def test_a_batch_depends_on_seed_and_step_alone(
    steps: list[int], extra: int, batch: int, context: int, seed: int
) -> None:
    tokens = np.arange(context + 1 + extra, dtype=np.uint32)
    used = Batches(tokens, batch=batch, context=context, seed=seed)
    for step in steps:
        fresh = Batches(tokens, batch=batch, context=context, seed=seed).at(step)
        assert all(torch.equal(a, b) for a, b in zip(used.at(step), fresh, strict=True))


def test_epochs_and_seeds_differ() -> None:
    tokens = np.arange(64 * 16, dtype=np.uint16)
    orders = []
    for seed in (0, 1):
        batches = Batches(tokens, batch=1, context=16, seed=seed)
        assert batches.windows == 63
        for epoch in (0, 1):
            orders.append([int(batches.at(epoch * 63 + step)[0][0, 0]) for step in range(63)])
    assert len({tuple(order) for order in orders}) == 4
    assert len({order[0] % 16 for order in orders}) > 1  # the offset is the epoch's own


def test_a_batch_across_epochs() -> None:
    tokens = np.arange(3 * 4 + 1, dtype=np.uint16)
    one, eight = (Batches(tokens, batch=batch, context=4, seed=3) for batch in (1, 8))
    assert one.windows == 2
    assert torch.equal(eight.at(1)[0], torch.cat([one.at(step)[0] for step in range(8, 16)]))


@given(
    extra=st.integers(0, 300),
    batch=st.integers(1, 9),
    context=st.integers(1, 12),
    max_tokens=st.integers(1, 200),
)
def test_heldout_batches(extra: int, batch: int, context: int, max_tokens: int) -> None:
    tokens = np.arange(context + 1 + extra, dtype=np.uint16)
    batches = list(heldout_batches(tokens, batch, context, max_tokens))
    inputs_NS, targets_NS = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert all(len(inputs_BS) == batch for inputs_BS, _ in batches[:-1])
    assert inputs_NS.dtype == targets_NS.dtype == torch.int64
    assert torch.equal(targets_NS, inputs_NS + 1)
    windows = (len(tokens) - 1) // context
    starts = inputs_NS[:, 0].numpy()
    assert len(starts) == min(windows, max(1, max_tokens // context))
    # Of the same grid, apart from each other, and evenly: neither gap nor end is a window longer than another.
    assert not (starts % context).any()
    gaps = np.diff([*(starts // context), windows])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
    assert torch.equal(inputs_NS, torch.cat([i for i, _ in heldout_batches(tokens, batch + 1, context, max_tokens)]))
