"""Scores of files: the loss by hand, bits by text and not by token, blocks, and two models paired."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import moe, tiny_data
from hypothesis import given
from hypothesis import strategies as st

from handful.errors import ConfigError
from handful.model import Decoder
from handful.positions import KVCache
from handful.scores import BLOCK, Difference, Scored, difference, score, together


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    data = tiny_data(tmp_path_factory.mktemp("scores"))
    torch.manual_seed(0)
    made = Decoder(moe(vocab=data.tokenizer.vocab_size)).eval()
    made.tokenizer = data.tokenizer
    return made


LONG = ("the router of an expert chooses tokens ☃ " * 70).encode()  # 3 kB and more: several blocks and windows


def by_hand(model: Decoder, document: bytes, context: int) -> list[float]:
    """The nats of every target, window after window."""
    assert model.tokenizer is not None
    eos = model.tokenizer.eos_id
    first = model.tokenizer.prefix[0] if model.tokenizer.prefix else eos
    row = [first, *model.tokenizer.encode(document.decode()), eos]
    nats = []
    for start in range(0, len(row) - 1, context):
        window = row[start : start + context + 1]
        with torch.no_grad():
            logits, _ = model(torch.tensor([window[:-1]]))
        logp = logits[0].float().log_softmax(-1)
        nats += [-float(logp[i, token]) for i, token in enumerate(window[1:])]
    return nats


@pytest.mark.parametrize(("context", "begin"), [(7, None), (32, None), (7, 258)])
def test_the_loss_by_hand(model: Decoder, context: int, begin: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a tokenizer that begins every text with a token of its own."""
    if begin is not None:
        monkeypatch.setattr(model.tokenizer, "prefix", (begin,))
    documents = [LONG, b"naive ==", "☃".encode(), LONG[:500]]
    expected = [by_hand(model, document, context) for document in documents]
    found = score(model, documents, context=context)
    nats = sum(map(sum, expected))
    assert (found.tokens, found.bytes) == (sum(map(len, expected)), sum(map(len, documents)))
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.loss == pytest.approx(nats / found.tokens, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.bytes, rel=1e-5)
    # Blocks of 1024 bytes, document after document.
    first = -(-len(LONG) // BLOCK)
    assert len(found.blocks) == first + 3
    assert sum(found.blocks[:first]) == pytest.approx(sum(expected[0]), rel=1e-5)
    assert found.blocks[first : first + 2] == pytest.approx([sum(expected[1]), sum(expected[2])], rel=1e-5)
    assert together([score(model, [each], context=context) for each in documents]).blocks == pytest.approx(
        found.blocks, rel=1e-5
    )


@pytest.mark.parametrize("context", [7, 32])
def test_keys_and_values_in_8_bits(model: Decoder, context: int) -> None:
    """The loss of attention on rounded numbers, not that on whole ones."""
    assert model.tokenizer is not None
    found = score(model, [LONG], context=context, kv_cache_dtype="int8")
    eos, nats = model.tokenizer.eos_id, 0.0
    first = model.tokenizer.prefix[0] if model.tokenizer.prefix else eos
    row = [first, *model.tokenizer.encode(LONG.decode()), eos]
    for start in range(0, len(row) - 1, context):
        window = torch.tensor([row[start : start + context + 1]])
        with torch.no_grad():
            cache = KVCache(model.config, 1, context, dtype=torch.int8)
            parts = [model(part, cache)[0] for part in window[:, :-1].split(3, dim=1)]
        nats -= float(torch.cat(parts, dim=1).log_softmax(-1).gather(2, window[:, 1:, None]).sum())
    assert found.nats == pytest.approx(nats, rel=1e-4)
    assert 1e-7 < abs(found.loss - score(model, [LONG], context=context).loss) < 1e-2


def test_a_token_counts_where_it_begins(model: Decoder) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(LONG.decode())
    assert b"".join(tokenizer.token_bytes(token) for token in ids) == LONG
    at, expected = 0, [0.0] * (-(-len(LONG) // BLOCK))
    for nats, token in zip(by_hand(model, LONG, 32), [*ids, tokenizer.eos_id], strict=True):
        expected[min(at, len(LONG) - 1) // BLOCK] += nats
        at += len(tokenizer.token_bytes(token, special=False))
    assert score(model, [LONG], context=32).blocks == pytest.approx(expected, rel=1e-5)


def test_no_text_is_no_loss(model: Decoder) -> None:
    found = score(model, [], context=8)
    assert (found, found.loss, found.bits_per_byte) == (Scored(0, 0, ()), 0.0, 0.0)


def test_what_cannot_be_scored(model: Decoder) -> None:
    for context in (0, 33):
        with pytest.raises(ConfigError, match=rf"^context = {context}: from 1 to 32, the model's$"):
            score(model, [LONG], context=context)
    without = Decoder(model.config)
    with pytest.raises(ConfigError, match=r"it has no tokenizer\.json"):
        score(without, [LONG], context=8)


def test_progress_and_mode(model: Decoder) -> None:
    seen: list[tuple[int, int]] = []
    model.train()
    score(model, [b"one", b"two"], context=8, progress=lambda *at: seen.append(at))
    assert model.training
    model.eval()
    assert seen[-1][0] == seen[-1][1]


def of(*nats: float, size: int = BLOCK) -> Scored:
    return Scored(tokens=10, bytes=size * len(nats), blocks=nats)


def test_a_difference_by_hand() -> None:
    """Three blocks of 1024 bytes in which one model needs 8, 10 and 12 bits more."""
    bit = math.log(2)
    found = difference(of(108 * bit, 110 * bit, 112 * bit), of(100 * bit, 100 * bit, 100 * bit), [3 * BLOCK])
    assert found.bits_per_byte == pytest.approx(30 / 3072)
    # Deviations of -2, 0 and 2 bits from 10: sqrt(8 · 3/2) bits, over all bytes.
    assert found.error == pytest.approx(math.sqrt(12) / 3072)
    # The blocks' own spread is no part of it.
    again = difference(of(1008 * bit, 10 * bit, 512 * bit), of(1000 * bit, 0.0, 500 * bit), [3 * BLOCK])
    assert again.bits_per_byte == pytest.approx(found.bits_per_byte)
    assert again.error == pytest.approx(found.error)
    assert difference(of(2.0), of(1.0), [BLOCK]).error is None
    assert difference(Scored(0, 0, ()), Scored(0, 0, ()), []) == Difference(0.0, None)


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_blocks_of_documents_of_any_size(sizes: list[int], draw: Any) -> None:
    count = sum(-(-size // BLOCK) for size in sizes)
    ours = Scored(1, sum(sizes), tuple(draw.random() for _ in range(count)))
    theirs = dataclasses.replace(ours, blocks=tuple(draw.random() for _ in range(count)))
    found, back = difference(ours, theirs, sizes), difference(theirs, ours, sizes)
    assert found.bits_per_byte == pytest.approx(-back.bits_per_byte)
    assert found.bits_per_byte == pytest.approx(ours.bits_per_byte - theirs.bits_per_byte)
    assert found.error == pytest.approx(back.error)


def test_the_error_is_what_blocks_drawn_anew_differ_by() -> None:
    draw = torch.Generator().manual_seed(0)
    gaps, errors = [], []
    for _ in range(400):
        base, noise = (torch.randn(40, generator=draw) for _ in range(2))
        ours, theirs = (1000 + 300 * base + 5 * noise + 2).tolist(), (1000 + 300 * base).tolist()
        found = difference(of(*ours), of(*theirs), [40 * BLOCK])
        assert found.error is not None
        gaps.append(found.bits_per_byte)
        errors.append(found.error)
    assert float(torch.tensor(gaps).std()) == pytest.approx(sum(errors) / len(errors), rel=0.15)


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    from handful.documents import heldout_of, read_files, split_documents

    (tmp_path / "a.txt").write_text("one " * 100)
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    (tmp_path / "c.txt").write_text(" ")
    name, files, skipped = read_files(str(tmp_path))
    assert files == [(str(tmp_path / "a.txt"), [b"one " * 100]), (str(tmp_path / "b.jsonl"), [b"two", b"three"])]
    assert skipped == {"empty": 1}
    ((held, documents),) = heldout_of(str(tmp_path))
    assert held == f"held out of {name}"
    assert documents == split_documents([b"one " * 100, b"two", b"three"])[1]
