"""The plug-in: transformers' own models give the same logits, gradients and tokens with our experts, and watching one
changes nothing and sees what its experts are given."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import handful.transformers as plugin
from handful import observe
from handful.balance import switch_loss
from handful.errors import CheckpointError, ConfigError, MissingExtraError, RoutingError
from handful.routing import Routing

transformers: Any = importlib.import_module("transformers")  # its types know less than its configs accept
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

VOCAB = 67
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
SIX: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2}
LOCAL: dict[str, Any] = {"num_local_experts": 6, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
FULL: dict[str, Any] = {"layer_types": ["full_attention"] * 2}
OWN = plugin.OWN_GATE

# Each family: what its config says, what its experts are computed with, and what its weights are made from.
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "Afmoe": ({**SIX, **FULL, "num_dense_layers": 1}, "swiglu", "sigmoid"),
    "AriaText": ({"moe_num_experts": 6, "moe_topk": 2}, OWN, "softmax"),
    "Cohere2Moe": (SIX, "swiglu", "softmax"),
    "DeepseekV2": ({**ROUTED, **LATENT, "topk_method": "greedy"}, "swiglu", "softmax"),
    "DeepseekV3": ({**ROUTED, **LATENT}, "swiglu", "sigmoid"),
    "DeepseekV4": ({**LOCAL, "mlp_layer_types": ["moe", "moe"]}, OWN, "sqrtsoftplus"),
    "Ernie4_5_Moe": ({"moe_num_experts": 6, "moe_k": 2, "moe_layer_start_index": 0}, "swiglu", "softmax"),
    "FlexOlmo": ({**SIX, "hidden_act": "gelu"}, "geglu", "softmax"),
    "Gemma4": (
        {
            "num_experts": 6, "top_k_experts": 2, "enable_moe_block": True, "hidden_size_per_layer_input": 0,
            "global_head_dim": 8, "num_global_key_value_heads": 2, **FULL,
        },
        OWN,
        "softmax",
    ),
    "Glm4Moe": (ROUTED, "swiglu", "sigmoid"),
    "GptOss": (LOCAL, OWN, "softmax"),
    "GraniteMoe": (LOCAL, "swiglu", "softmax"),
    "HunYuanMoEV1": ({"num_experts": 6, "moe_topk": 2}, "swiglu", "softmax"),
    "Jamba": (
        {
            **SIX, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
            "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4,
        },
        "swiglu",
        "softmax",
    ),
    "Lfm2Moe": ({**SIX, **FULL, "num_dense_layers": 1}, "swiglu", "sigmoid"),
    "MiniMaxM2": (LOCAL, "swiglu", "sigmoid"),
    "Mixtral": (LOCAL, "swiglu", "softmax"),
    "NemotronH": (
        {
            **ROUTED, "layers_block_type": ["attention", "moe", "attention", "moe"], "n_groups": 1,
            "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "moe_shared_expert_intermediate_size": 16,
        },
        OWN,
        "sigmoid",
    ),
    "Olmoe": (SIX, "swiglu", "softmax"),
    "Phimoe": (LOCAL, "swiglu", "unknown"),
    "Qwen2Moe": ({**SIX, "shared_expert_intermediate_size": 16}, "swiglu", "softmax"),
    "Qwen3Moe": ({**SIX, "norm_topk_prob": True}, "swiglu", "softmax"),
    "Qwen3Next": ({**SIX, **FULL, "shared_expert_intermediate_size": 16}, "swiglu", "softmax"),
}  # fmt: skip


def build(family: str, **changes: Any) -> Any:
    """A tiny model of the family, with weights large enough that its experts matter."""
    kind = {"Gemma4": "Gemma4Text"}.get(family, family)
    config = getattr(transformers, f"{kind}Config")(**(SHAPE | FAMILIES.get(family, ({}, "", ""))[0] | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape or (2, 13))


def generate(model: Any, ids_BS: Tensor, new: int = 6) -> Tensor:
    out: Tensor = model.generate(ids_BS, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out


def apart(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


@torch.enable_grad()
def gradients(model: Any, ids_BS: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids_BS, labels=ids_BS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def borrowed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The modules that we computed: without it, a setting that nobody obeys would pass every comparison."""
    found = []
    read = plugin.borrow

    def spy(module: Any) -> Any:
        found.append(module)
        return read(module)

    monkeypatch.setattr(plugin, "borrow", spy)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Whole models.


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_gradients_and_tokens_are_theirs(family: str, borrowed: list[Any]) -> None:
    model, ids_BS = build(family), tokens()
    results = {}
    for name in ("eager", "handful"):
        model.set_experts_implementation(name)
        assert not borrowed
        with torch.no_grad():
            results[name] = model(ids_BS).logits, gradients(model, ids_BS), generate(model, ids_BS[:, :5])
    assert set(borrowed) == set(plugin.experts_of(model).values())
    (theirs, their_grads, their_tokens), (ours, our_grads, our_tokens) = results["eager"], results["handful"]
    assert apart(ours, theirs) < 1e-5
    assert our_grads.keys() == their_grads.keys()
    assert any("experts" in name for name in our_grads)
    errors = {name: apart(our_grads[name], grad) for name, grad in their_grads.items()}
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}
    assert torch.equal(our_tokens, their_tokens)
    assert set(plugin.check(model).values()) == {FAMILIES[family][1]}


def test_torch_alone_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handful.experts.backends.available", lambda: False)
    model, ids_BS = build("Mixtral"), tokens()
    model.set_experts_implementation("eager")
    theirs, their_grads = model(ids_BS).logits, gradients(model, ids_BS)
    model.set_experts_implementation("handful")
    assert apart(model(ids_BS).logits, theirs) < 1e-5
    assert max(apart(grad, their_grads[name]) for name, grad in gradients(model, ids_BS).items()) < 1e-5


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "DeepseekV3"])
def test_bfloat16_is_as_near_to_float32_as_theirs(family: str) -> None:
    # Every expert is chosen: a choice between two that are nearly level would drown all else.
    model, ids_BS = build(family, num_experts_per_tok=6), tokens(4, 24)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        exact = model(ids_BS).logits
        model.bfloat16()
        theirs = model(ids_BS).logits
        model.set_experts_implementation("handful")
        ours = model(ids_BS).logits
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert not torch.equal(ours, theirs)
    assert apart(ours, exact) < 1.1 * apart(theirs, exact) < 0.05


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_gradient_checkpointing_changes_no_gradient_and_is_seen_once(family: str) -> None:
    model, ids_BS = build(family).train(), tokens()
    model.set_experts_implementation("handful")
    plain = gradients(model, ids_BS)
    model.activation_checkpointing_enable()
    with plugin.watch(model) as seen:
        again = gradients(model, ids_BS)
    assert all(torch.equal(again[name], grad) for name, grad in plain.items())
    assert [routing.tokens for routing in seen.routings().values()] == [26, 26]


def test_from_config_takes_the_name() -> None:
    config = transformers.MixtralConfig(**(SHAPE | LOCAL))
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="handful")
    assert model.config._experts_implementation == plugin.NAME == "handful"


# ---------------------------------------------------------------------------------------------------------------------
# Every decorated class.

# Whatever any experts' config calls it. The limits are small enough to close on ordinary numbers.
CONFIG: dict[str, Any] = {
    "num_experts": 5, "num_local_experts": 5, "n_routed_experts": 5, "moe_num_experts": 5,
    "hidden_size": 16, "moe_hidden_size": 16, "intermediate_size": 12, "moe_intermediate_size": 12,
    "moe_latent_size": None, "hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh", "mlp_hidden_act": "relu2",
    "swiglu_limit": 1.0, "swiglu_alpha": 1.702, "mlp_gate_softcap": 2.0, "mlp_up_softcap": 2.0, "post_norm_eps": 1e-6,
    "_experts_implementation": "eager",
}  # fmt: skip

# What stands in the way of a backend; every other class is a plain SwiGLU.
OWN_GATES = {
    "AriaExperts": "stored turned",
    "DeepseekV4Experts": "a clamped SwiGLU without alpha",
    "DiffusionGemmaTextExperts": "tanh's GELU",
    "Gemma4TextExperts": "tanh's GELU",
    "Glm5NextTextExperts": "a clamped SwiGLU without alpha",
    "GptOssExperts": "stored turned, gate and up rows in turn",
    "HYV4Experts": "a clamped SwiGLU without alpha",
    "Inkling2Experts": "softcaps",
    "MiniMaxM3VLExperts": "a limit that is not 7",
    "MuseSparkExperts": "a norm behind every expert",
    "NemotronHExperts": "relu²",
    "OpenAIPrivacyFilterExperts": "stored turned",
}


def decorated() -> dict[str, type[Any]]:
    """Every class in transformers that stands under `use_experts_implementation`, found in its sources."""
    found = {}
    pattern = re.compile(r"^@use_experts_implementation\b.*?^class (\w+)", re.MULTILINE | re.DOTALL)
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in pattern.findall(path.read_text("utf-8")):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            found[name] = getattr(module, name)
    return found


DECORATED = decorated()


def experts(name: str, **changes: Any) -> Any:
    """One experts module alone, with random weights."""
    module = DECORATED[name](SimpleNamespace(**(CONFIG | changes)))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def both_ways(module: Any, name: str, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> list[Tensor]:
    """The output, and the gradients of x, of the weights and of every parameter."""
    module.config._experts_implementation = name
    x_TD, weights_TK = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
    y_TD = module(x_TD, experts_TK, weights_TK)
    into_TD = torch.linspace(-1, 1, y_TD.numel()).sin().view(y_TD.shape)
    return [y_TD.detach(), *torch.autograd.grad((y_TD * into_TD).sum(), [x_TD, weights_TK, *module.parameters()])]


def batch(T: int = 40, E: int = 5, K: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(T, 16), torch.rand(T, E).topk(K).indices, torch.rand(T, K)


@pytest.mark.parametrize("name", DECORATED)
def test_every_class_computes_what_it_did(name: str) -> None:
    module = experts(name)
    assert plugin.check(module) == {"": OWN if name in OWN_GATES else "swiglu"}
    given = batch()
    theirs, ours = both_ways(module, "eager", *given), both_ways(module, "handful", *given)
    assert max(map(apart, ours, theirs)) < 1e-6
    few = batch(T=1)
    assert max(map(apart, both_ways(module, "handful", *few), both_ways(module, "eager", *few))) < 1e-6


def test_the_table_and_the_flags_are_all_there_are() -> None:
    assert len(DECORATED) >= 65
    assert set(OWN_GATES) <= set(DECORATED)
    # A flag that is new here needs a thought in `borrow`, which refuses it until then.
    parameters = set(inspect.signature(plugin._moe.use_experts_implementation).parameters)
    assert parameters == {*plugin.FLAGS, "experts_class", "experts_interface"}


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("MixtralExperts", {"hidden_act": "silu"}, "swiglu"),
        ("MixtralExperts", {"hidden_act": "gelu"}, "geglu"),
        ("MixtralExperts", {"hidden_act": "gelu_pytorch_tanh"}, None),
        ("MixtralExperts", {"hidden_act": "quick_gelu"}, None),
        ("MixtralExperts", {"hidden_act": "relu"}, None),
        ("NemotronHExperts", {"mlp_hidden_act": "relu"}, "relu"),
        ("NemotronHExperts", {"mlp_hidden_act": "gelu"}, "gelu"),
        ("NemotronHExperts", {"mlp_hidden_act": "silu"}, None),
        ("MiniMaxM3VLExperts", {"swiglu_limit": 7.0}, "swiglu_clamped"),
        ("MiniMaxM3VLExperts", {"swiglu_limit": 7.01}, None),
        ("MiniMaxM3VLExperts", {"swiglu_limit": 7.0, "swiglu_alpha": 1.7}, None),
        ("DeepseekV4Experts", {"swiglu_limit": 10.0}, None),
        ("DeepseekV4Experts", {"swiglu_limit": 100.0}, None),
    ],
)
def test_a_gate_is_ours_only_where_the_maths_is(name: str, changes: dict[str, Any], expected: str | None) -> None:
    module = experts(name, **changes)
    assert plugin.borrow(module).activation == (expected or plugin.OWN_GATE)
    given = batch()
    assert max(map(apart, both_ways(module, "handful", *given), both_ways(module, "eager", *given))) < 1e-6


def test_a_setting_that_changes_is_noticed() -> None:
    module = experts("MiniMaxM3VLExperts", swiglu_limit=7.0)
    assert plugin.borrow(module).activation == "swiglu_clamped"
    module.swiglu_limit = 5.0
    assert plugin.borrow(module).activation == plugin.OWN_GATE
    module = experts("MixtralExperts")
    assert plugin.borrow(module).activation == "swiglu"
    module.act_fn = nn.GELU()
    assert plugin.borrow(module).activation == "geglu"


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
def test_weights_are_not_copied(name: str) -> None:
    module = experts(name)
    read = plugin.borrow(module)
    assert read.gate_up.data_ptr() == module.gate_up_proj.data_ptr()
    assert read.down.data_ptr() == module.down_proj.data_ptr()
    assert read.gate_up.shape == (5, 24, 16)
    assert read.down.shape == (5, 16, 12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "MuseSparkExperts"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    module = experts(name)
    x_TD, experts_TK, weights_TK = batch()
    exact = both_ways(module, "eager", x_TD, experts_TK, weights_TK)[0]
    module.to(dtype)
    module.config._experts_implementation = "handful"
    with torch.no_grad():
        y_TD = module(x_TD.to(dtype), experts_TK, weights_TK.to(dtype))
    assert y_TD.dtype == dtype
    assert apart(y_TD, exact) < {torch.float64: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "MuseSparkExperts", "DeepseekV4Experts"])
def test_bfloat16_s_gradients_are_as_near_to_exact_as_theirs(name: str) -> None:
    module = experts(name, swiglu_limit=7.0).bfloat16()
    x_TD, experts_TK, weights_TK = batch(T=200)
    given = x_TD.bfloat16(), experts_TK, weights_TK.bfloat16()
    theirs, ours = both_ways(module, "eager", *given), both_ways(module, "handful", *given)
    exact = both_ways(module.double(), "eager", given[0].double(), experts_TK, given[2].double())
    for our, their, right in zip(ours, theirs, exact, strict=True):
        assert our.dtype == their.dtype == torch.bfloat16
        assert apart(our, right) < 1.2 * apart(their, right) < 0.05


@pytest.mark.parametrize("name", ["MixtralExperts", "NemotronHExperts"])
def test_autocast_computes_in_its_dtype_and_returns_the_input_s(name: str) -> None:
    module = experts(name)
    x_TD, experts_TK, weights_TK = batch()
    exact = both_ways(module, "handful", x_TD, experts_TK, weights_TK)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y_TD = module(x_TD, experts_TK, weights_TK)
    assert y_TD.dtype == torch.float32
    assert 1e-4 < apart(y_TD, exact) < 2e-2


@pytest.mark.parametrize("name", ["MixtralExperts", "DeepseekV4Experts"])
def test_other_ranks_experts_are_left_out(name: str) -> None:
    module = experts(name)
    x_TD, experts_TK, weights_TK = batch()
    experts_TK = experts_TK.masked_fill(torch.rand(experts_TK.shape) < 0.4, 5)  # five: there are 0 to 4
    theirs = both_ways(module, "eager", x_TD, experts_TK, weights_TK)
    module._is_expert_parallel = True
    ours = both_ways(module, "handful", x_TD, experts_TK, weights_TK)
    assert max(map(apart, ours, theirs)) < 1e-6
    assert not ours[2][experts_TK == 5].any()
    assert ours[2][experts_TK < 5].all()
    nowhere = both_ways(module, "handful", x_TD, torch.full_like(experts_TK, 5), weights_TK)
    assert not any(value.any() for value in nowhere)


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
def test_a_compiled_module_gives_the_same(name: str) -> None:
    module = experts(name, _experts_implementation="handful")
    given = batch()
    with torch.no_grad():
        compiled: Any = torch.compile(module, backend="eager")
        assert torch.equal(compiled(*given), module(*given))


def test_no_tokens() -> None:
    for name in ("MixtralExperts", "GptOssExperts"):
        y_TD, *grads = both_ways(experts(name), "handful", *batch(T=0))
        assert y_TD.shape == (0, 16)
        assert not any(grad.any() for grad in grads)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused.


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
def test_an_expert_that_is_not_there_is_an_error(name: str) -> None:
    x_TD, experts_TK, weights_TK = batch()
    experts_TK[3, 1] = 5
    with pytest.raises(RoutingError, match="routing names expert 5: there are 5"):
        both_ways(experts(name), "handful", x_TD, experts_TK, weights_TK)


def test_what_cannot_be_read_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = experts("MixtralExperts")
    module.gate_up_proj = nn.Parameter(torch.zeros(5, 24, 16).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ConfigError, match=r"MixtralExperts\.gate_up_proj is torch\.float8_e4m3fn"):
        plugin.check(module)
    module = experts("MixtralExperts")
    module.has_bias = True
    with pytest.raises(ConfigError, match=r"MixtralExperts\.gate_up_proj_bias is missing"):
        plugin.check(module)
    module = experts("MixtralExperts")
    module.is_transposed = True
    with pytest.raises(ConfigError, match=r"gate_up_proj has shape \(5, 24, 16\).*is_transposed = True"):
        plugin.check(module)
    monkeypatch.setitem(plugin._defaults, "has_spin", False)
    module = experts("MixtralExperts")
    assert plugin.check(module) == {"": "swiglu"}
    module.has_spin, module.config._experts_implementation = True, "handful"
    with pytest.raises(ConfigError, match=r"MixtralExperts\.has_spin = True: handful does not know this flag"):
        module(*batch())


def unreachable() -> dict[str, Any]:
    t = transformers
    shape = {name: value for name, value in SHAPE.items() if name not in ("head_dim", "moe_intermediate_size")}
    return {
        "Llama4ForCausalLM": lambda: t.Llama4ForCausalLM(
            t.Llama4TextConfig(**SHAPE, intermediate_size_mlp=24, num_local_experts=4)
        ),
        "JetMoeForCausalLM": lambda: t.JetMoeForCausalLM(
            t.JetMoeConfig(**shape, kv_channels=8, num_local_experts=4, num_experts_per_tok=2)
        ),
        "Qwen3ForCausalLM": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SHAPE)),
    }


@pytest.mark.parametrize("name", unreachable())
def test_models_whose_experts_cannot_be_reached_are_refused(name: str) -> None:
    model = unreachable()[name]()
    for question in (plugin.check, plugin.watch):
        with pytest.raises(ConfigError, match=rf"^{name} has no experts that can be reached"):
            question(model)


@pytest.mark.parametrize("version", [None, "4.57.1", "5.22.3"])
def test_no_transformers_or_an_old_one_is_one_clear_error(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    old = None if version is None else SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "transformers", old)
    monkeypatch.delitem(sys.modules, "handful.transformers")
    with pytest.raises(MissingExtraError, match=r"transformers>=5\.23.*pip install 'handful-moe\[transformers\]'"):
        importlib.import_module("handful.transformers")


# ---------------------------------------------------------------------------------------------------------------------
# Watching.


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("implementation", ["eager", "handful"])
@pytest.mark.parametrize("family", FAMILIES)
def test_watching_changes_no_bit_and_sees_what_experts_are_given(family: str, implementation: str) -> None:
    model, ids_BS = build(family), tokens()
    model.set_experts_implementation(implementation)
    given: dict[str, tuple[Tensor, ...]] = {}
    routers: dict[str, Tensor] = {}

    def spy(name: str) -> list[Any]:
        module = plugin.experts_of(model)[name]
        parent = model.get_submodule(name.rpartition(".")[0])
        router = next(child for part, child in parent.named_children() if part in ("gate", "router"))
        return [
            module.register_forward_pre_hook(lambda _, args: given.update({name: args[1:]})),
            router.register_forward_hook(lambda _, args, output: routers.update({name: output[0]})),
        ]

    with torch.no_grad():
        unwatched = model(ids_BS).logits
        mine = [hook for name in plugin.experts_of(model) for hook in spy(name)]
        before = hooks(model)
        with plugin.watch(model) as seen:
            watched = model(ids_BS).logits
    assert torch.equal(watched, unwatched)
    assert hooks(model) == before
    assert seen.layers == tuple(given) == tuple(seen.routings())
    assert seen.scores == dict.fromkeys(given, FAMILIES[family][2])
    for name, routing in seen.routings().items():
        experts_TK, weights_TK = given[name]
        assert torch.equal(routing.experts_TK, experts_TK)
        assert torch.equal(routing.weights_TK, weights_TK)
        logits_TE = routers[name].view(-1, 6).float()
        assert torch.equal(routing.logits_TE, logits_TE.log() if family == "Gemma4" else logits_TE)
        assert routing.tokens == ids_BS.numel()
        if seen.scores[name] != "unknown":
            made_TK = routing.scores_TE.gather(1, experts_TK)
            share_TK = weights_TK / weights_TK.sum(1, keepdim=True)
            assert apart(made_TK / made_TK.sum(1, keepdim=True), share_TK) < 1e-5
    for hook in mine:
        hook.remove()


def test_generation_is_seen_step_by_step() -> None:
    model, ids_BS = build("Olmoe"), tokens(2, 5)
    unwatched = generate(model, ids_BS, new=4)
    with plugin.watch(model) as seen:
        assert torch.equal(generate(model, ids_BS, new=4), unwatched)
    assert [step[seen.layers[0]].tokens for step in seen.steps] == [10, 2, 2, 2]
    whole = seen.routings()[seen.layers[1]]
    assert torch.equal(whole.experts_TK, torch.cat([step[seen.layers[1]].experts_TK for step in seen.steps]))
    assert torch.equal(whole.scores_TE, whole.logits_TE.softmax(-1))
    assert whole.tokens == 16


def test_what_was_seen_is_what_observe_and_balance_take() -> None:
    model, ids_BS = build("Mixtral"), tokens()
    with plugin.watch(model) as seen:
        model(ids_BS)
    routings: list[Routing] = list(seen.routings().values())
    load_LE = torch.stack([observe.expert_load(routing) for routing in routings])
    stats = observe.stats(load_LE, [observe.dropped(routing) for routing in routings])
    assert stats.dropped == [0.0, 0.0]
    assert all(0 < value < 1 for value in stats.entropy)
    assert torch.equal(observe.coactivation(routings[0]).diagonal() / 52, load_LE[0])
    assert float(switch_loss(routings[0])) > 0
    assert not routings[0].weights_TK.requires_grad


def test_old_steps_are_forgotten_and_counted() -> None:
    model = build("Mixtral")
    with plugin.watch(model, tokens=30) as seen:
        for _ in range(4):
            model(tokens(1, 13))
    assert (len(seen.steps), seen.forgotten) == (2, 2)
    with plugin.watch(model, tokens=5) as seen:
        model(tokens(1, 13))  # one pass is always kept whole
    assert (len(seen.steps), seen.forgotten) == (1, 0)
    with pytest.raises(ConfigError, match="tokens = 0: at least 1"):
        plugin.watch(model, tokens=0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_pass_that_is_broken_off_leaves_nothing(error: type[BaseException]) -> None:
    model, ids_BS = build("Mixtral"), tokens()

    def stop(*_: object) -> None:
        raise error

    before = hooks(model)
    with plugin.watch(model) as seen:
        breaking = model.model.layers[1].register_forward_hook(stop)
        with pytest.raises(error):
            model(ids_BS)
        breaking.remove()
        assert seen.steps == []
        model.model(ids_BS[:, :3])
        model(ids_BS[:, :4])
    assert [[routing.tokens for routing in step.values()] for step in seen.steps] == [[6, 6], [8, 8]]
    with pytest.raises(error), plugin.watch(model):
        raise error
    assert hooks(model) == before


def test_close_ends_it_without_a_block() -> None:
    model = build("Mixtral")
    seen = plugin.watch(model)
    model.model(tokens(1, 4))  # the model within the model is seen as well
    seen.close()
    model(tokens(1, 5))
    assert [step[seen.layers[0]].tokens for step in seen.steps] == [4]
    assert hooks(model) == 0


def test_a_router_with_more_choices_than_experts_is_refused() -> None:
    model = build("Zaya", **{**SIX, "num_experts_per_tok": 1})
    assert set(plugin.check(model).values()) == {"swiglu"}
    with (
        pytest.raises(RoutingError, match=r"logits \(26, 7\).*layers\.0.*there are 6 experts"),
        plugin.watch(model),
    ):
        model(tokens())


class Layer(nn.Module):
    """Experts with a router of the test's own beside them."""

    def __init__(self, router: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.experts = experts("MixtralExperts")
        self.router = nn.Module()
        self.router.forward = router

    def forward(self, x_TD: Tensor) -> Tensor:
        *_, weights_TK, experts_TK = self.router(x_TD)
        y_TD: Tensor = self.experts(x_TD, experts_TK, weights_TK)
        return y_TD


@pytest.mark.parametrize("K", [1, 2])
def test_probabilities_become_logits(K: int) -> None:
    """Gemma 4's router gives its probabilities where others give logits."""
    logits_TE = torch.randn(30, 5)

    def router(x_TD: Tensor) -> Any:
        scores_TE = logits_TE.softmax(-1)
        return scores_TE, *scores_TE.topk(K)

    layer = Layer(router)
    with plugin.watch(layer) as seen:
        layer(torch.randn(30, 16))
    assert seen.scores == {"experts": "softmax"}
    found = seen.routings()["experts"]
    assert torch.allclose(found.scores_TE, logits_TE.softmax(-1), atol=1e-6)
    assert torch.allclose(found.logits_TE, logits_TE.log_softmax(-1), atol=1e-5)


def test_one_expert_per_token_tells_its_scores_over_tokens() -> None:
    logits_TE = torch.randn(30, 5)
    layer = Layer(lambda x_TD: (logits_TE[: len(x_TD)], *logits_TE[: len(x_TD)].sigmoid().topk(1)))
    with plugin.watch(layer) as seen:
        layer(torch.randn(1, 16))
        assert seen.scores == {"experts": "unknown"}
        layer(torch.randn(30, 16))
        layer(torch.randn(1, 16))  # what is known stays known
    assert seen.scores == {"experts": "sigmoid"}
    assert torch.equal(seen.steps[2]["experts"].scores_TE, logits_TE[:1].sigmoid())


def test_experts_without_a_router_beside_them_are_refused() -> None:
    layer = Layer(lambda x_TD: torch.randn(len(x_TD), 5).topk(2))

    def hidden(x_TD: Tensor) -> Tensor:
        y_TD: Tensor = layer.experts(x_TD, torch.zeros(len(x_TD), 2, dtype=torch.int64), torch.rand(len(x_TD), 2))
        return y_TD

    layer.forward = hidden  # type: ignore[method-assign]
    with pytest.raises(RoutingError, match="experts: no module beside these experts"), plugin.watch(layer):
        layer(torch.randn(4, 16))


def test_a_checkpoint_that_transformers_cannot_load_is_one_line(tmp_path: Path) -> None:
    build("Mixtral").save_pretrained(tmp_path / "model")
    loaded = plugin.load_causal(tmp_path / "model")
    assert loaded.config._experts_implementation == "handful"
    assert not loaded.training
    for content, said in (('{"model_type": "nothing"}', "nothing"), ("{", "")):
        (tmp_path / "model" / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=f"transformers cannot load it: .*{said}") as error:
            plugin.load_causal(tmp_path / "model")
        assert "\n" not in str(error.value)
