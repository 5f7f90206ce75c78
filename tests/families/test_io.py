"""What is saved is what transformers loads, with the same logits; what is not whole is refused and named.

Legend: B sequences · S tokens in one · V vocabulary
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCAB, dense, moe, tiny_data, training
from safetensors.torch import save_file
from torch import Tensor

import handful
from handful import checkpoint
from handful.compare import twins
from handful.config import BalanceConfig, ModelConfig, TrainConfig
from handful.data import Data
from handful.errors import CheckpointError, DataError
from handful.families.convert import why_not_public
from handful.families.io import find_config, find_folder, load, load_decoder, save
from handful.hub import TOKENIZER_FILES
from handful.model import Decoder
from handful.presets import PRESETS, small_model
from handful.spread import read_into
from handful.text import END_OF_TEXT
from handful.train import train
from handful.train_step import make_optimizer

transformers: Any = importlib.import_module("transformers")  # its types know less than its classes accept
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

TEXT = "the expert chooses naïve ☃ tokens == <|endoftext|>\n"
SMALL: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "context": 32}

MODELS: dict[str, tuple[str, ModelConfig, BalanceConfig]] = {
    "qwen3": ("qwen3_moe", moe(kv_heads=1), BalanceConfig(loss="switch", weight=0.01)),
    "olmoe": (
        "olmoe",
        moe({"experts": 8, "top_k": 3, "normalize": False}, qk_norm="full", tied=False),
        BalanceConfig(loss="switch", weight=0.01, z_weight=0.001),
    ),
    "mixtral": ("mixtral", moe(qk_norm="none", rope_theta=1e6), BalanceConfig(loss="global", weight=0.02)),
    "deepseek-v3": (
        "glm4_moe",
        small_model(VOCAB, PRESETS["deepseek-v3"], **SMALL, experts=16, top_k=8, rotary_fraction=0.5),
        BalanceConfig(loss="sequence", weight=0.0001, bias_rate=0.05),
    ),
    "the default": ("qwen3_moe", small_model(VOCAB, experts=8, **SMALL), BalanceConfig()),
    "dense-active": ("qwen3", twins(small_model(VOCAB, experts=8, **SMALL))[0], BalanceConfig()),
    "dense-total": ("qwen3", twins(small_model(VOCAB, experts=8, **SMALL))[1], BalanceConfig()),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return tiny_data(tmp_path_factory.mktemp("io"))


@pytest.fixture
def saved(tmp_path: Path, data: Data) -> Path:
    """A checkpoint folder."""
    model = Decoder(moe())
    model.tokenizer = data.tokenizer
    save(model, tmp_path / "saved")
    return tmp_path / "saved"


def trained(
    config: ModelConfig, balance: BalanceConfig, data: Data, run: Path, monkeypatch: pytest.MonkeyPatch
) -> Decoder:
    """The model in memory that a run of four steps left."""
    models: list[Decoder] = []

    def make(model: Decoder, settings: TrainConfig) -> torch.optim.AdamW:
        models.append(model)
        return make_optimizer(model, settings)

    monkeypatch.setattr(sys.modules["handful.train"], "make_optimizer", make)
    list(train(config, training(steps=4, balance=balance), data, run))
    return models[0].eval()


def logits(model: Any, tokens_BS: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(tokens_BS)
    found: Tensor = out[0] if isinstance(model, Decoder) else out.logits
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Transformers.


@pytest.mark.parametrize("name", MODELS)
def test_transformers_gives_a_runs_logits(
    name: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_type, config, balance = MODELS[name]
    assert why_not_public(config) is None
    model = trained(config, balance, data, tmp_path / "run", monkeypatch)
    tokens_BS = torch.randint(VOCAB, (3, 32))
    right = logits(model, tokens_BS)

    # Ours, from the run folder: the same bits.
    again = handful.load(tmp_path / "run")
    assert torch.equal(logits(again, tokens_BS), right)
    assert not again.training

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", dtype=torch.float32)
    assert theirs.config.model_type == model_type
    out = logits(theirs.eval(), tokens_BS)
    assert float((out - right).abs().max() / right.abs().max()) < 1e-5
    assert right.std() > 0.1  # they say something
    if balance.bias_rate:
        biases = [layer.router.balance_bias for layer in again.moe_layers]
        assert all(bias is not None and (bias != 0).any() for bias in biases)


def test_transformers_reads_the_tokenizer(saved: Path, data: Data) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    plain = TEXT.replace("<|endoftext|>", "")
    assert theirs(plain)["input_ids"] == [data.tokenizer.eos_id, *data.tokenizer.encode(plain)]
    assert theirs.decode(theirs(TEXT)["input_ids"]) == END_OF_TEXT + TEXT
    assert (theirs.eos_token, theirs.eos_token_id) == (data.tokenizer.eos, data.tokenizer.eos_id)
    assert transformers.AutoConfig.from_pretrained(saved).eos_token_id == data.tokenizer.eos_id


def test_transformers_generates_what_we_generate(saved: Path, data: Data) -> None:
    from handful.generate import generate_tokens
    from handful.sampling import Sampling

    prompt = data.tokenizer.encode("the router of an expert")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    ours = list(generate_tokens(load_decoder(saved), prompt, 8, Sampling(temperature=0)))
    assert ours == out[0, len(prompt) :].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Loading.


def test_load_takes_a_run_a_checkpoint_and_text(saved: Path, tmp_path: Path, data: Data) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model").symlink_to("../saved")
    weight = load(saved).embed.weight
    for source in (str(saved), tmp_path / "run", str(tmp_path / "run/model"), f"{saved}/"):
        model = load(source)
        assert torch.equal(model.embed.weight, weight)
        assert model.tokenizer is not None
        assert model.tokenizer.fingerprint == data.tokenizer.fingerprint
        assert not model.training


def test_save_and_load_again(saved: Path, tmp_path: Path) -> None:
    model = load(saved)
    handful.save(model, tmp_path / "again")
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (saved / file).read_bytes()


def test_without_a_tokenizer(tmp_path: Path) -> None:
    save(Decoder(dense()), tmp_path / "bare")
    assert load(tmp_path / "bare").tokenizer is None
    assert json.loads((tmp_path / "bare/config.json").read_text())["eos_token_id"] is None


def biased() -> Decoder:
    """A model whose router's biases are no bfloat16 numbers."""
    model = Decoder(small_model(VOCAB, PRESETS["deepseek-v3"], **SMALL, experts=16, top_k=8))
    for layer in model.moe_layers:
        assert layer.router.balance_bias is not None
        layer.router.balance_bias += torch.linspace(-0.1, 0.1, 16)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_a_dtype_is_for_weights_and_not_for_the_balance_bias(dtype: torch.dtype, tmp_path: Path) -> None:
    model = biased()
    save(model, tmp_path / "saved")
    found = load(tmp_path / "saved", dtype=dtype)
    assert {p.dtype for p in found.parameters()} == {dtype}
    for ours, theirs in zip(model.moe_layers, found.moe_layers, strict=True):
        assert theirs.router.balance_bias is not None
        assert theirs.router.balance_bias.dtype == torch.float32
        assert ours.router.balance_bias is not None
        assert torch.equal(theirs.router.balance_bias, ours.router.balance_bias)
    for name, p in model.named_parameters():
        assert torch.equal(found.get_parameter(name), p.to(dtype)), name


def test_a_checkpoints_own_dtype_is_kept(tmp_path: Path) -> None:
    model = biased().to(torch.bfloat16)
    save(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    found = load(tmp_path / "saved")
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert {layer.router.balance_bias.dtype for layer in found.moe_layers if layer.router.balance_bias is not None} == {
        torch.float32
    }
    tokens_BS = torch.randint(VOCAB, (2, 8))
    assert torch.equal(logits(found, tokens_BS), logits(model, tokens_BS))


@pytest.mark.parametrize("backend", ["reference", "grouped"])
def test_the_backend_is_the_callers(backend: str, saved: Path) -> None:
    model = load(saved, backend=backend)
    assert {layer.experts.backend for layer in model.moe_layers} == {backend}


# ---------------------------------------------------------------------------------------------------------------------
# Where a model is.


def test_find_folder_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling/model").symlink_to("checkpoints/gone")
    for source, said in (
        (tmp_path / "empty", r"/empty: holds no checkpoint \(config\.json\), nor a run that has reached one"),
        (tmp_path / "file.txt", r"/file\.txt: holds no checkpoint"),
        (tmp_path / "dangling", r"/dangling: holds no checkpoint"),
        (tmp_path / "none", r"/none: no such folder"),
        ("none", "none: no such folder"),
        ("./org/name", r"\./org/name: no such folder"),
        ("~/name", "~/name: no such folder"),
        ("a/b/c", "a/b/c: no such folder"),
    ):
        with pytest.raises(CheckpointError, match=said) as caught:
            find_folder(source)
        assert "\n" not in str(caught.value)


def test_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(name: str, *, revision: Any, allow_patterns: Any, ignore_patterns: Any) -> str:
        asked.append((name, revision, allow_patterns))
        if name == "org/none":
            raise OSError("404: no such repository\nand a long story\nbesides")
        if name == "org/silent":
            raise TimeoutError
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load("org/name").config == moe()
    assert find_config("org/name") == moe()
    assert load("org/name@main").config == moe()
    files = [*TOKENIZER_FILES, "model*.safetensors"]
    assert asked == [("org/name", None, files), ("org/name", None, ["config.json"]), ("org/name", "main", files)]
    with pytest.raises(
        CheckpointError, match=r"^org/none: no such folder, and it cannot be downloaded: 404: no such repository$"
    ):
        load("org/none")
    with pytest.raises(CheckpointError, match=r"^org/silent: .* cannot be downloaded: TimeoutError$"):
        load("org/silent")


def test_a_local_folder_comes_before_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent.parent)
    assert find_folder(f"{saved.parent.name}/saved") == Path(saved.parent.name) / "saved"


def test_find_config(saved: Path, tmp_path: Path) -> None:
    assert find_config(saved) == find_config(saved / "config.json") == find_config(str(saved)) == moe()
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"bad\.json: not JSON"):
        find_config(tmp_path / "bad.json")
    # One that can be counted but not run.
    config = {"model_type": "deepseek_v3", "vocab_size": 10}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"^config\.json"):
        load(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# What is not whole.


def rewrite(folder: Path, change: dict[str, Tensor | None]) -> None:
    tensors = dict(checkpoint.read_tensors(folder)) | change
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


WHOLE = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({WHOLE: torch.zeros(16, 13)}, rf"'{WHOLE}' has shape \[16, 13\]: must be \[16, 12\]"),
        ({WHOLE: None}, f"tensor '{WHOLE}' is missing"),
        ({"model.extra": torch.zeros(1)}, "unexpected tensor 'model.extra'"),
        ({WHOLE: torch.zeros(16, 12, dtype=torch.int8)}, rf"'{WHOLE}' is torch\.int8: quantized"),
    ],
)
def test_a_wrong_tensor_is_named(change: dict[str, Tensor | None], said: str, saved: Path) -> None:
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=said) as caught:
        load(saved)
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    model = Decoder(moe())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=said):
        read_into(model, saved)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_our_own_layout_is_checked_too(tmp_path: Path) -> None:
    """A config that no public family has: Decoder's own tensor names."""
    config = moe({"noisy_top_k": True})
    assert why_not_public(config) is not None
    save(Decoder(config), tmp_path / "ours")
    assert load(tmp_path / "ours").config == config
    rewrite(tmp_path / "ours", {"layers.0.ffn.router.noise_weight": torch.zeros(5, 16)})
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor 'layers\.0\.ffn\.router\.noise_weight' has sh"
    ):
        load(tmp_path / "ours")


def test_a_half_written_checkpoint_is_refused(saved: Path) -> None:
    whole = (saved / "model.safetensors").read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (saved / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"saved/model\.safetensors: truncated or malformed"):
            load(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"saved: no model\.safetensors"):
        load(saved)


def test_a_half_written_config_is_refused(saved: Path) -> None:
    text = (saved / "config.json").read_text()
    for broken in ("", text[: len(text) // 2], "[]", "\x00"):
        (saved / "config.json").write_text(broken)
        with pytest.raises(CheckpointError, match=r"config\.json: (not JSON|must hold a JSON object)"):
            load(saved)


def test_a_broken_tokenizer_is_named(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=rf"^tokenizer '{re.escape(str(saved))}': malformed: ") as caught:
        load(saved)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_never_opened(saved: Path) -> None:
    shutil.move(saved / "model.safetensors", saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        load(saved)
