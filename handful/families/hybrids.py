"""Families that can be counted but that no config of ours describes: each is read straight from its config.json.

Every function takes the fields and returns what a model is made of (`count.py`). What each lacks to be run is beside it
in `HYBRIDS`. The parameters are those of the family's class in transformers, and the router's balance bias with them.

Legend: D width · V vocabulary · L layers · H heads · J key-value heads · d head width · E experts · K experts per token
· F an expert's hidden width · I a Mamba layer's inner width · N numbers of state for each of I · k convolution width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from handful.config import ModelConfig, RouterConfig
from handful.count import (
    Attended,
    Counted,
    Shape,
    State,
    Weights,
    count,
    feed_forward,
    grouped_attention,
    scores,
    tables,
)
from handful.errors import CheckpointError
from handful.families.config_fields import refusal
from handful.families.config_reader import ConfigReader

__all__ = ["HYBRIDS"]

# FLOPs of a recurrence, for each number of its state: it decays, takes in the input, and is read. Kernels that move
# many tokens on at once multiply more than this.
RECURRENCE = 3 * 2


def _routed(layers: int, experts: int, top_k: int, matrices: tuple[Shape, ...]) -> Weights:
    return Weights(part="routed_experts", layers=layers, matrices=matrices, copies=experts, active=top_k)


def _router(layers: int, experts: int, width: int, biased: int = 0) -> list[Weights]:
    """The scores' map in all layers, and a balance bias in `biased` of them."""
    balance = [Weights(part="routers", layers=biased, vectors=experts, untrained=experts)] if biased else []
    return [Weights(part="routers", layers=layers, matrices=((experts, width),), packed=False), *balance]


def _heads(f: ConfigReader, width: int, kv_heads: int | None = None) -> tuple[int, int, int]:
    """Heads, key-value heads and a head's width."""
    H = f.size("num_attention_heads")
    J = f.size("num_key_value_heads", default=H if kv_heads is None else kv_heads)
    if H % J:
        raise refusal("num_key_value_heads", J, f"a divisor of num_attention_heads = {H}")
    d = f.size("head_dim", default=width // H, told=False)
    if d < 1:
        raise refusal("num_attention_heads", H, f"at most hidden_size = {width}, or give head_dim")
    return H, J, d


def _tied(f: ConfigReader) -> bool:
    return f.flag("tie_word_embeddings", False, told=True)


def phimoe(f: ConfigReader) -> Counted:
    """Phi-3.5-MoE (arXiv:2404.14219): norms, projections and output layer have biases."""
    D, V, L, F = (f.size(n) for n in ("hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size"))
    E, K = f.size("num_local_experts"), f.size("num_experts_per_tok")
    H, J, d = _heads(f, D)
    biases = ((H + 2 * J) * d + D) * f.flag("attention_bias", False)
    _, window = f.get("sliding_window")
    window = f.size("sliding_window") if window is not None else None
    return Counted(
        weights=(
            *tables(V, D, _tied(f), head_bias=f.flag("lm_head_bias", False)),
            Weights(part="attention", layers=L, matrices=grouped_attention(D, H, J, d), vectors=biases),
            Weights(part="norms", layers=2 * L + 1, vectors=2 * D),
            *_router(L, E, D),
            _routed(L, E, K, feed_forward(D, F)),
        ),
        attention=(scores(L, H, J, d, window),),
        sent=D,
        router=RouterConfig(experts=E, top_k=K),
        context=f.size("max_position_embeddings", default=131072),
    )


def hunyuan_v1_moe(f: ConfigReader) -> Counted:
    """Hunyuan-A13B: a decoder with QK-norm per head and one shared expert."""
    D, L = f.size("hidden_size"), f.size("num_hidden_layers")
    H, J, d = _heads(f, D)
    F = f.same("moe_intermediate_size", "intermediate_size")
    bias = f.flag("attention_bias", False)
    f.only("use_qk_norm", True)
    return count(
        ModelConfig(
            vocab=f.size("vocab_size", default=290943),
            width=D,
            layers=L,
            heads=H,
            kv_heads=J,
            head_dim=d,
            router=RouterConfig(experts=f.size("num_experts"), top_k=f.same("moe_topk", "num_experts_per_tok")),
            expert_width=F,
            shared_width=F * f.same("num_shared_expert", default=1),
            qk_norm="head",
            qkv_bias=bias,
            o_bias=bias,
            tied=_tied(f),
            context=f.size("max_position_embeddings", default=2048),
        )
    )


def jamba(f: ConfigReader) -> Counted:
    """Jamba (arXiv:2403.19887): one attention layer among Mamba layers, an MoE in every other layer."""
    D, V, L, F = (f.size(n) for n in ("hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size"))
    E, K = f.size("num_experts", default=16), f.size("num_experts_per_tok", default=2)
    H, J, d = _heads(f, D, kv_heads=8)
    attending = _periodic(f, "attn_layer", L, 8, 4)
    moe = _periodic(f, "expert_layer", L, 2, 1) if E > 1 else 0
    inner = D * f.size("mamba_expand", default=2)
    states, kernel = f.size("mamba_d_state", default=16), f.size("mamba_d_conv", default=4)
    _, given = f.get("mamba_dt_rank")
    rank = -(-D // 16) if given in (None, "auto") else f.size("mamba_dt_rank")
    biases = f.flag("mamba_conv_bias", True) * inner + f.flag("mamba_proj_bias", False) * (2 * inner + D)
    mamba = L - attending
    projections = ((2 * inner, D), (rank + 2 * states, inner), (inner, rank), (D, inner))
    weights = [
        *tables(V, D, _tied(f)),
        Weights(part="attention", layers=attending, matrices=grouped_attention(D, H, J, d)),
        # Beside the biases: the step's own, the decay of each number of state, and what skips the recurrence.
        Weights(part="state_space", layers=mamba, matrices=projections, vectors=biases + inner * (1 + states + 1)),
        Weights(part="state_space", layers=mamba, matrices=((inner, kernel),), packed=False),
        Weights(part="norms", layers=mamba, vectors=rank + 2 * states),
        Weights(part="norms", layers=2 * L + 1, vectors=D),
        Weights(part="dense_ffn", layers=L - moe, matrices=feed_forward(D, F)),
    ]
    if moe:
        weights += [*_router(moe, E, D), _routed(moe, E, K, feed_forward(D, F))]
    return Counted(
        weights=tuple(weights),
        attention=(scores(attending, H, J, d),),
        state=_state(mamba, inner, states, inner, kernel),
        sent=D,
        router=RouterConfig(experts=E, top_k=K) if moe else None,
        context=f.size("max_position_embeddings", default=262144),
    )


def _periodic(f: ConfigReader, name: str, layers: int, period: int, offset: int) -> int:
    """How many layers i have i mod period = offset."""
    period, offset = f.size(f"{name}_period", default=period), f.size(f"{name}_offset", default=offset, least=0)
    if offset >= period:
        raise refusal(f"{name}_offset", offset, f"below {name}_period = {period}")
    return len(range(offset, layers, period))


def _state(layers: int, inner: int, states: int, convolved: int, kernel: int) -> State:
    """Mamba's: the recurrence, and the last inputs of the convolution."""
    numbers = layers * (inner * states + convolved * (kernel - 1))
    return State(numbers=numbers, flops=RECURRENCE * layers * inner * states)


def nemotron_h(f: ConfigReader) -> Counted:
    """Nemotron-H and Nemotron 3 (arXiv:2504.03624): every layer is one of Mamba-2, attention, MoE or feed-forward."""
    D, V = f.size("hidden_size"), f.size("vocab_size")
    kinds = _kinds(f)
    mamba, attending, moe, dense = (kinds.count(k) for k in ("linear_attention", "full_attention", "moe", "mlp"))
    bias, mlp_bias = f.flag("use_bias", False), f.flag("mlp_bias", False)
    f.only("attention_bias", False)
    f.only("mlp_hidden_act", "relu2")
    weights = [*tables(V, D, _tied(f)), Weights(part="norms", layers=len(kinds) + 1, vectors=D)]
    out: dict[str, Any] = {}
    if attending:
        H, J, d = _heads(f, D, kv_heads=8)
        d = f.size("head_dim", default=128)
        weights.append(Weights(part="attention", layers=attending, matrices=grouped_attention(D, H, J, d)))
        _, window = f.get("sliding_window")
        out["attention"] = (scores(attending, H, J, d, None if window is None else f.size("sliding_window")),)
    if mamba:
        heads, head_dim = f.size("mamba_num_heads"), f.size("mamba_head_dim")
        states = f.size("ssm_state_size", default=128)
        kernel = f.size("conv_kernel", "mamba_d_conv", default=4)
        inner = heads * head_dim
        convolved = inner + 2 * f.size("n_groups", "mamba_n_groups", default=8) * states
        projections = ((inner + convolved + heads, D), (D, inner))
        biases = f.flag("use_conv_bias", True) * convolved + bias * (inner + convolved + heads + D)
        weights += [
            Weights(part="state_space", layers=mamba, matrices=projections, vectors=biases + 3 * heads),
            Weights(part="state_space", layers=mamba, matrices=((convolved, kernel),), packed=False),
            Weights(part="norms", layers=mamba, vectors=inner),
        ]
        out["state"] = _state(mamba, inner, states, convolved, kernel)
    if dense:
        hidden = f.size("intermediate_size")
        network = feed_forward(D, hidden, gated=False)
        weights.append(Weights(part="dense_ffn", layers=dense, matrices=network, vectors=mlp_bias * (hidden + D)))
    if moe:
        E, K, F = (f.size(n) for n in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"))
        shared = f.size("moe_shared_expert_intermediate_size")
        matrices: tuple[Shape, ...] = feed_forward(D, shared, gated=False)
        vectors, latent = mlp_bias * (shared + D), D
        if (
            f.get("moe_latent_size")[1] is not None
        ):  # routed experts work in a latent: every token goes into it and back
            latent = f.size("moe_latent_size")
            matrices, vectors = (*matrices, (latent, D), (D, latent)), vectors + mlp_bias * (latent + D)
        weights += [
            *_router(moe, E, D, biased=moe),
            _routed(moe, E, K, feed_forward(latent, F, gated=False)),
            Weights(part="shared_experts", layers=moe, matrices=matrices, vectors=vectors),
        ]
        groups, best = (f.size(name, default=1, told=False) for name in ("n_group", "topk_group"))
        out |= {"router": RouterConfig(experts=E, top_k=K, groups=groups, top_groups=best), "sent": latent}
    return Counted(weights=tuple(weights), context=f.size("max_position_embeddings", default=4096), **out)


PATTERN = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}


def _kinds(f: ConfigReader) -> list[str]:
    """What each layer is: a list of names, or a string of one letter for each."""
    layers = f.size("num_hidden_layers", default=0, least=0, told=False)
    _, named = f.get("layers_block_type", "layer_types")
    _, pattern = f.get("hybrid_override_pattern")
    if named is not None:
        name = "layers_block_type" if f.values.get("layers_block_type") is not None else "layer_types"
        kinds = f.names(name, PATTERN.values(), len(named) if isinstance(named, list) else 1)
    elif pattern is None:
        raise CheckpointError("config.json: hybrid_override_pattern is missing")
    elif not isinstance(pattern, str) or set(pattern) - set(PATTERN):
        raise refusal("hybrid_override_pattern", pattern, f"a letter for every layer, of {' '.join(PATTERN)}")
    else:
        kinds = [PATTERN[letter] for letter in pattern]
    if not kinds or (layers and layers != len(kinds)):
        raise refusal("num_hidden_layers", layers, f"the number of layers that are listed, {len(kinds or [])}")
    return kinds


SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"


def deepseek_v4(f: ConfigReader) -> Counted:
    """DeepSeek-V4: compressed attention of two kinds, hyper-connections, and routing by token in the first layers."""
    D, V, L, F = (f.size(n) for n in ("hidden_size", "vocab_size", "num_hidden_layers", "moe_intermediate_size"))
    E, K = f.size("n_routed_experts"), f.size("num_experts_per_tok")
    H, d, rank = f.size("num_attention_heads"), f.size("head_dim"), f.size("q_lora_rank")
    groups, out_rank, streams = f.size("o_groups"), f.size("o_lora_rank"), f.size("hc_mult")
    for name, right in (("num_key_value_heads", 1), ("n_shared_experts", 1), ("attention_bias", False)):
        f.only(name, right)
    f.only("mlp_bias", False)
    if (H * d) % groups:
        raise refusal("o_groups", groups, f"a divisor of num_attention_heads x head_dim = {H * d}")
    kinds, every = _compressed(f, L), _rates(f)
    hashed = _hashed(f, L)
    # Queries through a low rank, one key that is also the value, and an output that heads give in groups.
    attention = ((rank, D), (H * d, rank), (d, D), (groups * out_rank, H * d // groups), (D, groups * out_rank))
    weights = [
        *tables(V, D, _tied(f)),
        Weights(part="attention", layers=L, matrices=attention, vectors=H),
        Weights(part="norms", layers=L, vectors=2 * D + rank + d),
        Weights(part="norms", vectors=D),
        # Two hyper-connections a layer mix n streams: weights to read, to write and to mix them; one reads at the end.
        Weights(
            part="streams",
            layers=2 * L,
            matrices=(((2 + streams) * streams, streams * D),),
            vectors=(2 + streams) * streams + 3,
        ),
        Weights(part="streams", matrices=((streams, streams * D),), vectors=streams + 1),
        *_router(L, E, D, biased=L - hashed),
        _routed(L, E, K, feed_forward(D, F)),
        Weights(part="shared_experts", layers=L, matrices=feed_forward(D, F)),
    ]
    # A key is its own value: the cache holds one vector of it.
    pair = H * 4 * d
    attended = [
        Attended(layers=L, flops=pair, decode_flops=pair, cached=d, window=f.size("sliding_window", default=128))
    ]
    if sparse := kinds.count(SPARSE):
        heads, width = f.size("index_n_heads", default=64), f.size("index_head_dim", default=128)
        # Two series of keys and gates, for attention and again for the index that chooses among them.
        matrices = ((2 * d, D), (2 * d, D), (2 * width, D), (2 * width, D), (heads * width, rank), (heads, D))
        positions = every[SPARSE] * 2 * (d + width)
        weights += [
            Weights(part="attention", layers=sparse, matrices=matrices, vectors=positions),
            Weights(part="norms", layers=sparse, vectors=d + width),
        ]
        # The index scores all compressed tokens, and attention takes the best; the cache holds both's keys.
        score, best = heads * 2 * (width + 1), f.size("index_topk", default=512)
        attended += [
            Attended(layers=sparse, flops=score, decode_flops=score, cached=width + d, every=every[SPARSE]),
            Attended(layers=sparse, flops=pair, decode_flops=pair, cached=0, window=best, every=every[SPARSE]),
        ]
    if heavy := kinds.count(HEAVY):
        weights += [
            Weights(part="attention", layers=heavy, matrices=((d, D), (d, D)), vectors=every[HEAVY] * d),
            Weights(part="norms", layers=heavy, vectors=d),
        ]
        attended.append(Attended(layers=heavy, flops=pair, decode_flops=pair, cached=d, every=every[HEAVY]))
    notes = []
    if hashed:
        notes.append(f"in {hashed} layers a table of the vocabulary names each token's experts; it is not counted")
    return Counted(
        weights=tuple(weights),
        sent=D,
        router=RouterConfig(experts=E, top_k=K),
        context=f.size("max_position_embeddings", default=1048576),
        attention=tuple(attended),
        notes=tuple(notes),
    )


def _compressed(f: ConfigReader, layers: int) -> list[str]:
    """What each layer attends to."""
    if (kinds := f.names("layer_types", (SLIDING, SPARSE, HEAVY), layers)) is not None:
        return kinds
    _, ratios = f.get("compress_ratios")
    of = {0: SLIDING, 4: SPARSE, 128: HEAVY}
    if ratios is not None:
        if not isinstance(ratios, list) or len(ratios) < layers or any(r not in of for r in ratios[:layers]):
            raise refusal("compress_ratios", ratios, f"a list with one of 0, 4, 128 for each of {layers} layers")
        return [of[ratio] for ratio in ratios[:layers]]
    f.assumed.append("layer_types = two heavily compressed, then both kinds in turn")
    return ([HEAVY] * 2 + [SPARSE if i % 2 else HEAVY for i in range(layers)])[:layers]


def _rates(f: ConfigReader) -> dict[str, int]:
    """How many tokens are compressed into one."""
    _, given = f.get("compress_rates")
    if given is not None and not isinstance(given, dict):
        raise refusal("compress_rates", given, "an object")
    inner = ConfigReader({SPARSE: 4, HEAVY: 128, **(given or {})})
    return {
        SPARSE: f.size("compress_rate_csa", default=inner.size(SPARSE), told=False),
        HEAVY: f.size("compress_rate_hca", default=inner.size(HEAVY), told=False),
    }


def _hashed(f: ConfigReader, layers: int) -> int:
    """How many layers choose experts by the token alone."""
    kinds = f.names("mlp_layer_types", ("hash_moe", "moe"), layers)
    first = f.size("num_hash_layers", default=3, least=0, told=kinds is None)
    return min(first, layers) if kinds is None else kinds.count("hash_moe")


# model_type -> how it is counted, and what it has that keeps it from being run.
HYBRIDS: dict[str, tuple[Callable[[ConfigReader], Counted], str]] = {
    "deepseek_v4": (deepseek_v4, "compressed attention, hyper-connections and routing by token"),
    "hunyuan_v1_moe": (hunyuan_v1_moe, "QK-norm after RoPE"),
    "jamba": (jamba, "Mamba layers"),
    "nemotron_h": (nemotron_h, "Mamba layers"),
    "phimoe": (phimoe, "LayerNorm, biases and a router of its own"),
}
