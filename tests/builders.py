"""What tests share: texts, models, trainings, layers and calls, small enough that a test with them takes a moment."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from handful.cli import main
from handful.config import (
    Activation,
    EncoderDecoderConfig,
    MLAConfig,
    ModelConfig,
    RopeScaling,
    RouterConfig,
    TrainConfig,
)
from handful.data import Data, load_data
from handful.experts import Experts
from handful.kernels import exact_activations, set_exact_activations
from handful.positions import KVCache
from handful.routing import Routing

F64 = torch.float64

Event = dict[str, Any]

WORDS = ["the", "router", "of", "an", "expert", "chooses", "tokens", "when", "weights", "learn", "naïve", "==", "☃"]
VOCAB = 300


def write_text(folder: Path, documents: int = 40, words: int = 60) -> Path:
    """A folder of documents that differ, about 12 kB in all."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        draw = random.Random(number)
        lines = (" ".join(draw.choices(WORDS, k=12)) for _ in range(words // 12))
        (folder / f"{number:03}.txt").write_text("\n".join(lines) + f"\n# {number}\n", encoding="utf-8")
    return folder


def tiny_data(folder: Path) -> Data:
    """The text's tokens, with a tokenizer of 300, cached below the folder too."""
    return load_data(str(write_text(folder / "text")), vocab=VOCAB, cache=folder / "cache")


def dense(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {"vocab": VOCAB, "width": 16, "layers": 2, "heads": 2, "ffn": 24, "context": 32}
    return ModelConfig(**(values | changes))


def moe(router: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """Four experts of which two are chosen, with Qwen3-MoE's maths; `router` changes the router's values."""
    routing = RouterConfig(**({"experts": 4, "top_k": 2} | (router or {})))
    return dense(**({"ffn": 0, "router": routing, "expert_width": 12, "qk_norm": "head"} | changes))


def training(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "steps": 6, "batch": 4, "context": 16, "eval_every": 2, "eval_tokens": 128, "checkpoint_every": 2,
        "dtype": "float32", "lr": 1e-2,
    }  # fmt: skip
    return TrainConfig(**(values | changes))


def of_kind(kind: str, events: Iterable[Event]) -> list[Event]:
    return [event for event in events if event["event"] == kind]


def timeless(events: Iterable[Event]) -> list[Event]:
    """Events without what depends on the clock, and without where they were written."""
    clock = ("seconds", "tokens_per_second", "path", "dtype_reason")
    return [{key: value for key, value in event.items() if key not in clock} for event in events]


def read_lines(file: Path) -> list[Event]:
    """Every line of a file as JSON; all of them must be."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Shapes of attention, and of an encoder-decoder.

SMALL = ModelConfig(
    vocab=13, width=8, layers=2, heads=4, kv_heads=2, ffn=10, qk_norm="head", rope_theta=100.0, context=32
)
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_context=40, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = RopeScaling(kind="yarn", factor=4.0, original_context=16, beta_fast=2.0, beta_slow=0.2)
DEEPSEEK_YARN = replace(YARN, mscale=0.7, mscale_all_dim=1.2)
MLA = MLAConfig(q_rank=5, kv_rank=6, nope_dim=3, rope_dim=4, v_dim=5)
LATENT = replace(SMALL, qk_norm="none", head_dim=None, mla=MLA, rope_adjacent=True)

SHAPES: dict[str, ModelConfig] = {
    "grouped-query": SMALL,
    "multi-head": replace(SMALL, kv_heads=4),
    "one key-value head": replace(SMALL, kv_heads=1),
    "plain": replace(SMALL, qk_norm="none"),
    "full norm": replace(SMALL, qk_norm="full"),
    "biases": replace(SMALL, qkv_bias=True, o_bias=True),
    "partial rotary": replace(SMALL, head_dim=8, rotary_fraction=0.5),
    "wide heads": replace(SMALL, head_dim=6, qk_norm="full"),
    "adjacent pairs": replace(SMALL, head_dim=8, rotary_fraction=0.5, rope_adjacent=True),
    "scaled scores": replace(SMALL, attention_scale=0.3),
    "sinks": replace(SMALL, sinks=True),
    "window": replace(SMALL, window=3),
    "window of one": replace(SMALL, window=1),
    "window and sinks, by turns": replace(SMALL, window=2, full_layers=(1,), sinks=True),
    "linear": replace(SMALL, head_dim=8, rope_scaling=RopeScaling(kind="linear", factor=4.0)),
    "llama3": replace(SMALL, head_dim=8, rope_scaling=LLAMA3),
    "yarn": replace(SMALL, head_dim=8, rope_scaling=YARN),
    "latent": LATENT,
    "latent, queries whole": replace(LATENT, mla=replace(MLA, q_rank=None), rope_adjacent=False),
    "latent, yarn": replace(LATENT, rope_scaling=DEEPSEEK_YARN),
}

SWITCH = EncoderDecoderConfig(
    vocab=13, width=8, encoder_layers=2, decoder_layers=3, heads=2, head_dim=5, ffn=6, encoder_moe_every=2,
    decoder_moe_every=1, buckets=8, max_distance=9, router=RouterConfig(experts=4, top_k=1, normalize=False),
)  # fmt: skip


def tokens(B: int, S: int) -> Tensor:
    return torch.randint(SMALL.vocab, (B, S))


@torch.inference_mode()
def logits_of(model: Any, prompt: int = 14, tokens: int = 6) -> list[Tensor]:
    """Logits of a prompt, and of tokens after it, one by one."""
    given = torch.randint(model.config.vocab, (1, prompt + tokens), generator=torch.Generator().manual_seed(3))
    cache = KVCache(model.config, 1, prompt + tokens, dtype=model.embed.weight.dtype)
    steps = [given[:, :prompt], *given[:, prompt:].split(1, dim=1)]
    return [model(step, cache)[0] for step in steps]


# ---------------------------------------------------------------------------------------------------------------------
# Experts: T tokens, E experts, K experts per token, D model width, F an expert's hidden width.

ACTIVATIONS: Sequence[Activation] = get_args(Activation)
FORMATS = [(4, 32), (4, 128), (8, 32), (8, 128)]  # (bits, group) of packed weights


def routing_of(experts_TK: Any, experts: int, weights_TK: Tensor, dropped_TK: Any = None) -> Routing:
    chosen_TK = torch.as_tensor(experts_TK, dtype=torch.long)
    even_TE = torch.full((len(chosen_TK), experts), 1 / experts)
    out_TK = None if dropped_TK is None else torch.as_tensor(dropped_TK, dtype=torch.bool)
    return Routing(even_TE, even_TE, chosen_TK, weights_TK, out_TK)


def make(count: int, width: int, hidden: int, **kwargs: Any) -> Experts:
    """Experts in float64 whose biases, if any, are not zero."""
    experts = Experts(count, width, hidden, **kwargs).to(F64)
    with torch.no_grad():
        for bias in (experts.gate_up_bias, experts.down_bias):
            if bias is not None:
                bias.normal_()
    return experts


@dataclass
class Result:
    """What a layer gave, and the gradient of everything that went in."""

    y_TD: Tensor
    gradients: dict[str, Tensor]


def run(
    experts: Experts, backend: str, x_TD: Tensor, routing: Routing, up_TD: Tensor, dtype: torch.dtype = F64
) -> Result:
    """One pass each way, on copies in `dtype`; `up_TD` is the gradient of the output."""
    twin = Experts(
        experts.count,
        x_TD.shape[1],
        experts.down.shape[2],
        activation=experts.activation,
        bias=experts.down_bias is not None,
        backend=backend,
    )
    twin.to(F64).load_state_dict(experts.state_dict())
    twin.to(dtype)
    x_TD = x_TD.detach().to(dtype).requires_grad_()
    # Routers weigh in float32 at least.
    weights_TK = routing.weights_TK.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    y_TD = twin(x_TD, replace(routing, weights_TK=weights_TK))
    y_TD.backward(up_TD.to(y_TD.dtype))
    inputs = {"x": x_TD, "weights": weights_TK, **dict(twin.named_parameters())}
    gradients = {}
    for name, value in inputs.items():
        assert value.grad is not None, name
        assert value.grad.dtype == value.dtype
        gradients[name] = value.grad
    return Result(y_TD.detach(), gradients)


@contextmanager
def activations(*, exact: bool) -> Iterator[None]:
    """Whether activations that meet codes keep more than 8 bits."""
    before = exact_activations()
    set_exact_activations(exact)
    try:
        yield
    finally:
        set_exact_activations(before)


def distance(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖; where nothing is wanted, nothing may come."""
    assert got.shape == want.shape
    got, want = got.detach().to(F64), want.detach().to(F64)
    size, off = float(want.norm()), float((got - want).norm())
    return off / size if size else (0.0 if off == 0 else math.inf)


def agree(got: Result, want: Result, bound: float) -> None:
    assert distance(got.y_TD, want.y_TD) <= bound
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in want.gradients.items():
        assert distance(got.gradients[name], gradient) <= bound, name


@dataclass
class Case:
    experts: Experts
    x_TD: Tensor
    routing: Routing
    up_TD: Tensor


def case(
    T: int,
    E: int,
    K: int,
    D: int,
    F: int,
    *,
    activation: Activation = "swiglu",
    bias: bool = False,
    load: str = "even",
    drop: float = 0.0,
    strided: bool = False,
    seed: int = 0,
) -> Case:
    """A layer with everything drawn afresh. `load`: even, skewed (the first experts are favoured), or one (the last
    K experts get everything)."""
    torch.manual_seed(seed)
    taste_TE = torch.rand(T, E)
    if load == "skewed":
        taste_TE = taste_TE.pow(torch.arange(1, E + 1))
    elif load == "one":
        taste_TE = torch.arange(E).float().expand(T, E)
    dropped_TK = torch.rand(T, K) < drop if drop else None
    routing = routing_of(taste_TE.topk(K).indices, E, torch.rand(T, K, dtype=F64) + 0.1, dropped_TK)
    x_TD = torch.randn(D, T, dtype=F64).T if strided else torch.randn(T, D, dtype=F64)
    experts = make(E, D, F, activation=activation, bias=bias)
    return Case(experts, x_TD, routing, torch.randn(T, D, dtype=F64))


@st.composite
def cases(draw: st.DrawFn, tokens: tuple[int, int] = (0, 20), widths: tuple[int, int] = (1, 9)) -> Case:
    E = draw(st.integers(1, 9))
    return case(
        draw(st.integers(*tokens)),
        E,
        draw(st.integers(1, E)),
        draw(st.integers(*widths)),
        draw(st.integers(*widths)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        bias=draw(st.booleans()),
        load=draw(st.sampled_from(["even", "skewed", "one"])),
        drop=draw(st.sampled_from([0.0, 0.3, 1.0])),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Ended]


def calling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["handful", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Ended(code, *capsys.readouterr())

    return call


def document(result: Ended) -> Any:
    """What `--json` printed: all of stdout is one document, of plain JSON."""
    assert result.code == 0, result.err

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(result.out, parse_constant=refuse)


def mistake(result: Ended) -> str:
    """What a mistake printed: one line on stderr, nothing on stdout, exit status 1."""
    assert (result.code, result.out) == (1, "")
    assert "Traceback" not in result.err
    line, end = result.err[:-1], result.err[-1:]
    assert end == "\n"
    assert "\n" not in line
    assert line.startswith("error ")
    return line.removeprefix("error ")


# ---------------------------------------------------------------------------------------------------------------------
# A config.json.

# Sizes that differ from each other and from every default.
BASE: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
JAMBA = {
    "intermediate_size": 13,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "expert_layer_period": 3,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
}
