"""Both kinds of attention against plain rewrites, position after position; RoPE by hand; the cache, windows, padding.

Legend: B batch · S tokens · D width · H heads · J key-value heads · d head width
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import LATENT, LLAMA3, MLA, SHAPES, SMALL, YARN, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from handful.attention import Attention, LatentAttention
from handful.config import ModelConfig, RopeScaling
from handful.errors import ConfigError
from handful.model import Decoder
from handful.positions import KVCache, Span, rope_frequencies, rope_table, rotate

F64 = torch.float64
CPU = torch.device("cpu")


def decoder(config: ModelConfig) -> Decoder:
    """In float64 and evaluation mode, and no weight left at its special start (norms at 1, biases and sinks at 0)."""
    model = Decoder(config).to(F64).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


def close(got: Tensor, want: Tensor, rel: float = 1e-12) -> None:
    assert got.shape == want.shape
    assert float((got - want).detach().norm()) <= rel * float(want.detach().norm())


# ---------------------------------------------------------------------------------------------------------------------
# Plain rewrites: one sequence, head after head and position after position, in Python's own numbers where it can be.


def frequencies(config: ModelConfig) -> tuple[list[float], float]:
    """RoPE's angle per position for every pair, and what cos and sin are multiplied by: as the papers write them."""
    r, scaling = config.rotary_dim, config.rope_scaling
    plain = [config.rope_theta ** (-2 * i / r) for i in range(r // 2)]
    if scaling is None:
        return plain, 1.0
    out = []
    for i, f in enumerate(plain):
        wavelength = 2 * math.pi / f
        if scaling.kind == "linear":
            kept = 0.0
        elif scaling.kind == "llama3":
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            if wavelength < scaling.original_context / high:
                kept = 1.0
            elif wavelength > scaling.original_context / low:
                kept = 0.0
            else:
                kept = (scaling.original_context / wavelength - low) / (high - low)
        else:

            def dimension(turns: float) -> float:
                inner = scaling.original_context / (turns * 2 * math.pi)
                return r * math.log(inner) / (2 * math.log(config.rope_theta))

            first = max(0, math.floor(dimension(scaling.beta_fast)))
            last = min(r - 1, math.ceil(dimension(scaling.beta_slow)))
            kept = 1 - min(1.0, max(0.0, (i - first) / (last - first)))
        out.append(kept * f + (1 - kept) * f / scaling.factor)
    factor = 1.0
    if scaling.kind == "yarn":

        def grown(s: float) -> float:
            return 0.1 * s * math.log(scaling.factor) + 1

        factor = grown(scaling.mscale) / grown(scaling.mscale_all_dim) if scaling.mscale else grown(1.0)
    return out, factor


def turned(x_d: Tensor, position: int, config: ModelConfig) -> Tensor:
    angles, factor = frequencies(config)
    out_d, half = x_d.clone(), len(angles)
    for i, f in enumerate(angles):
        one, two = (2 * i, 2 * i + 1) if config.rope_adjacent else (i, i + half)
        a, b, angle = x_d[one], x_d[two], position * f
        out_d[one] = factor * (a * math.cos(angle) - b * math.sin(angle))
        out_d[two] = factor * (a * math.sin(angle) + b * math.cos(angle))
    return out_d


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def linear(layer: Any, x: Tensor) -> Tensor:
    out: Tensor = layer.weight @ x + (0 if layer.bias is None else layer.bias)
    return out


def mixed(query: Tensor, keys: list[Tensor], values: list[Tensor], scale: float, sink: Tensor | None) -> Tensor:
    """One query's answer from the keys that it sees."""
    scores = torch.stack([scale * query @ key for key in keys])
    total = scores.exp().sum() + (0 if sink is None else sink.exp())
    return sum((score.exp() / total * value for score, value in zip(scores, values, strict=True)), torch.zeros(()))


def slow_attention(attn: Any, config: ModelConfig, x_SD: Tensor) -> Tensor:
    H, J, d, eps = config.heads, config.n_kv_heads, config.d_head, config.norm_eps
    queries, keys, values = [], [], []
    for t, x_D in enumerate(x_SD):
        q, k, v = linear(attn.q, x_D), linear(attn.k, x_D), linear(attn.v, x_D)
        if config.qk_norm == "full":
            q, k = norm(q, attn.q_norm.weight, eps), norm(k, attn.k_norm.weight, eps)
        q_Hd, k_Jd = list(q.split(d)), list(k.split(d))
        if config.qk_norm == "head":
            q_Hd = [norm(h, attn.q_norm.weight, eps) for h in q_Hd]
            k_Jd = [norm(h, attn.k_norm.weight, eps) for h in k_Jd]
        queries.append([turned(h, t, config) for h in q_Hd])
        keys.append([turned(h, t, config) for h in k_Jd])
        values.append(list(v.split(d)))
    scale = 1 / math.sqrt(d) if config.attention_scale is None else config.attention_scale
    window = config.window_of(attn.layer) or len(x_SD)
    out = []
    for t in range(len(x_SD)):
        seen = range(max(0, t - window + 1), t + 1)
        heads = [
            mixed(
                queries[t][h],
                [keys[s][h * J // H] for s in seen],
                [values[s][h * J // H] for s in seen],
                scale,
                None if attn.sinks is None else attn.sinks[h],
            )
            for h in range(H)
        ]
        out.append(linear(attn.o, torch.cat(heads)))
    return torch.stack(out)


def slow_latent_attention(attn: Any, config: ModelConfig, x_SD: Tensor) -> Tensor:
    m = config.mla
    assert m is not None
    up = attn.kv_up.view(config.heads, m.nope_dim + m.v_dim, m.kv_rank)
    queries, keys, values = [], [], []
    for t, x_D in enumerate(x_SD):
        if m.q_rank is None:
            q = linear(attn.q, x_D)
        else:
            q = linear(attn.q_up, norm(linear(attn.q_down, x_D), attn.q_norm.weight, 1e-6))
        parts = [h.split([m.nope_dim, m.rope_dim]) for h in q.split(m.nope_dim + m.rope_dim)]
        queries.append([torch.cat([n, turned(r, t, config)]) for n, r in parts])
        latent, k_rope = linear(attn.kv_down, x_D).split([m.kv_rank, m.rope_dim])
        latent, k_rope = norm(latent, attn.kv_norm.weight, 1e-6), turned(k_rope, t, config)
        keys.append([torch.cat([head[: m.nope_dim] @ latent, k_rope]) for head in up])
        values.append([head[m.nope_dim :] @ latent for head in up])
    scale = 1 / math.sqrt(m.nope_dim + m.rope_dim)
    if config.rope_scaling is not None:
        scale *= (0.1 * config.rope_scaling.mscale_all_dim * math.log(config.rope_scaling.factor) + 1) ** 2
    out = []
    for t in range(len(x_SD)):
        heads = [
            mixed(queries[t][h], [k[h] for k in keys[: t + 1]], [v[h] for v in values[: t + 1]], scale, None)
            for h in range(config.heads)
        ]
        out.append(linear(attn.o, torch.cat(heads)))
    return torch.stack(out)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_equals_a_plain_rewrite(name: str, layer: int) -> None:
    config = SHAPES[name]
    attn: Any = decoder(config).layers[layer].attn
    slow = slow_attention if isinstance(attn, Attention) else slow_latent_attention
    x_BSD = torch.randn(2, 7, 8, dtype=F64)
    got = attn(x_BSD, Span.of(config, 7, None, None, CPU))
    for b in range(2):
        close(got[b], slow(attn, config, x_BSD[b]), rel=1e-6)  # RoPE's angles are float32


# ---------------------------------------------------------------------------------------------------------------------
# RoPE.


def table(config: ModelConfig, start: int, end: int) -> tuple[Tensor, Tensor]:
    return rope_table(rope_frequencies(config), torch.arange(start, end))


def test_rotate_by_hand() -> None:
    config = replace(SMALL, heads=1, kv_heads=1, head_dim=2)
    cos, sin = table(config, 0, 3)
    assert cos.shape == (3, 1, 1)
    x_BSHd = torch.tensor([1.0, 0.0]).expand(1, 3, 1, 2)  # turned by 0, 1 and 2 radians
    want = [[1, 0], [0.5403023, 0.8414710], [-0.4161468, 0.9092974]]
    close(rotate(x_BSHd, (cos, sin))[0, :, 0], torch.tensor(want), rel=1e-6)
    up_BSHd = torch.tensor([0.0, 2.0]).expand(1, 3, 1, 2)
    close(rotate(up_BSHd, (cos, sin))[0, 1, 0], torch.tensor([-1.6829420, 1.0806046]), rel=1e-6)


def test_rotate_pairs_halves_and_leaves_the_rest() -> None:
    config = replace(SMALL, head_dim=8, rotary_fraction=0.5)  # pairs (0, 2) and (1, 3); the second turns 1/10 as fast
    rope = table(config, 1, 2)
    x_BSHd = torch.tensor([1.0, 1, 0, 0, 5, 6, 7, 8]).view(1, 1, 1, 8)
    want = [0.5403023, 0.9950042, 0.8414710, 0.0998334, 5, 6, 7, 8]
    close(rotate(x_BSHd, rope).flatten(), torch.tensor(want), rel=1e-6)
    # The same pairs side by side come out as halves too.
    beside_BSHd = torch.tensor([1.0, 0, 1, 0, 5, 6, 7, 8]).view(1, 1, 1, 8)
    close(rotate(beside_BSHd, rope, adjacent=True).flatten(), torch.tensor(want), rel=1e-6)


def test_attention_depends_on_distance_alone() -> None:
    attn: Any = decoder(SMALL).layers[0].attn
    x_BSD = torch.randn(1, 6, 8, dtype=F64)
    span = Span.of(SMALL, 6, None, None, CPU)
    close(attn(x_BSD, replace(span, rope=table(SMALL, 20, 26))), attn(x_BSD, span), rel=1e-5)
    # A single pair: <R_m q, R_n k> is the same for the same n - m, and another for another.
    q, k = torch.randn(2, 1, 1, 1, 2, dtype=F64)

    def product(m: int, n: int) -> float:
        turned = [rotate(v, table(SMALL, p, p + 1)) for v, p in ((q, m), (k, n))]
        return float((turned[0] * turned[1]).sum())

    assert product(3, 8) == pytest.approx(product(11, 16), rel=1e-5)
    assert abs(product(3, 8) - product(3, 9)) > 1e-3


def test_scaled_angles_by_hand() -> None:
    """Of a Llama-3.1-like head: the quickest pair is kept, the slowest divided by the factor, one between blended."""
    config = replace(SMALL, heads=1, kv_heads=1, head_dim=6, rope_theta=1e6, rope_scaling=LLAMA3)
    cos, sin = table(config, 1, 2)
    angles = torch.atan2(sin, cos).flatten()
    # Waves of 2π, 628 and 62832 tokens; kept below 10, divided above 40.
    close(angles, torch.tensor([1.0, 0.01 / 8, 0.0001 / 8]), rel=1e-6)
    blended = replace(config, rope_theta=8.0**3)  # waves of 6.28, 50.3 and 402; the second at 25.1 with theta = 64
    second = torch.atan2(*reversed(table(replace(blended, rope_theta=64.0), 1, 2))).flatten()[1]
    kept = (40 / (2 * math.pi * 4) - 1) / 3
    assert float(second) == pytest.approx(kept / 4 + (1 - kept) / 32, rel=1e-6)
    # YaRN makes cos and sin larger: 0.1 · ln(factor) + 1, and nothing where DeepSeek's two scales are alike.
    for scaling, factor in ((YARN, 1 + 0.1 * math.log(4)), (replace(YARN, mscale=0.7, mscale_all_dim=0.7), 1.0)):
        cos, _ = table(replace(config, rope_scaling=scaling), 0, 1)
        close(cos.flatten(), torch.full((3,), factor), rel=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "dynamic", "factor": 2.0}, "kind = 'dynamic': 'linear', 'llama3' or 'yarn'"),
        ({"kind": "linear", "factor": 0.5}, "factor = 0.5: at least 1"),
        ({"kind": "linear", "factor": math.inf}, "factor = inf: at least 1"),
        ({"kind": "yarn", "factor": 2.0}, "original_context = 0: at least 1"),
        ({**vars(LLAMA3), "high_freq_factor": 0.5}, "high_freq_factor = 0.5: at least low_freq_factor"),
        ({**vars(YARN), "beta_fast": 0.1}, "beta_fast = 0.1: at least beta_slow"),
        ({**vars(YARN), "attention_factor": 0.0}, "attention_factor = 0.0: above 0"),
    ],
)
def test_scalings_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^rope_scaling.{message}"):
        RopeScaling(**values)


# ---------------------------------------------------------------------------------------------------------------------
# Heads, sinks, windows.


def test_grouped_queries_are_repeated_heads() -> None:
    config = replace(SMALL, qkv_bias=True, sinks=True)
    grouped, full = decoder(config), decoder(replace(config, kv_heads=4))
    state = grouped.state_dict()
    for name, value in state.items():
        if ".attn.k." in name or ".attn.v." in name:  # rows are J heads of d
            state[name] = value.unflatten(0, (2, 2)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    batch = tokens(2, 7)
    close(full(batch)[0], grouped(batch)[0])


def test_a_sink_far_below_the_scores_is_none_and_one_far_above_takes_all() -> None:
    model = decoder(replace(SMALL, sinks=True, layers=1))
    attn: Any = model.layers[0].attn
    x_BSD, span = torch.randn(2, 5, 8, dtype=F64), Span.of(SMALL, 5, None, None, CPU)
    with torch.no_grad():
        attn.sinks.fill_(-50.0)
        drowned = attn(x_BSD, span)
        attn.sinks.fill_(50.0)
        assert float(attn(x_BSD, span).abs().max()) < 1e-12
    attn.sinks = None
    close(drowned, attn(x_BSD, span))


@pytest.mark.parametrize("name", ["sinks", "window", "yarn", "latent, yarn"])
def test_gradients(name: str) -> None:
    config = SHAPES[name]
    attn: Any = decoder(config).layers[0].attn
    span = Span.of(config, 4, None, None, CPU)
    parameters = dict(attn.named_parameters())

    def run(x_BSD: Tensor, *values: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(attn, dict(zip(parameters, values, strict=True)), (x_BSD, span))
        return out

    x_BSD = torch.randn(1, 4, 8, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x_BSD, *parameters.values()))


def test_a_window_forgets() -> None:
    """With one layer, a token's logits change with the tokens in its window and with no other."""
    model = decoder(replace(SMALL, layers=1, window=3))
    batch = tokens(1, 8)
    for changed in range(8):
        other = batch.clone()
        other[0, changed] = (other[0, changed] + 1) % 13
        moved = (model(other)[0] - model(batch)[0])[0].norm(dim=-1) > 1e-9
        assert moved.tolist() == [0 <= t - changed < 3 for t in range(8)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window = 0: at least 1"),
        ({"full_layers": (0,)}, r"full_layers = \(0,\): empty without a window"),
        ({"window": 2, "full_layers": (1, 0)}, r"full_layers = \(1, 0\): layers from 0 to 1, in order"),
        ({"window": 2, "full_layers": (2,)}, r"full_layers = \(2,\): layers from 0 to 1, in order"),
        ({"attention_scale": 0.0}, "attention_scale = 0.0: above 0"),
        ({"logits_scale": 0.0}, "logits_scale = 0.0: above 0"),
        ({"residual_scale": math.inf}, "residual_scale = inf: above 0"),
        ({"mla": MLA, "qk_norm": "none", "sinks": True}, "sinks = True: False with mla"),
        ({"mla": MLA, "qk_norm": "none", "window": 4}, "window = 4: None with mla"),
    ],
)
def test_configs_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.{message}"):
        replace(SMALL, **changes)


def test_latent_sizes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"^mla.rope_dim = 3: even and at least 2$"):
        replace(MLA, rope_dim=3)
    with pytest.raises(ConfigError, match=r"^mla.kv_rank = 0: at least 1$"):
        replace(MLA, kv_rank=0)


# ---------------------------------------------------------------------------------------------------------------------
# The cache, and padding.


@pytest.mark.parametrize("chunks", [[4] + [1] * 5, [1] * 9, [3, 1, 2, 3], [9]], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_cached_decoding_equals_the_full_pass(name: str, chunks: list[int]) -> None:
    config = SHAPES[name]
    model, batch = decoder(config), tokens(2, 9)
    want, _ = model(batch)
    cache = KVCache(config, 2, 9, dtype=F64)
    parts = [model(part, cache)[0] for part in batch.split(chunks, dim=1)]
    assert cache.length == cache.capacity == 9
    close(torch.cat(parts, dim=1), want)


def test_latent_attention_caches_the_latents_alone() -> None:
    cache = KVCache(LATENT, 2, 9)
    assert [[t.shape for t in held] for held in cache.keys_values] == [[(2, 1, 9, MLA.kv_rank + MLA.rope_dim)]] * 2
    assert isinstance(decoder(LATENT).layers[0].attn, LatentAttention)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(SHAPES)),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    new=st.integers(0, 3),
)
def test_a_padded_batch_is_each_sequence_alone(name: str, lengths: list[int], new: int) -> None:
    """Sequences of several lengths, padded in front, read at once and then decoded, one token at a time."""
    config = SHAPES[name]
    model = decoder(config)
    S = max(lengths)
    sequences = [tokens(1, length + new) for length in lengths]
    padding_B = torch.tensor([S - length for length in lengths])
    batch = torch.cat([torch.cat([tokens(1, S - n), seq], dim=1) for n, seq in zip(lengths, sequences, strict=True)])
    cache = KVCache(config, len(lengths), S + new, dtype=F64)
    parts = [model(batch[:, :S], cache, padding_B=padding_B)[0]]
    parts += [model(batch[:, S + i : S + i + 1], cache)[0] for i in range(new)]
    whole, _ = model(batch, padding_B=padding_B)
    for b, sequence in enumerate(sequences):
        alone, _ = model(sequence)
        close(torch.cat(parts, dim=1)[b, S - lengths[b] :], alone[0])
        close(whole[b, S - lengths[b] :], alone[0])
    assert bool(whole.isfinite().all())


def test_padding_is_given_once() -> None:
    model, cache = decoder(SMALL), KVCache(SMALL, 1, 6, dtype=F64)
    model(tokens(1, 3), cache, padding_B=torch.tensor([1]))
    with pytest.raises(ConfigError, match=r"^padding_B: only with the first tokens of a cache, or without one$"):
        model(tokens(1, 1), cache, padding_B=torch.tensor([1]))


# ---------------------------------------------------------------------------------------------------------------------
# Scales around the blocks.


def test_granite_scales() -> None:
    """Each scale against the same model with the scale put into weights."""
    config = replace(SMALL, layers=1, tied=False, embedding_scale=3.0, residual_scale=0.5, logits_scale=4.0)
    model, plain = decoder(config), decoder(replace(SMALL, layers=1, tied=False))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["embed.weight"] *= 3
    state["layers.0.attn.o.weight"] *= 0.5
    state["layers.0.ffn.down.weight"] *= 0.5
    state["head.weight"] /= 4
    plain.load_state_dict(state)
    batch = tokens(2, 6)
    close(model(batch)[0], plain(batch)[0])
