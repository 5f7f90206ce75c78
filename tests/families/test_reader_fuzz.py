"""Whatever stands in the files of a checkpoint, reading gives tensors or one CheckpointError: no other exception, no
crash, no memory or time beyond what the files themselves are worth.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from builders import moe
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as library_load

from handful.checkpoint import INDEX, read_json, read_tensors, write_file
from handful.errors import CheckpointError, ConfigError
from handful.families.io import find_config, load, save
from handful.model import Decoder
from handful.safetensors_file import DTYPES, HEADER_LIMIT

A = torch.arange(6, dtype=torch.float32).reshape(2, 3)
B = torch.ones(4, dtype=torch.bfloat16)
quick = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assemble(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of that header, as JSON or as the bytes that it is, and that data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: Any = "F32", shape: Any = (2,), at: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": at}


def said(call: Callable[[], object], *, limit: int = 1000) -> str:
    """What is said against a checkpoint, "" for nothing. It is one line."""
    try:
        call()
    except (CheckpointError, ConfigError) as error:
        text = str(error)
    else:
        return ""
    assert text.isprintable()
    assert len(text) < limit
    return text


def read(file: Path) -> str:
    """Read every tensor of a file; what is said against it names the file."""

    def every() -> None:
        found = read_tensors(file)
        for name in found:
            assert found[name].shape == found.shape(name)

    text = said(every)
    assert not text or file.name in text
    return text


# ---------------------------------------------------------------------------------------------------------------------
# One file.


@quick
@given(st.data())
def test_truncated_anywhere_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "model.safetensors"
    write_file(file, {"a": A, "b": B})
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert "truncated or malformed" in read(file)
    file.write_bytes(whole + b"\0" * data.draw(st.integers(1, 9)))
    assert "truncated or malformed" in read(file)


@quick
@given(st.data())
def test_changed_bytes_are_refused_or_change_no_more_than_they_say(tmp_path: Path, data: st.DataObject) -> None:
    """What we take, the library takes too, as the same tensors."""
    file = tmp_path / "model.safetensors"
    write_file(file, {"a": A, "b": B})
    content = bytearray(file.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    if not read(file):
        ours, theirs = read_tensors(file), library_load(bytes(content))
        assert set(ours) == set(theirs)
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            assert ours[name].view(-1).view(torch.uint8).equal(theirs[name].view(-1).view(torch.uint8))


COUNTS: st.SearchStrategy[Any] = st.sampled_from(
    [-1, 0, 1, 2, 3, 8, 2**31, 2**32, 2**62, 2**63, 2**64, 10**400, 1.0, True, None, "2", []]
)


@quick
@given(
    st.dictionaries(
        st.one_of(st.sampled_from(["a", "b", "__metadata__", ""]), st.text(max_size=3)),
        st.one_of(
            st.fixed_dictionaries(
                {},
                optional={
                    "dtype": st.one_of(st.sampled_from(["F32", "BF16", "U8", "F4", "f32", ""]), COUNTS),
                    "shape": st.one_of(st.lists(COUNTS, max_size=4), COUNTS),
                    "data_offsets": st.one_of(st.lists(COUNTS, max_size=3), COUNTS),
                    "more": COUNTS,
                },
            ),
            COUNTS,
        ),
        max_size=3,
    ),
    st.integers(0, 12),
)
@example({"a": tensor(shape=[0, 2**40], at=(0, 0))}, 0)
@example({"a": tensor(shape=[2**32, 2**32], at=(0, 0))}, 0)  # 2^64 elements: none, to a machine that overflows
def test_any_header(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    content = assemble(header, b"\1" * size)
    (tmp_path / "any.safetensors").write_bytes(content)
    if not read(tmp_path / "any.safetensors") and "__metadata__" not in header:
        assert set(library_load(content)) == set(header)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\0" * 7, "a header of 0 bytes in a file of 7"),
        (assemble({}, length=2**64 - 1), "a header of 18446744073709551615 bytes in a file of 10"),
        (assemble(b"[]"), "its header is no JSON object"),
        (assemble(b"\xff\xfe{\0}\0"), "its header is not JSON: 'utf-8' codec"),
        (assemble(b"[" * 100_000), "its header is not JSON: maximum recursion depth"),
        (assemble(b'{"a":' * 100_000), "its header is not JSON: maximum recursion depth"),
        (assemble(b'{"a": 1' + b"0" * 5000 + b"}"), "its header is not JSON: Exceeds the limit"),
        (assemble(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "its header is not JSON: two entries named 'dtype'"),
        (assemble(b'{"a": 1, "b": 2, "a": 1}'), "its header is not JSON: two entries named 'a'"),
        (assemble({"a": 5}), "'a' is not described"),
        (assemble({"__metadata__": 5}), "its __metadata__ is no JSON object"),
        (assemble({"a": tensor("F4")}, b"\0" * 8), "'a' has dtype 'F4': one of F64, F32"),
        (assemble({"a": tensor(["F32"])}, b"\0" * 8), r"'a' has dtype ['F32']: one of"),
        (assemble({"a": tensor(shape=[-2])}, b"\0" * 8), "'a' has shape [-2]"),
        (assemble({"a": tensor(shape=[2.0])}, b"\0" * 8), "'a' has shape [2.0]"),
        (assemble({"a": tensor(shape=[True, 2])}, b"\0" * 8), "'a' has shape [True, 2]"),
        (assemble({"a": tensor(shape="2")}, b"\0" * 8), "'a' has shape '2'"),
        (assemble({"a": tensor(shape=[2**31, 2**31])}, b"\0" * 8), "'a' has shape [2147483648, 2147483648]"),
        (assemble({"a": tensor(shape=[1] * 100)}, b"\0" * 8), "'a' has shape [1, 1, 1, "),
        (assemble({"a": tensor(shape=[0, 2**59, 4], at=(0, 0))}), "'a' has shape [0, 576460752303423488, 4]"),
        (assemble({"a": tensor(shape=[3])}, b"\0" * 8), "'a' is F32 [3] in 8 bytes"),
        (assemble({"a": tensor(at=(8, 0))}, b"\0" * 8), "'a' has data_offsets [8, 0] in 8 bytes"),
        (assemble({"a": tensor(at=(-8, 0))}, b"\0" * 8), "'a' has data_offsets [-8, 0] in 8 bytes"),
        (assemble({"a": tensor(at=(4, 12))}, b"\0" * 8), "'a' has data_offsets [4, 12] in 8 bytes"),
        (assemble({"a": tensor(at=(0, 8, 8))}, b"\0" * 8), "'a' has data_offsets [0, 8, 8] in 8 bytes"),
        (assemble({"a": tensor(), "b": tensor()}, b"\0" * 8), "'b' begins at byte 0 of the tensors, where 8 is next"),
        (assemble({"a": tensor(), "b": tensor(at=(4, 12))}, b"\0" * 12), "'b' begins at byte 4"),
        (assemble({"a": tensor(at=(8, 16))}, b"\0" * 16), "'a' begins at byte 8 of the tensors, where 0 is next"),
        (assemble({"a": tensor()}, b"\0" * 9), "its tensors have 8 bytes, and the file 9"),
        (assemble({"a" * 10**6: 5}), f"'{'a' * 199}… is not described"),
        (assemble(b'{"\\ud800\\n": 5}'), r"'\ud800\n' is not described"),
    ],
)  # fmt: skip
def test_hostile_headers(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "hostile.safetensors").write_bytes(content)
    assert f"hostile.safetensors: truncated or malformed: {reason}" in read(tmp_path / "hostile.safetensors")


def test_tensors_in_any_order_of_the_header(tmp_path: Path) -> None:
    header = {"b": tensor(at=(8, 16)), "none": tensor(shape=[0], at=(8, 8)), "a": tensor(at=(0, 8)), "__metadata__": {}}
    (tmp_path / "m.safetensors").write_bytes(assemble(header, struct.pack("<4f", 1, 2, 3, 4)))
    assert {name: t.tolist() for name, t in read_tensors(tmp_path / "m.safetensors").items()} == {
        "a": [1, 2], "b": [3, 4], "none": []
    }  # fmt: skip


def test_every_dtype_of_ours_is_the_librarys(tmp_path: Path) -> None:
    for name, dtype in DTYPES.items() - {("F8_E8M0", torch.float8_e8m0fnu)}:  # which it cannot load yet
        content = assemble({"a": tensor(name, [2], (0, 2 * dtype.itemsize))}, b"\1" * 2 * dtype.itemsize)
        (tmp_path / "m.safetensors").write_bytes(content)
        assert read_tensors(tmp_path / "m.safetensors")["a"].dtype == library_load(content)["a"].dtype == dtype


# ---------------------------------------------------------------------------------------------------------------------
# Bombs: in a process that may not have much memory.

CHILD = """
import resource, sys, time
from handful.checkpoint import read_tensors
from handful.errors import CheckpointError
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[2]), held + int(sys.argv[2])))
began = time.process_time()
try:
    print(len(read_tensors(sys.argv[1])))
except CheckpointError as error:
    print(error)
assert time.process_time() - began < 20
"""


def bombed(path: Path, memory: int) -> str:
    run = fresh.python("-c", CHILD, path, str(memory))
    assert run.returncode == 0, run.stderr[-500:]
    assert run.stdout.count("\n") == 1
    return run.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_headers_that_would_fill_the_memory(tmp_path: Path) -> None:
    file = tmp_path / "bomb.safetensors"
    # A file with holes, which says that it is all header.
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", 10**12 - 8))
        out.truncate(10**12)
    assert f"a header of 999999999992 bytes: at most {HEADER_LIMIT}" in bombed(file, 100 << 20)
    # As dense as JSON can be, and as long as we let it be.
    file.write_bytes(assemble(b'{"a":[' + b"[]," * (HEADER_LIMIT // 3 - 10) + b"[]]}"))
    assert "'a' is not described" in bombed(file, 1 << 30)
    # A tensor of a terabyte in such a file is only read if somebody asks for it.
    with open(file, "wb") as out:
        out.write(assemble({"a": tensor("U8", [10**12], (0, 10**12))}))
        out.truncate(out.tell() + 10**12)
    assert bombed(file, 100 << 20) == "1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_an_index_that_would_fill_the_memory(tmp_path: Path) -> None:
    with open(tmp_path / INDEX, "wb") as out:
        out.write(b'{"weight_map": {')
        out.truncate(10**12)
    assert "model.safetensors.index.json: longer than" in bombed(tmp_path, 200 << 20)


def test_many_tensors(tmp_path: Path) -> None:
    """As many as the largest public model has; each is checked, and none is read."""
    entry = ',"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = "".join(entry % i for i in range(50_000)).replace(",", "{", 1) + "}"
    (tmp_path / "many.safetensors").write_bytes(assemble(header.encode()))
    began = time.process_time()
    assert len(read_tensors(tmp_path / "many.safetensors")) == 50_000
    assert time.process_time() - began < 20


# ---------------------------------------------------------------------------------------------------------------------
# The index and the config.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(Decoder(moe()), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/model.safetensors", "a/model.safetensors", "..", "", "model.bin", 5, None,
     ["model.safetensors"], "\0.safetensors", "x" * 300 + ".safetensors", "none.safetensors", "\ud800.safetensors"],
)  # fmt: skip
def test_an_index_names_files_beside_it(saved: Path, shard: Any) -> None:
    (saved / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    assert said(lambda: load(saved))


def test_a_shard_may_be_a_link_and_not_a_folder_or_a_pipe(saved: Path, tmp_path: Path) -> None:
    """As in the cache of huggingface_hub, where all files are links."""
    (saved / "model.safetensors").rename(tmp_path / "blob")
    (saved / "model.safetensors").symlink_to(tmp_path / "blob")
    assert load(saved).config == moe()
    for target in (tmp_path, Path("/dev/zero"), saved / "model.safetensors"):
        (saved / "model.safetensors").unlink()
        (saved / "model.safetensors").symlink_to(target)
        assert said(lambda: load(saved))


@settings(quick, max_examples=50)
@given(st.recursive(st.one_of(COUNTS, st.text(max_size=3)), lambda inner: st.dictionaries(st.text(max_size=3), inner)))
def test_any_index(tmp_path: Path, index: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path)


def test_json_of_any_depth(tmp_path: Path) -> None:
    for text in ("[" * 10**5, '{"a":' * 10**5, '{"a": ' + "[" * 900 + "]" * 900 + "}"):
        (tmp_path / "deep.json").write_text(text)
        text = said(lambda: read_json(tmp_path / "deep.json"))
        assert "not JSON" in text or len(text) == 0


def numbers(values: dict[str, Any], at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where a config.json has a whole number."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += numbers(value, (*at, key))
        elif type(value) is int or value is None:
            found.append((*at, key))
    return found


@pytest.mark.parametrize("router", [{}, {"noisy_top_k": True}], ids=["public", "ours"])
@pytest.mark.parametrize("bad", [10**5, 10**9, 10**18, 10**30, 10**400, -1])
def test_sizes_that_no_file_has(tmp_path: Path, router: dict[str, Any], bad: int) -> None:
    """In no time and no memory, because nothing is made of them before they are compared."""
    folder = tmp_path / "saved"
    save(Decoder(moe(router)), folder)
    whole = (folder / "config.json").read_text()
    places = numbers(json.loads(whole))
    assert len(places) > 10
    refused = 0
    for place in places:
        values = json.loads(whole)
        *outer, key = place
        table = values
        for name in outer:
            table = table[name]
        table[key] = bad
        (folder / "config.json").write_text(json.dumps(values))
        began = time.process_time()
        refused += said(lambda: load(folder), limit=1500) != ""
        assert time.process_time() - began < 5, place
    assert refused > 6  # token ids and the context may be anything


def test_a_billion_layers_are_refused_before_they_are_counted(saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 10**9}))
    for reader in (load, find_config):
        with pytest.raises(CheckpointError, match=r"config\.json: num_hidden_layers = 1000000000: at most 10000$"):
            reader(saved)
    (saved / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 9999}))
    with pytest.raises(CheckpointError, match=r"config\.json: 9999 layers: the checkpoint has \d+ tensors$"):
        load(saved)


def test_a_billion_experts_are_refused_by_the_first_that_is_missing(saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(values | {"num_experts": 10**9}))
    with pytest.raises(
        CheckpointError, match=r"tensor 'model\.layers\.0\.mlp\.experts\.4\.gate_proj\.weight' is missing"
    ):
        load(saved)
