"""A model is loaded and saved within its own memory and one tensor more; every layout of public experts is read as the
same numbers; what is packed while it is loaded is what would have been packed after.

Legend: B sequences · S tokens in one · V vocabulary · E experts · D model width · F an expert's hidden width
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import dense, moe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from handful import safetensors_file
from handful.checkpoint import read_json, read_tensors, write_file, write_folder
from handful.config import ModelConfig
from handful.errors import CheckpointError, ConfigError
from handful.experts.quantize_model import quantize_model
from handful.experts.quantized import PackedWeight
from handful.families import config_from_hf
from handful.families.io import load, save
from handful.model import Decoder
from handful.quantize import pack_mxfp4, unpack_mxfp4

transformers: Any = importlib.import_module("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

SIZES = {
    "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "num_local_experts": 4,
    "num_experts_per_tok": 2, "pad_token_id": None,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "granitemoe": {},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}


def theirs(family: str) -> Any:
    """A model of transformers' with weights that say something."""
    values = {**SIZES, **MODELS[family]}
    if family == "granitemoe":
        del values["head_dim"]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **values))
    for name, p in model.named_parameters():
        nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.2)
    return model.eval()


def logits(model: Any, tokens_BS: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(tokens_BS)
    found: Tensor = out[0] if isinstance(model, Decoder) else out.logits
    return found


def close(a: Tensor, b: Tensor, bound: float = 1e-5) -> bool:
    return float((a - b).abs().max() / b.abs().max()) < bound


def same(a: nn.Module, b: nn.Module) -> bool:
    """Every tensor the same bits, of the same dtype, and everything else of the same make."""
    x, y = a.state_dict(), b.state_dict()
    kinds = [[(name, type(module), module.training) for name, module in m.named_modules()] for m in (a, b)]
    return (
        list(x) == list(y)
        and kinds[0] == kinds[1]
        and all(x[name].dtype == y[name].dtype and x[name].equal(y[name]) for name in x)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Layouts.


@pytest.mark.parametrize("family", MODELS)
def test_experts_as_transformers_writes_them_and_as_we_do(family: str, tmp_path: Path) -> None:
    model = theirs(family)
    model.save_pretrained(tmp_path / "theirs")
    tokens_BS = torch.randint(50, (2, 20))
    right = logits(model, tokens_BS)
    ours = load(tmp_path / "theirs")
    assert close(logits(ours, tokens_BS), right)
    save(ours, tmp_path / "ours")
    assert read_json(tmp_path / "ours/config.json")["model_type"] == family
    published = [read_tensors(tmp_path / name) for name in ("theirs", "ours")]
    assert {name: published[0].shape(name) for name in published[0]} == {n: published[1].shape(n) for n in published[1]}
    assert all(published[0][name].equal(published[1][name]) for name in published[0])


@pytest.mark.parametrize("family", MODELS)
def test_experts_as_transformers_holds_them(family: str, tmp_path: Path) -> None:
    """Some tools save a model's state as it is in memory: (E, 2F, D), or gpt-oss's own way."""
    model = theirs(family)
    model.save_pretrained(tmp_path)
    ours = load(tmp_path)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    (tmp_path / "model.safetensors").unlink()
    write_file(tmp_path / "model.safetensors", state)
    assert same(load(tmp_path), ours)


def test_gpt_oss_by_hand(tmp_path: Path) -> None:
    """Column 2i of the public (D, 2F) is row i of our gate, column 2i + 1 of our up."""
    theirs("gpt_oss").save_pretrained(tmp_path)
    public = read_tensors(tmp_path)
    experts = load(tmp_path).moe_layers[1].experts
    gate_up, bias = (public[f"model.layers.1.mlp.experts.gate_up_proj{kind}"] for kind in ("", "_bias"))
    assert experts.gate_up_bias is not None
    for e, i in ((0, 0), (3, 5), (2, 95)):
        assert experts.gate_up[e, i].equal(gate_up[e, :, 2 * i])
        assert experts.gate_up[e, 96 + i].equal(gate_up[e, :, 2 * i + 1])
        assert experts.gate_up_bias[e, i] == bias[e, 2 * i]
        assert experts.gate_up_bias[e, 96 + i] == bias[e, 2 * i + 1]
    assert experts.down[1].equal(public["model.layers.1.mlp.experts.down_proj"][1].t())


@pytest.fixture
def mxfp4(tmp_path: Path) -> Path:
    """A gpt-oss checkpoint as it is published: experts in MXFP4, all else bfloat16."""
    theirs("gpt_oss").to(torch.bfloat16).save_pretrained(tmp_path / "gpt")
    state: dict[str, Tensor] = {}
    for name, tensor in read_tensors(tmp_path / "gpt").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            packed = pack_mxfp4(tensor.mT)
            state |= {f"{name}_blocks": packed.blocks, f"{name}_scales": packed.scales}
        else:
            state[name] = tensor
    values = read_json(tmp_path / "gpt/config.json")
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    write_folder(tmp_path / "published", {"config.json": values, "model.safetensors": state})
    return tmp_path / "published"


def test_mxfp4_is_read_as_transformers_reads_it(mxfp4: Path, tmp_path: Path) -> None:
    form = transformers.Mxfp4Config(dequantize=True)
    judge = transformers.AutoModelForCausalLM.from_pretrained(mxfp4, dtype=torch.float32, quantization_config=form)
    ours = load(mxfp4, dtype=torch.float32)
    tokens_BS = torch.randint(50, (2, 20))
    assert close(logits(ours, tokens_BS), logits(judge.eval(), tokens_BS))
    public = read_tensors(mxfp4)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    rows = unpack_mxfp4(public[f"{name}_blocks"], public[f"{name}_scales"])[2]
    held = load(mxfp4)
    assert {p.dtype for p in held.parameters()} == {torch.bfloat16}
    assert held.moe_layers[0].experts.gate_up[2].equal(torch.cat([rows[0::2], rows[1::2]]))
    # It is written in bfloat16, which is as exact.
    save(held, tmp_path / "again")
    assert "quantization_config" not in read_json(tmp_path / "again/config.json")
    assert same(load(tmp_path / "again"), held)


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("experts.down_proj_scales", lambda t: t.fill_(255), "holds scale 255, which stands for no number"),
        ("experts.down_proj_scales", lambda t: t.float(), r"is torch\.float32: must be torch\.uint8"),
        ("experts.gate_up_proj_blocks", lambda t: t.view(torch.int8), r"is torch\.int8: must be torch\.uint8"),
        (
            "experts.gate_up_proj_blocks",
            lambda t: t[:, :, :1],
            r"has shape \[4, 192, 1, 16\]: must be \[4, 192, 2, 16\]",
        ),
        ("experts.gate_up_proj_scales", lambda t: None, "is missing"),
        (
            "self_attn.q_proj.weight",
            lambda t: t.view(torch.uint8)[:, ::2],
            r"is torch\.uint8: quantized weights cannot be",
        ),
    ],
)
def test_wrong_mxfp4_is_named(mxfp4: Path, name: str, wrong: Any, said: str) -> None:
    name = f"model.layers.1.{name if name.startswith('self') else f'mlp.{name}'}"
    state = dict(read_tensors(mxfp4))
    state[name] = wrong(state[name])
    write_file(mxfp4 / "model.safetensors", {key: tensor for key, tensor in state.items() if tensor is not None})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{name}' {said}") as caught:
        load(mxfp4)
    assert "\n" not in str(caught.value)


def test_inputs_that_mxfp4_cannot_hold(mxfp4: Path) -> None:
    values = read_json(mxfp4 / "config.json") | {"intermediate_size": 100}
    write_file(mxfp4 / "config.json", values)
    with pytest.raises(CheckpointError, match=r"tensor '.*down_proj_blocks': 100 inputs: must be a multiple of 32$"):
        load(mxfp4)


# ---------------------------------------------------------------------------------------------------------------------
# Checked before anything is read.


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        (
            "model.layers.1.mlp.experts.3.up_proj.weight",
            torch.zeros(12, 15),
            r"has shape \[12, 15\]: must be \[12, 16\]",
        ),
        ("model.layers.1.mlp.experts.3.up_proj.weight", None, "is missing"),
        (
            "model.layers.1.mlp.experts.3.up_proj.weight",
            torch.zeros(12, 16).half(),
            r"is torch\.float16: must be torch",
        ),
        ("model.layers.1.mlp.experts.3.up_proj.weight", torch.zeros(12, 16).char(), r"is torch\.int8: quantized"),
        ("model.norm.weight", torch.zeros(16, dtype=torch.uint8), r"is torch\.uint8: quantized weights"),
    ],
)
def test_nothing_is_read_before_all_is_right(
    name: str, wrong: Tensor | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(Decoder(moe()), tmp_path / "saved", max_shard_bytes=10_000)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    where = read_tensors(tmp_path / "saved").where(name)
    assert where is not None
    shard = dict(read_tensors(where))
    write_file(where, {key: t for key, t in {**shard, name: wrong}.items() if t is not None})
    monkeypatch.setattr(safetensors_file._File, "fill", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match=rf"{where.name}: tensor '{name}' {said}"):
        load(tmp_path / "saved")


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    model = Decoder(moe(tied=False))
    save(model, tmp_path / "saved")
    size = sum(t.nbytes for t in model.state_dict().values())
    for changes in ({}, {"dtype": torch.bfloat16}, {"quantize": 4}):
        told: list[tuple[int, int]] = []
        load(tmp_path / "saved", progress=lambda done, total, told=told: told.append((done, total)), **changes)  # type: ignore[misc]
        assert [total for _, total in told] == [size] * len(model.state_dict())
        assert [done for done, _ in told] == sorted({done for done, _ in told})
        assert told[-1][0] == size


# ---------------------------------------------------------------------------------------------------------------------
# Packed while it is loaded.

EVERY: dict[str, ModelConfig] = {
    "tied": moe(tied=True),
    "all of it": moe(
        {"balance_bias": True, "logits_bias": True}, layers=3, dense_first=1, ffn=24, expert_bias=True,
        shared_width=20, shared_gate=True, qkv_bias=True, o_bias=True, tied=False,
    ),
    "dense": dense(tied=False),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 128)])
@pytest.mark.parametrize("name", EVERY)
def test_packed_while_loading_is_packed_after(
    name: str, bits: int, group: int, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    model = Decoder(EVERY[name])
    for p in model.parameters():
        nn.init.normal_(p)
    save(model, tmp_path / "saved")
    after = load(tmp_path / "saved", dtype=dtype)
    quantize_model(after, bits, group)
    found = load(tmp_path / "saved", dtype=dtype, quantize=bits, group=group)
    assert same(found, after)
    tokens_BS = torch.randint(300, (2, 9))
    assert logits(found, tokens_BS).equal(logits(after, tokens_BS))
    assert any(isinstance(module, PackedWeight) for module in found.modules())


def test_gpt_oss_goes_from_one_packed_form_to_another(mxfp4: Path) -> None:
    after = load(mxfp4)
    quantize_model(after, 8)
    assert same(load(mxfp4, quantize=8), after)


def test_what_cannot_be_packed(tmp_path: Path) -> None:
    model = Decoder(moe())
    with torch.no_grad():
        model.moe_layers[1].experts.down[2, 0, 0] = float("nan")
    save(model, tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"^layers\.1\.ffn\.experts\.down\[2\] holds values that are not finite"):
        load(tmp_path / "saved", quantize=4)
    with pytest.raises(ConfigError, match="bits = 5: one of 8, 4"):
        load("nowhere", quantize=5)
    with pytest.raises(ConfigError, match="group = 64: one of 32, 128"):
        load("nowhere", quantize=4, group=64)


def test_a_packed_model_is_not_saved(tmp_path: Path) -> None:
    save(Decoder(moe()), tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"^a quantized model cannot be saved: .* quantize = 4 or 8$"):
        save(load(tmp_path / "saved", quantize=8), tmp_path / "again")
    assert not (tmp_path / "again").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Shards.


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3, tied"])
def test_transformers_loads_shards(family: str, tmp_path: Path) -> None:
    ours: nn.Module
    if family == "qwen3, tied":
        ours = Decoder(moe(tied=True)).eval()
    else:
        theirs(family).save_pretrained(tmp_path / "theirs")
        ours = load(tmp_path / "theirs")
    save(ours, tmp_path / "ours", max_shard_bytes=12_000)
    files = sorted(path.name for path in (tmp_path / "ours").glob("model*"))
    assert len(files) > 3
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    assert sorted({*index["weight_map"].values(), "model.safetensors.index.json"}) == files
    held = sum(t.nbytes for t in ours.state_dict().values())
    assert index["metadata"]["total_size"] == held
    assert ("lm_head.weight" in index["weight_map"]) == (family != "qwen3, tied")
    tokens_BS = torch.randint(50, (2, 20))
    judge = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert close(logits(judge, tokens_BS), logits(ours, tokens_BS))
    assert same(load(tmp_path / "ours"), ours)
    # What is saved whole takes the place of all of them.
    save(ours, tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").glob("model*")] == ["model.safetensors"]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60_000))
def test_any_size_of_shard(tmp_path: Path, limit: int) -> None:
    torch.manual_seed(0)
    model = Decoder(moe()).eval()
    save(model, tmp_path / "saved", max_shard_bytes=limit)
    assert same(load(tmp_path / "saved"), model)
    for file in (tmp_path / "saved").glob("*.safetensors"):
        held = read_tensors(file)
        assert sum(held.entry(name).nbytes for name in held) <= limit or len(held) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Memory: the peak of a process of its own, beyond what it held after its imports.

CHILD = """
import resource, sys, torch
from handful.checkpoint import read_tensors, write_file
from handful.config import ModelConfig, RouterConfig
from handful.families.io import load, save
from handful.model import Decoder
from pathlib import Path
torch.set_num_threads(1)

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

folder, dtype, quantize, then = sys.argv[1:]
before = status("VmRSS")
model = load(folder, dtype=getattr(torch, dtype), quantize=int(quantize) or None)
if then:
    before = status("VmRSS")
    save(model, then)
held = sum(t.nbytes for t in model.state_dict().values())
largest = max(t.nbytes for t in model.state_dict().values())
print(status("VmHWM") - before, held, largest)
"""
SLACK = 16 << 20  # what Python, torch and its allocator take on the way


def peak(folder: Path, dtype: str, quantize: int = 0, then: str = "") -> tuple[int, int, int]:
    command = [sys.executable, "-c", CHILD, str(folder), dtype, str(quantize), then]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    beyond, held, largest = map(int, run.stdout.split())
    return beyond, held, largest


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of 87 MB in bfloat16, as Qwen3-MoE's per-expert tensors and as one of every layer's experts."""
    folder = tmp_path_factory.mktemp("large")
    config = moe({"experts": 16, "top_k": 2}, width=512, layers=4, heads=8, expert_width=384, vocab=1024)
    save(Decoder(config).to(torch.bfloat16), folder / "apart", max_shard_bytes=50_000_000)
    state: dict[str, Tensor] = {}
    for name, tensor in Decoder(config).to(torch.bfloat16).state_dict().items():
        if "ffn.experts" in name:
            layer = name.split(".")[1]
            kind = "gate_up_proj" if name.endswith("gate_up") else "down_proj"
            state[f"model.layers.{layer}.mlp.experts.{kind}"] = tensor
    kept = {name: t for name, t in read_tensors(folder / "apart").items() if ".experts." not in name}
    files = {"config.json": read_json(folder / "apart/config.json"), "model.safetensors": kept | state}
    write_folder(folder / "stacked", files)
    return {"apart": folder / "apart", "stacked": folder / "stacked"}


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
@pytest.mark.parametrize(
    ("layout", "dtype", "quantize"), [("apart", "bfloat16", 0), ("stacked", "float32", 0), ("apart", "bfloat16", 4)]
)
def test_loading_takes_the_models_memory_and_no_more(
    layout: str, dtype: str, quantize: int, large: dict[str, Path]
) -> None:
    beyond, held, _ = peak(large[layout], dtype, quantize)
    # Packed, the model is less than a third of what it was; packing takes some slices in float32.
    low, high = {"bfloat16": (80, 90), "float32": (160, 180)}[dtype] if not quantize else (22, 26)
    assert low << 20 < held < high << 20
    assert beyond < held + (2 if quantize else 1) * SLACK


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_saving_takes_no_more_than_a_tensor(tmp_path: Path) -> None:
    """And that in a layout that has to be made: gpt-oss's."""
    values = {
        **SIZES, **MODELS["gpt_oss"], "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_local_experts": 16, "model_type": "gpt_oss", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    save(Decoder(config_from_hf(values)).to(torch.bfloat16), tmp_path / "gpt")
    beyond, held, largest = peak(tmp_path / "gpt", "float32", then=str(tmp_path / "gpt-again"))
    assert held > 140 << 20
    assert beyond < largest / 4 + SLACK  # in fact one expert's
