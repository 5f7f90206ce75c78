"""No code of an instruction level runs below it: what is compiled, what is chosen, and what modules remember of it."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch

from handful.config import ModelConfig, RouterConfig
from handful.errors import HandfulError
from handful.experts.quantize_model import quantize_model
from handful.kernels.extension import available, levels
from handful.machine import CPUINFO_FLAGS, _native_library, native_error
from handful.model import Decoder
from handful.quantize import BLOCK, GRID, PIECE

pytestmark = pytest.mark.skipif(not available(), reason=f"no kernels: {native_error()}")

CSRC = Path(__file__).parents[2] / "csrc"

# Files of one level each. Beside them only bandwidth.cpp may hold instructions beyond the baseline, by functions of its
# own with a target each.
LEVELS = sorted([*CSRC.glob("gemm_*.cpp"), *CSRC.glob("gemv_*.cpp")])
LEVEL_FILES = {path.name for path in LEVELS} | {"bandwidth.cpp"}
# First bytes of instructions of AVX and later, in 64-bit code: VEX and EVEX. Before them only a segment or an address
# size may stand.
VEX, EVEX, BEFORE = {"c4", "c5"}, {"62"}, {"2e", "36", "3e", "26", "64", "65", "67"}


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"}).stdout


def symbols(library: Path) -> dict[int, list[tuple[str, str, str]]]:
    """The functions of a library: at each address names with their binding, and of local ones the file."""
    found: dict[int, list[tuple[str, str, str]]] = {}
    file = ""
    for line in run("readelf", "-sW", str(library)).splitlines():
        fields = line.split()
        if len(fields) < 8 or not fields[0].removesuffix(":").isdigit():
            continue
        address, kind, binding, name = int(fields[1], 16), fields[3], fields[4], fields[7]
        if kind == "FILE":
            file = name
        elif kind == "FUNC":
            found.setdefault(address, []).append((name, binding, file if binding == "LOCAL" else ""))
    return found


def encodings(library: Path) -> dict[int, set[str]]:
    """At each function's address the first bytes, prefixes aside, of its instructions of AVX and later."""
    found: dict[int, set[str]] = {}
    address = 0
    for line in run("objdump", "-dw", str(library)).splitlines():
        if label := re.fullmatch(r"([0-9a-f]+) <.+>:", line):
            address = int(label[1], 16)
        elif "\t" in line:
            first = next(itertools.dropwhile(BEFORE.__contains__, line.split("\t")[1].split()), "")
            if first in VEX | EVEX:
                found.setdefault(address, set()).add(first)
    return found


def misplaced(library: Path) -> tuple[list[str], set[str]]:
    """Functions with a level's instructions that anybody may run, and the files that have such instructions."""
    known = symbols(library)
    wrong, files = [], set()
    for address, firsts in encodings(library).items():
        for name, binding, file in known.get(address, [("?", "unknown", "")]):
            files.add(file)
            if binding != "LOCAL" or file not in LEVEL_FILES or name.startswith("_GLOBAL__sub_I"):
                wrong.append(f"{name} ({binding}, {file or 'of no file'})")
            elif file.startswith(("gemm_avx2", "gemv_avx2", "gemm_avx_vnni", "gemv_avx_vnni")) and firsts & EVEX:
                wrong.append(f"{name}: AVX-512 in {file}")
    return wrong, files


def test_instructions_of_a_level_are_in_local_functions_of_its_file() -> None:
    """A function that the linker may give to another file, or a table's constructor, would run on every CPU."""
    library = _native_library()
    assert library is not None
    wrong, files = misplaced(library)
    assert not wrong
    assert files == LEVEL_FILES  # all of them were looked at


@pytest.mark.parametrize("file", LEVELS, ids=lambda file: file.name)
def test_a_level_needs_what_it_is_compiled_for(file: Path) -> None:
    text = file.read_text()
    compiled = re.search(r'BEGIN_LEVEL\("(.*)"\)', text)
    needs = re.search(r"constexpr uint32_t kNeeds = (.*);", text)
    assert compiled
    assert needs
    features = [re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", word[1:]).lower() for word in needs[1].split(" | ")]
    spelled = {flag.replace("_", "") for name in features for flag in CPUINFO_FLAGS[name]}
    assert {word.replace("-", "") for word in compiled[1].split(",")} == spelled


def feature_sets() -> list[tuple[str, ...]]:
    return [
        tuple(chosen)
        for count in range(len(CPUINFO_FLAGS) + 1)
        for chosen in itertools.combinations(CPUINFO_FLAGS, count)
    ]


def test_every_set_of_features_is_given_what_it_covers() -> None:
    """Also sets that no CPU has: a hypervisor may hide any of them."""
    uses = {"float32", "bfloat16", "codes", "exact codes", "few tokens"}
    for features in feature_sets():
        if "avx2" not in features:
            with pytest.raises(HandfulError, match="no kernels for this CPU"):
                levels(features)
            continue
        chosen = levels(features)
        assert set(chosen) == uses
        for use, level in chosen.items():
            assert level.needs <= set(features), (use, level, features)
    best = levels(CPUINFO_FLAGS)
    assert {use: level.name for use, level in best.items()} == {
        "float32": "AVX-512", "bfloat16": "AMX", "codes": "AMX", "exact codes": "AMX",
        "few tokens": "AVX-512 VNNI and BF16",
    }  # fmt: skip


def test_codes_meet_bytes_at_every_level() -> None:
    """The best way to multiply codes that the features have, few tokens and many."""
    for features, codes, few in (
        (["avx2"], "AVX2", "AVX2"),
        (["avx2", "avx_vnni"], "AVX-VNNI", "AVX-VNNI"),
        (["avx2", "avx512"], "AVX-512", "AVX-512"),
        (["avx2", "avx_vnni", "avx512"], "AVX-512", "AVX-512"),
        (["avx2", "avx512", "avx512_vnni"], "AVX-512 VNNI", "AVX-512 VNNI"),
        (["avx2", "avx512", "avx512_vnni", "amx_int8"], "AMX", "AVX-512 VNNI"),
    ):
        chosen = levels(features)
        assert (chosen["codes"].name, chosen["few tokens"].name) == (codes, few), features


def test_the_extension_says_its_limits() -> None:
    """A line each; those of codes are the format's, which Python packs."""
    limits = dict(line.split(": ") for line in torch.ops.handful.limits().splitlines())
    assert {name: int(value) for name, value in limits.items()} == {
        "panel": 32, "gemv_max_tokens": 8, "gemv_max_tokens_packed": 16, "gemv_max_call": 256,
        "code_piece": PIECE, "code_block": BLOCK, "code_grid": GRID,
    }  # fmt: skip


def test_a_direct_call_without_kernels_is_an_error() -> None:
    """And no illegal instruction: whoever calls the operations does not ask before."""
    code = """
import torch
from handful.machine import native_error
assert "HANDFUL_ISA" in native_error()
x = torch.randn(3, 8)
for call in (
    lambda: torch.ops.handful.rms_norm(x, torch.ones(8), 1e-6),
    lambda: torch.ops.handful.largest(x[0]),
    lambda: torch.ops.handful.linears(x, [torch.randn(4, 8)], [], [], 0, 0),
    lambda: torch.ops.handful.experts(x, torch.zeros(3, 1).long(), torch.ones(3, 1), None, torch.randn(2, 8, 8),
                                      torch.randn(2, 8, 4), None, None, "swiglu", False),
):
    try:
        call()
    except RuntimeError as error:
        print(str(error).splitlines()[0])
"""
    done = run_python(code, HANDFUL_ISA="none")
    lines = done.splitlines()
    assert len(lines) >= 3
    assert all("no kernels for this CPU" in line for line in lines)


def run_python(code: str, **environment: str) -> str:
    done = fresh.python("-c", code, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def small(form: str) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab=50, width=32, layers=1, heads=2, ffn=0, context=16, expert_width=32, shared_width=32,
        router=RouterConfig(experts=4, top_k=2),
    )  # fmt: skip
    model = Decoder(config).eval()
    if form != "float32":
        quantize_model(model, bits=int(form[3:]))
    return model


@pytest.mark.parametrize("form", ["float32", "int4"])
def test_a_pickled_model_asks_the_process_that_it_comes_to(form: str, tmp_path: Path) -> None:
    """With kernels, and where there are none: a module holds no answer of the computer that it was made on."""
    model = small(form)
    tokens_BS = torch.arange(6)[None]
    with torch.inference_mode():
        want: Any = model(tokens_BS)[0]
    torch.save(model, tmp_path / "model.pt")
    torch.save(want, tmp_path / "want.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
with torch.inference_mode():
    got = model(torch.arange(6)[None])[0]
    one = model(torch.arange(1)[None])[0]
want = torch.load({str(tmp_path / "want.pt")!r})
print(float((got - want).norm() / want.norm()))
"""
    for isa in ("", "none"):
        assert float(run_python(code, HANDFUL_ISA=isa)) < (2e-2 if form == "int4" else 1e-5)


def test_no_module_keeps_an_answer_about_this_computer() -> None:
    for module in small("float32").modules():
        assert not [name for name in vars(module) if "native" in name]
