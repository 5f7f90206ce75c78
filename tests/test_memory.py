"""A model in less memory than it needs gives the same bits; its pack is its own; memory is what was granted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fresh
import pytest
import tokenizers
import torch
from builders import SWITCH, dense, logits_of, moe
from torch import Tensor

import handful
from handful import memory
from handful.config import ModelConfig
from handful.encoder_decoder import EncoderDecoder
from handful.errors import CheckpointError, ConfigError, DataError
from handful.experts.expert_file import PackFile
from handful.experts.offload import OffloadedExperts
from handful.experts.quantized import QuantizedLinear
from handful.families.io import save
from handful.lazy_tensors import Entry
from handful.model import Decoder

F32, BF16 = torch.float32, torch.bfloat16
CONFIG = moe({"experts": 16, "top_k": 3}, layers=3, width=32, expert_width=24)


def made(folder: Path, config: ModelConfig = CONFIG, seed: int = 0, dtype: torch.dtype = F32) -> Path:
    """A checkpoint folder of a model with random weights."""
    torch.manual_seed(seed)
    save(Decoder(config).to(dtype), folder)
    return folder


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


def budget(folder: Path, slots: int, **kwargs: Any) -> int:
    """Bytes for a model and so many of its experts."""
    model, store = memory.load(folder, 1 << 40, **kwargs)
    with store:
        return memory.resident_bytes(model) + slots * store.layout.record_bytes


# ---------------------------------------------------------------------------------------------------------------------
# The same bits.


@pytest.mark.parametrize(
    ("dtype", "kwargs"),
    [
        (F32, {}),
        (BF16, {}),
        (F32, {"dtype": BF16}),
        (F32, {"quantize": 8}),
        (BF16, {"quantize": 4, "group": 128}),
        (F32, {"quantize": 4, "dtype": BF16}),
    ],
)
def test_a_budget_changes_no_bit(tmp_path: Path, dtype: torch.dtype, kwargs: dict[str, Any]) -> None:
    folder = made(tmp_path / "model", dtype=dtype)
    right = logits_of(handful.load(folder, **kwargs))
    for slots, read_ahead in ((3, True), (10, True), (10, False), (30, True), (48, True)):
        granted = budget(folder, slots, **kwargs)
        model, store = memory.load(folder, granted, read_ahead=read_ahead, **kwargs)
        with store:
            assert store.slots == slots
            assert not model.training
            assert equal(logits_of(model), right)
            assert store.stats().total("misses") >= min(36, slots)
    linear = model.get_submodule("layers.0.attn.q")
    assert isinstance(linear, QuantizedLinear) == ("quantize" in kwargs)


def test_attach_and_load_agree_and_guess(tmp_path: Path) -> None:
    folder = made(tmp_path / "model")
    model = handful.load(folder)
    assert isinstance(model, Decoder)
    right = logits_of(model)
    memory.pack(model, tmp_path / "own.pack")
    size = PackFile(tmp_path / "own.pack").layout.record_bytes
    held = memory.resident_bytes(model)
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    assert held == sum(p.nbytes for p in model.parameters()) - experts
    granted = held + 20 * size + size // 2
    with memory.attach(model, tmp_path / "own.pack", granted, read_ahead=True) as store:
        assert store.slots == 20
        assert memory.resident_bytes(model) == held == sum(p.nbytes for p in model.parameters())
        assert not any(".experts." in name for name in model.state_dict())
        assert equal(logits_of(model), right)
        stats = store.stats()
        assert list(stats.layers) == [f"layers.{i}.ffn.experts" for i in range(3)]
        assert 0 < stats.total("ahead") <= stats.guesses
        # A prompt of 14 tokens and six tokens, each with three experts in each of three layers.
        uses = stats.total("hits") + stats.total("misses")
        assert 6 * 9 + 9 <= uses <= 6 * 9 + 48
        assert 0 < stats.hit_rate < 1
        assert stats.total("bytes_read") >= stats.total("misses") * size


def test_a_tied_model_of_another_dtype_takes_the_same_pack(tmp_path: Path) -> None:
    folder = made(tmp_path / "model", moe({"experts": 4, "top_k": 2}, tied=True))
    memory.pack(folder, tmp_path / "e.pack", dtype=BF16)
    model = handful.load(folder, dtype=BF16)
    right = logits_of(model)
    with memory.attach(model, tmp_path / "e.pack", memory.resident_bytes(model) + 10**6):
        assert equal(logits_of(model), right)


def test_an_encoder_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save(EncoderDecoder(SWITCH), tmp_path / "model")
    inputs, outputs = torch.randint(2, 13, (2, 7)), torch.randint(2, 13, (2, 5))
    model, store = memory.load(tmp_path / "model", 1 << 30)
    granted = memory.resident_bytes(model) + 3 * store.layout.record_bytes
    store.close()
    whole = handful.load(tmp_path / "model")
    model, store = memory.load(tmp_path / "model", granted)
    with torch.no_grad(), store:
        assert store.slots == 3
        assert model(inputs, outputs)[0].equal(whole(inputs, outputs)[0])


def test_a_tokenizer_is_taken_as_load_takes_it(tmp_path: Path) -> None:
    """One that cannot write every text, such as T5's, is an encoder-decoder's, and no decoder's; none is none."""
    inner = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("\u2581words", -1.0)], 0))
    inner.pre_tokenizer, inner.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    save(EncoderDecoder(SWITCH), tmp_path / "both")
    made(tmp_path / "decoder")
    model, store = memory.load(tmp_path / "both", 1 << 30)
    store.close()
    assert model.tokenizer is None
    for name in ("both", "decoder"):
        inner.save(str(tmp_path / name / "tokenizer.json"))
    model, store = memory.load(tmp_path / "both", 1 << 30)
    with store:
        assert model.tokenizer is not None
        assert model.tokenizer.decode(model.tokenizer.encode("words words")) == "words words"
    for load in (handful.load, lambda folder: memory.load(folder, 1 << 30)):
        with pytest.raises(DataError, match="a byte-level or byte-fallback one is needed"):
            load(tmp_path / "decoder")
    assert not list((tmp_path / "decoder").glob("*.pack"))  # before hours of packing


# ---------------------------------------------------------------------------------------------------------------------
# Packs and models.


def test_a_pack_of_other_weights_is_refused_or_made_again(tmp_path: Path) -> None:
    folder, other = made(tmp_path / "model"), made(tmp_path / "other", seed=1)
    memory.pack(other, tmp_path / "other.pack")
    granted = budget(folder, 9)
    with pytest.raises(CheckpointError, match=r"other\.pack: holds the experts of other weights"):
        memory.attach(handful.load(folder), tmp_path / "other.pack", granted)
    right = logits_of(handful.load(folder))
    told: list[tuple[int, int]] = []
    for written in (True, False):
        told.clear()
        model, store = memory.load(
            folder, granted, file=tmp_path / "other.pack", progress=lambda *done: told.append(done)
        )
        with store:
            assert equal(logits_of(model), right)
        assert len(told) == (48 if written else 0)
    assert not written or told[-1][0] == told[-1][1]


@pytest.mark.parametrize(("matrix", "place"), [("gate_up", (0, 0, 0)), ("down", (15, 31, 23)), ("gate_up", (7, 40, 3))])
def test_one_changed_weight_of_any_expert_is_another_model(
    tmp_path: Path, matrix: str, place: tuple[int, int, int]
) -> None:
    """In memory, by every number; in a folder, by its files."""
    folder = made(tmp_path / "model")
    model = handful.load(folder)
    memory.pack(model, tmp_path / "e.pack")
    with memory.attach(handful.load(folder), tmp_path / "e.pack", 10**9):
        pass
    # What was packed from memory serves too.
    with memory.load(folder, 10**9, file=tmp_path / "e.pack")[1] as store:
        assert store.layout.files == ()
    memory.load(folder, 10**9)[1].close()
    with torch.no_grad():
        model.get_parameter(f"layers.1.ffn.experts.{matrix}")[place].mul_(1.01)
    with pytest.raises(CheckpointError, match="other weights"):
        memory.attach(model, tmp_path / "e.pack", 10**9)
    save(model, tmp_path / "new")
    for file in (tmp_path / "new").iterdir():  # in place, as a download of another revision does
        shutil.copy(file, folder / file.name)
    right = logits_of(handful.load(folder))
    for pack in (None, tmp_path / "e.pack"):
        stored, store = memory.load(folder, 10**9, file=pack)
        with store:
            assert equal(logits_of(stored), right)


def test_the_files_of_a_folder_tell_a_change_of_the_same_size_and_time(tmp_path: Path) -> None:
    """Headers are looked at beside sizes and times, which rsync may keep."""
    folder = made(tmp_path / "model")
    memory.load(folder, 10**9)[1].close()
    weights = folder / "model.safetensors"
    before = weights.stat()
    content = weights.read_bytes()
    assert content.count(b"layers.0.") == content.count(b"layers.1.")
    swapped = (
        content.replace(b"layers.0.", b"layers.@.")
        .replace(b"layers.1.", b"layers.0.")
        .replace(b"layers.@.", b"layers.1.")
    )
    weights.write_bytes(swapped)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    stored, store = memory.load(folder, 10**9)
    with store:
        assert equal(logits_of(stored), logits_of(handful.load(folder)))


RACE = """
import sys, handful, torch
from handful import memory
from builders import logits_of
torch.set_num_threads(1)
model, store = memory.load(sys.argv[1], 10**9)
with store:
    print(float(torch.stack([x.double().sum() for x in logits_of(model)]).sum()))
"""


def test_processes_that_pack_at_once(tmp_path: Path) -> None:
    """All of them get the model, one of them packs, and what a killed one left behind goes."""
    folder = made(tmp_path / "model", moe({"experts": 32, "top_k": 3}, layers=3, width=64, expert_width=64))
    (folder / ".new-experts-float32.pack-1-ab").write_bytes(b"x" * 1000)
    jobs = [fresh.Process("-c", RACE, folder) for _ in range(3)]
    ends = [job.wait() for job in jobs]
    assert [end.returncode for end in ends] == [0, 0, 0], ends
    assert len({end.stdout for end in ends}) == 1
    assert [file.name for file in folder.glob("*pack*")] == ["experts-float32.pack"]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs go to the user's cache, under a name of the folder's own."""
    monkeypatch.setenv("HANDFUL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    paths = []
    for name in ("a/model", "b/model"):
        folder = made(tmp_path / name)
        for _ in range(2):  # made, and found again
            with memory.load(folder, 10**9)[1] as store:
                paths.append(store.pack.path)
        assert not list(folder.glob("*.pack"))
    assert paths[0] == paths[1] != paths[2] == paths[3]
    assert all(path.is_relative_to(tmp_path / "cache" / "packs") for path in paths)


def test_a_pack_of_another_shape_or_format(tmp_path: Path) -> None:
    folder = made(tmp_path / "model")
    made(tmp_path / "small", moe({"experts": 4, "top_k": 2}))
    memory.pack(tmp_path / "small", tmp_path / "e.pack")
    has = r"e\.pack: holds 2 layers of 4 experts in float32: the model has 3 of 16 in float32"
    with pytest.raises(CheckpointError, match=has):
        memory.attach(handful.load(folder), tmp_path / "e.pack", 10**9)
    # A pack that was cut, of another version or of another format is made again.
    for spoil in (b"", b"HANDFUL\x00\x09", b"HANDF"):
        (tmp_path / "e.pack").write_bytes(spoil)
        with memory.load(folder, 10**9, file=tmp_path / "e.pack", quantize=8)[1] as store:
            assert store.layout.format == "int8/32"
    with memory.load(folder, 10**9, file=tmp_path / "e.pack")[1] as store:
        assert store.layout.format == "float32"
    with memory.load(folder, 10**9, quantize=4)[1] as store:
        assert store.pack.path == folder / "experts-int4-32.pack"


def test_models_that_cannot_be_packed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no experts that can be packed"):
        memory.pack(made(tmp_path / "dense", dense()), tmp_path / "e.pack")
    folder = made(tmp_path / "model")
    with pytest.raises(ConfigError, match="quantized already"):
        memory.pack(handful.load(folder, quantize=4), tmp_path / "e.pack")
    with pytest.raises(ConfigError, match="bits = 3"):
        memory.pack(folder, tmp_path / "e.pack", quantize=3)
    with pytest.raises(CheckpointError, match="no such folder"):
        memory.pack(tmp_path / "none", tmp_path / "e.pack")
    assert not (tmp_path / "e.pack").exists()


def test_too_little_memory_says_how_much_would_do(tmp_path: Path) -> None:
    folder = made(tmp_path / "model")
    least = budget(folder, 3)
    with pytest.raises(ConfigError, match=rf"memory = {least - 1:,} bytes: .* 3 experts .*: at least {least:,}"):
        memory.load(folder, least - 1)
    with memory.load(folder, least)[1] as store:
        assert store.slots == 3
    model = handful.load(folder)
    right = logits_of(model)
    with pytest.raises(ConfigError, match=f"at least {least:,}"):
        memory.attach(model, folder / "experts-float32.pack", least - 1)
    assert equal(logits_of(model), right)  # it is as it was


def test_packing_reads_one_expert_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "model")
    stacks: list[int | None] = []
    whole = Entry.read

    def spy(entry: Entry, part: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if len(entry.shape) == 3:
            stacks.append(part)
        return whole(entry, part, *args, **kwargs)

    monkeypatch.setattr(Entry, "read", spy)
    with memory.load(folder, 10**9)[1]:
        assert len(stacks) >= 2 * 48
        assert None not in stacks


def test_the_stored_model_says_what_it_is(tmp_path: Path) -> None:
    model, store = memory.load(made(tmp_path / "model"), 10**9, quantize=4)
    with store:
        experts = model.get_submodule("layers.1.ffn.experts")
        assert isinstance(experts, OffloadedExperts)
        assert "16 experts, int4/32, activation=swiglu" in repr(experts)


# ---------------------------------------------------------------------------------------------------------------------
# Memory, seen from outside.

# What a process needs beside weights: buffers of the kernels and of torch for these calls, threads, the pack's table.
CONSTANT = 16 << 20
CHILD = """
import sys, torch
from pathlib import Path
import handful
from handful import memory
from builders import logits_of
torch.set_num_threads(1)
def high():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
small, folder, granted = sys.argv[1], sys.argv[2], int(sys.argv[3])
logits_of(handful.load(small), 200)  # what torch and the kernels take once
before = high()
model, store = memory.load(folder, granted)
with store:
    held = memory.resident_bytes(model) + store.slots * store.layout.record_bytes
    logits_of(model, 200)
    print(high() - before, held, store.stats().total("bytes_read"))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    config = moe({"experts": 32, "top_k": 4}, layers=2, width=192, heads=4, expert_width=512)
    folder = made(tmp_path / "model", config)
    memory.pack(folder, folder / "experts-float32.pack")  # 75 MB
    granted = budget(folder, 16)
    assert granted < 22e6
    run = subprocess.run(
        [sys.executable, "-c", CHILD, made(tmp_path / "small"), folder, str(granted)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    assert run.returncode == 0, run.stderr
    grown, held, bytes_read = (float(word) for word in run.stdout.split())
    assert held <= granted
    assert bytes_read > 70e6  # the prompt needs every expert
    assert grown <= 1.05 * granted + CONSTANT
