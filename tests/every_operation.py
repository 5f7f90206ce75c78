"""Computes by every operation of the native extension, in every dtype and format, held against float64.

    python tests/every_operation.py LEVEL

LEVEL is what this CPU must turn out to have, as HANDFUL_ISA names it: `none` asserts that there are no kernels, and
computes all the same through torch. It is for CPUs that are not at hand: on any computer qemu-x86_64 -cpu Haswell-noTSX
has AVX2 and nothing above it, and -cpu Nehalem neither; `make sanitize` emulates all levels. It prints how far
off each dtype and format is, and fails if that is too far or if an operation was not called.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from handful import memory
from handful.config import ModelConfig, RouterConfig
from handful.experts import Experts
from handful.experts.quantize_model import quantize_model
from handful.experts.quantized import QuantizedExperts, QuantizedLinear
from handful.kernels.extension import available
from handful.loss import linear_cross_entropy
from handful.machine import machine, native_error
from handful.model import Decoder
from handful.positions import KVCache
from handful.quantize import Packed, unpack
from handful.routing import Choice, Routing
from handful.sampling import Sampling, sample

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64

# The features that tell a level from the one above: there, and not there.
LEVELS = {
    "none": (set(), {"avx2"}), "avx2": ({"avx2"}, {"avx_vnni", "avx512"}), "avx_vnni": ({"avx_vnni"}, {"avx512"}),
    "avx512f": ({"avx512"}, {"avx512_vnni"}), "avx512": ({"avx512_vnni", "avx512_bf16"}, {"amx_int8"}),
    "amx": ({"amx_int8", "amx_bf16"}, set()),
}  # fmt: skip

CONFIG = ModelConfig(
    vocab=64, width=96, layers=2, heads=4, kv_heads=2, ffn=80, qk_norm="head", context=96, dense_first=1,
    expert_width=72, shared_width=40, shared_gate=True, router=RouterConfig(experts=8, top_k=3),
)  # fmt: skip
FORMS = [
    (dtype, bits, group) for dtype in (F32, BF16) for bits, group in ((0, 0), (8, 32), (8, 128), (4, 32), (4, 128))
]


def apart(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


def set_weight(module: nn.Module, name: str, packed: Packed) -> None:
    getattr(module, name).data.copy_(unpack(packed, F64))


def exact(model: Decoder, plain: Decoder) -> Decoder:
    """In float64, the model that `model` is by its weights as stored; `plain` is what it was quantized from."""
    wide = copy.deepcopy(plain).double()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            for part in ("gate_up", "down"):
                set_weight(wide.get_submodule(name), part, getattr(module, part).value)
        elif isinstance(module, QuantizedLinear):
            set_weight(wide.get_submodule(name), "weight", module.packed.value)
    return wide


@contextmanager
def looked_at() -> Iterator[None]:
    """Every module is called by itself: somebody looks at all of them."""
    handle = register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


def run(model: Decoder, tokens_BS: Tensor, prompt: int) -> tuple[Tensor, list[list[Routing]]]:
    """Logits of a prompt and of the tokens after it, one by one, and every pass's routings."""
    B, S = tokens_BS.shape
    cache = KVCache(model.config, B, S, dtype=model.embed.weight.dtype)
    passes = [model(part, cache) for part in tokens_BS.split([prompt] + [1] * (S - prompt), dim=1)]
    return torch.cat([logits for logits, _ in passes], 1), [routings for _, routings in passes]


@torch.inference_mode()
def decode(dtype: torch.dtype, bits: int, group: int) -> float:
    """A model's logits beside those of float64 with the same experts chosen: prompts long and short, and decoding."""
    torch.manual_seed(0)
    plain = Decoder(CONFIG).to(dtype).eval()
    model = copy.deepcopy(plain)
    if bits:
        quantize_model(model, bits=bits, group=group)
    wide = exact(model, plain)
    tokens_BS = torch.randint(CONFIG.vocab, (1, 45))
    worst = 0.0
    for looked, prompt in ((False, 40), (False, 5), (True, 5)):
        if looked:
            with looked_at():
                got, passes = run(model, tokens_BS[:, : prompt + 4], prompt)
        else:
            got, passes = run(model, tokens_BS[:, : prompt + 4], prompt)
        layers = [Choice(torch.cat([r.experts_TK for r in layer])) for layer in zip(*passes, strict=True)]
        want, _ = wide(tokens_BS[:, : prompt + 4], routing=layers)
        worst = max(worst, apart(got, want))
        assert sample(got[0, -1], Sampling(temperature=0)) == int(got[0, -1].argmax())
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder, "experts.pack")
        memory.pack(plain, pack, quantize=bits or None, group=group or 32)
        if not available():  # a store's plain loop has the bits of the plain loop
            for module in model.modules():
                if isinstance(module, Experts):
                    module.backend = "reference"
        whole, _ = run(model, tokens_BS[:, :9], 5)
        stored = copy.deepcopy(plain)
        if bits:
            quantize_model(
                stored,
                bits=bits,
                group=group,
                skip=[name for name, m in stored.named_modules() if isinstance(m, Experts)],
            )
        with memory.attach(stored, pack, 1 << 30):
            again, _ = run(stored, tokens_BS[:, :9], 5)
        assert again.equal(whole), "a memory budget changed the logits"
    return worst


def train(dtype: torch.dtype) -> float:
    """Experts' output and all gradients beside the plain loop's in float64."""
    torch.manual_seed(1)
    experts = Experts(6, 48, 40, bias=True).to(dtype)
    wide = copy.deepcopy(experts).double()
    wide.backend = "reference"
    x_TD = torch.randn(50, 48).to(dtype).requires_grad_()
    y_TD, wide_x = torch.randn(50, 48).to(dtype), x_TD.detach().double().requires_grad_()
    weights_TK, experts_TK = torch.rand(50, 6).topk(2)
    routing = Routing(torch.zeros(50, 6), torch.zeros(50, 6), experts_TK, weights_TK)
    got, want = experts(x_TD, routing), wide(wide_x, routing)
    got.backward(y_TD)
    want.backward(y_TD.double())
    pairs = [(got, want), (x_TD.grad, wide_x.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(experts.parameters(), wide.parameters(), strict=True)]
    worst = 0.0
    for a, b in pairs:
        assert a is not None
        assert b is not None
        worst = max(worst, apart(a, b))
    return worst


def loss() -> float:
    """The next-token loss and its gradients beside those of float64."""
    torch.manual_seed(2)
    x_TD, w_VD, targets_T = torch.randn(30, 24), torch.randn(50, 24), torch.randint(50, (30,))
    found = []
    for dtype in (F32, F64):
        x, w = (t.to(dtype, copy=True).requires_grad_() for t in (x_TD, w_VD))
        made = linear_cross_entropy(x, w, targets_T)
        made.backward()
        assert x.grad is not None
        assert w.grad is not None
        found.append([made, x.grad, w.grad])
    return max(apart(a, b) for a, b in zip(*found, strict=True))


def main(level: str) -> None:
    kernels = available()
    isa = set(machine().isa if kernels else ())
    has, lacks = LEVELS[level]
    assert has <= isa, f"{level}: the kernels have {sorted(isa)}"
    assert not lacks & isa, f"{level}: the kernels have {sorted(isa)}"
    print(f"{level}: {native_error() or ' '.join(sorted(isa))}", flush=True)
    bound = {F32: 1e-4, BF16: 4e-2}  # float32 of three layers; of bfloat16 about ten roundings a layer
    with torch.autograd.profiler.profile() as seen:
        for dtype, bits, group in (
            FORMS if kernels else FORMS[::4]
        ):  # torch is the same in all of them, and slow to emulate
            off = decode(dtype, bits, group)
            # Codes meet tokens as whole numbers: in bfloat16 of 8 bits.
            print(f"{str(dtype)[6:]}{f' int{bits}/{group}' if bits else ''}: {off:.1e} off", flush=True)
            assert off <= bound[dtype], (dtype, bits, group, off)
        off = loss()
        print(f"loss: {off:.1e} off", flush=True)
        assert off <= 1e-5
        for dtype in (F32, BF16):
            off = train(dtype)
            print(f"{str(dtype)[6:]} gradients: {off:.1e} off", flush=True)
            assert off <= {F32: 1e-5, BF16: 2e-2}[dtype]
        if kernels:
            torch.ops.handful.read_bandwidth(torch.ones(1 << 20, dtype=torch.uint8), 1)
    if not kernels:
        return
    # Its names as they come: to make tables of all events takes longer than all else.
    assert seen.kineto_results is not None
    events = seen.kineto_results.events()
    called = {event.name() for event in events if event.name().startswith("handful::")}
    named = torch._C._dispatch_get_all_op_names()
    nothing = ("isa", "levels", "limits", "exact_activations", "set_exact_activations")  # that they multiply
    said = {f"handful::{name}" for name in nothing}
    names = {name for name in named if name.startswith("handful::")} - said
    assert called == names, f"not called: {sorted(names - called)}"
    print(f"all {len(names)} operations were called")


if __name__ == "__main__":
    main(sys.argv[1])
