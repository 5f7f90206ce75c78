"""Every setting, as frozen values: RouterConfig, ModelConfig, BalanceConfig, TrainConfig.

A config is checked when it is made: a wrong value is a ConfigError that names the field, the value and what would be
right. Nothing here imports torch, so that a config can be priced (`cost.py`) at once. To and from JSON and TOML:
`config_io.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from handful.errors import ConfigError

__all__ = [
    "Activation",
    "BalanceConfig",
    "EncoderDecoderConfig",
    "MLAConfig",
    "ModelConfig",
    "RopeScaling",
    "RouterConfig",
    "TrainConfig",
]

Activation = Literal["swiglu", "geglu", "relu", "gelu", "swiglu_clamped"]
MOST_LAYERS = 10_000  # no model has a tenth of them; what a hostile config asks for must not be counted up to
GATED: frozenset[str] = frozenset({"swiglu", "geglu", "swiglu_clamped"})


def _need(ok: bool, owner: str, name: str, value: object, right: str) -> None:
    if not ok:
        raise ConfigError(f"{owner}.{name} = {value!r}: {right}")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a token's experts are chosen and weighted. A published router is a row of these values.

    experts            E, the experts of a layer.
    top_k              K, the experts of a token (with `choice="expert"`: of a token on average).
    choice             who chooses: each token its top K experts, or each expert its top tokens. Expert choice
                       (Zhou et al. 2022, arXiv:2202.09368) sees later tokens: it is for training studies, not causal.
    score              softmax over all experts, or an independent sigmoid per expert.
    normalize          divide the chosen weights by their sum.
    scale              multiply the weights by this, last.
    balance_bias       select by score + bias, weight by score alone. The bias gets no gradient; `balance.py` moves it.
    groups, top_groups experts stand in `groups` equal groups and a token may use only its best `top_groups`.
    group_score        a group's score: its best expert's ("max") or the sum of its two best ("top2").
    logits_bias        the router's linear map has a bias.
    jitter             training: multiply the router's input by uniform noise in 1 ± jitter (Switch).
    noisy_top_k        training: add normal noise, its size learned per expert, to the logits (Shazeer et al. 2017).
    random_second      training: keep a token's second expert with probability min(1, 2 x its weight) (GShard).
    capacity_factor    an expert takes at most ceil(factor · T · K / E) assignments in training and the rest are
                       dropped; None: dropless.
    eval_capacity_factor  the same outside training.
    sequence_capacity  an expert takes at most this many assignments of one sequence, in training and outside it (the
                       public Switch checkpoints); None: no such limit.
    drop_order         who is served first when an expert is full: earlier tokens ("token": causal), or all first
                       choices before any second choice ("choice", GShard's: a later token can push an earlier one out).
    """

    experts: int
    top_k: int
    choice: Literal["token", "expert"] = "token"
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    balance_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    logits_bias: bool = False
    jitter: float = 0.0
    noisy_top_k: bool = False
    random_second: bool = False
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    sequence_capacity: int | None = None
    drop_order: Literal["token", "choice"] = "token"

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, right: str) -> None:
            _need(ok, "router", name, getattr(self, name), right)

        need(self.experts >= 1, "experts", "at least 1")
        need(1 <= self.top_k <= self.experts, "top_k", f"from 1 to experts = {self.experts}")
        need(self.choice in ("token", "expert"), "choice", "'token' or 'expert'")
        need(self.score in ("softmax", "sigmoid"), "score", "'softmax' or 'sigmoid'")
        need(0 < self.scale < math.inf, "scale", "above 0")
        need(self.groups >= 1 and self.experts % self.groups == 0, "groups", f"a divisor of experts = {self.experts}")
        need(1 <= self.top_groups <= self.groups, "top_groups", f"from 1 to groups = {self.groups}")
        need(self.group_score in ("max", "top2"), "group_score", "'max' or 'top2'")
        group = self.experts // self.groups
        need(self.group_score == "max" or group >= 2, "group_score", f"'max', for groups of {group} expert")
        reach = group * self.top_groups
        need(self.top_k <= reach, "top_k", f"at most {reach}: {self.top_groups} groups of {group} experts")
        need(0 <= self.jitter < 1, "jitter", "from 0 to below 1")
        limit = self.sequence_capacity
        need(limit is None or limit >= 1, "sequence_capacity", "at least 1, or none for dropless")
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            need(value is None or 0 < value < math.inf, name, "above 0, or none for dropless")
            need(value is None or limit is None, name, f"none with sequence_capacity = {limit}")
        need(self.drop_order in ("token", "choice"), "drop_order", "'token' or 'choice'")
        need(not self.random_second or self.top_k == 2, "random_second", "false unless top_k = 2")
        if self.choice == "expert":
            for name, off in (("balance_bias", False), ("groups", 1), ("noisy_top_k", False), ("random_second", False)):
                need(getattr(self, name) == off, name, f"{off!r} with choice = 'expert'")
            for name in ("capacity_factor", "eval_capacity_factor", "sequence_capacity"):
                need(getattr(self, name) is None, name, "none with choice = 'expert', whose load is even by design")

    @property
    def independent(self) -> bool:
        """Outside training, what a token's experts are depends on no other token: none competes for capacity."""
        limited = self.eval_capacity_factor is not None or self.sequence_capacity is not None
        return self.choice == "token" and not limited


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention's sizes (DeepSeek-V2, arXiv:2405.04434).

    q_rank     rank of the query compression; None: queries are not compressed.
    kv_rank    rank of the key-value compression, which is what the cache holds.
    nope_dim   per-head width of queries and keys without position, rope_dim with it; v_dim of values.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int

    def __post_init__(self) -> None:
        for name in ("q_rank", "kv_rank", "nope_dim", "v_dim"):
            value = getattr(self, name)
            _need(value is None or value >= 1, "mla", name, value, "at least 1")
        _need(self.rope_dim >= 2 and self.rope_dim % 2 == 0, "mla", "rope_dim", self.rope_dim, "even and at least 2")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE's angles are changed so that a model reads further than it was trained to.

    kind               "linear": all angles divided by `factor`. "llama3" (Llama 3.1): long waves divided, short ones
                       kept, those between blended. "yarn" (arXiv:2309.00071): the same by the number of turns within
                       the original context, and cos and sin made larger.
    factor             how much further.
    original_context   tokens that the model was trained with (llama3, yarn).
    low_freq_factor, high_freq_factor   llama3: waves longer than original_context / low are divided, shorter than
                       original_context / high are kept.
    beta_fast, beta_slow   yarn: dimensions that turn more often than beta_fast are kept, less than beta_slow divided.
    truncate           yarn: the blend begins and ends at whole dimensions.
    attention_factor   yarn: what cos and sin are multiplied by; None: 0.1 · ln(factor) + 1, or by mscale.
    mscale, mscale_all_dim  yarn as DeepSeek has it: with m(s) = 0.1 · s · ln(factor) + 1, cos and sin are multiplied by
                       m(mscale) / m(mscale_all_dim), and latent attention's scores by m(mscale_all_dim)².
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, right: str) -> None:
            _need(ok, "rope_scaling", name, getattr(self, name), right)

        need(self.kind in ("linear", "llama3", "yarn"), "kind", "'linear', 'llama3' or 'yarn'")
        need(1 <= self.factor < math.inf, "factor", "at least 1")
        need(self.kind == "linear" or self.original_context >= 1, "original_context", "at least 1")
        if self.kind == "llama3":
            need(self.low_freq_factor > 0, "low_freq_factor", "above 0")
            need(self.high_freq_factor >= self.low_freq_factor, "high_freq_factor", "at least low_freq_factor")
        if self.kind == "yarn":
            need(self.beta_slow > 0, "beta_slow", "above 0")
            need(self.beta_fast >= self.beta_slow, "beta_fast", "at least beta_slow")
            need(self.mscale >= 0, "mscale", "at least 0")
            need(self.mscale_all_dim >= 0, "mscale_all_dim", "at least 0")
            factor = self.attention_factor
            need(factor is None or 0 < factor < math.inf, "attention_factor", "above 0, or none")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder. `router=None` is a dense model.

    vocab, width, layers     V, D and the number of blocks.
    heads, kv_heads, head_dim  attention; kv_heads < heads is grouped-query attention. None: heads, and width / heads.
    ffn                      hidden width of dense feed-forward layers (0 where there are none).
    expert_width             F, hidden width of one routed expert.
    shared_width             hidden width of the shared experts together (they are one wider expert); 0: none.
    shared_gate              the shared experts' output is multiplied by a learned sigmoid gate (Qwen2-MoE).
    dense_first, moe_every   layer i is an MoE when i >= dense_first and (i + 1) % moe_every == 0,
    dense_layers             and it is none of these.
    activation               of all feed-forward parts; expert_bias: routed experts have biases (gpt-oss).
    qk_norm                  RMSNorm on queries and keys: per head, or over the full projected width.
    qkv_bias, o_bias, sinks  attention's biases, and a learned sink per head (gpt-oss): a score that takes its share of
                             attention and gives no value.
    window                   a token attends to that many of the latest tokens, itself among them; None: to all.
    full_layers              the layers that attend to all the same.
    mla                      multi-head latent attention in place of grouped-query attention.
    rope_theta, rope_scaling  RoPE's base, and how its angles are stretched.
    rotary_fraction          the leading share of head_dim that RoPE turns.
    rope_adjacent            RoPE turns the pairs (2i, 2i + 1), and not (i, i + half).
    embedding_scale          what the embeddings are multiplied by,
    residual_scale           what a layer's two parts are multiplied by before they join the stream,
    attention_scale          what scores are multiplied by (None: one over the root of the head's width),
    logits_scale             what the logits are divided by: all four are Granite's.
    context                  the longest sequence the model is meant for.
    tied                     output embedding = input embedding.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn: int = 0
    router: RouterConfig | None = None
    expert_width: int = 0
    shared_width: int = 0
    shared_gate: bool = False
    dense_first: int = 0
    moe_every: int = 1
    dense_layers: tuple[int, ...] = ()
    activation: Activation = "swiglu"
    expert_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False
    o_bias: bool = False
    sinks: bool = False
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    mla: MLAConfig | None = None
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = 1.0
    rope_adjacent: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    logits_scale: float = 1.0
    norm_eps: float = 1e-6
    context: int = 2048
    tied: bool = True

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, right: str) -> None:
            _need(ok, "model", name, getattr(self, name), right)

        for name in ("vocab", "width", "layers", "heads", "moe_every", "context"):
            need(getattr(self, name) >= 1, name, "at least 1")
        need(self.layers <= MOST_LAYERS, "layers", f"at most {MOST_LAYERS}")
        for name in ("ffn", "expert_width", "shared_width", "dense_first"):
            need(getattr(self, name) >= 0, name, "at least 0")
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        need(self.n_kv_heads >= 1 and self.heads % self.n_kv_heads == 0, "kv_heads", f"a divisor of {self.heads} heads")
        if self.head_dim is None and self.mla is not None:
            object.__setattr__(self, "head_dim", self.mla.nope_dim + self.mla.rope_dim)
        if self.head_dim is None:
            need(self.width % self.heads == 0, "heads", f"a divisor of width = {self.width}, or give head_dim")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        need(self.d_head >= 1, "head_dim", "at least 1")
        need(0 < self.rotary_fraction <= 1, "rotary_fraction", "above 0, at most 1")
        need(self.rotary_dim % 2 == 0 and self.rotary_dim >= 2, "head_dim", "even within the part that RoPE turns")
        need(self.activation in get_args(Activation), "activation", f"one of {', '.join(get_args(Activation))}")
        need(self.qk_norm in ("none", "head", "full"), "qk_norm", "'none', 'head' or 'full'")
        need(self.norm_eps > 0, "norm_eps", "above 0")
        need(0 < self.rope_theta < math.inf, "rope_theta", "above 0")
        need(self.window is None or self.window >= 1, "window", "at least 1, or none")
        need(self.window is not None or not self.full_layers, "full_layers", "empty without a window")
        in_order = tuple(sorted({layer for layer in self.full_layers if 0 <= layer < self.layers}))
        need(self.full_layers == in_order, "full_layers", f"layers from 0 to {self.layers - 1}, in order")
        in_order = tuple(sorted({layer for layer in self.dense_layers if 0 <= layer < self.layers}))
        need(self.dense_layers == in_order, "dense_layers", f"layers from 0 to {self.layers - 1}, in order")
        for name in ("embedding_scale", "residual_scale", "logits_scale"):
            need(0 < getattr(self, name) < math.inf, name, "above 0")
        scale = self.attention_scale
        need(scale is None or 0 < scale < math.inf, "attention_scale", "above 0, or none")
        if self.mla is not None:
            plain = {"qk_norm": "none", "qkv_bias": False, "o_bias": False, "sinks": False, "window": None}
            for name, value in {**plain, "attention_scale": None, "rotary_fraction": 1.0}.items():
                need(getattr(self, name) == value, name, f"{value!r} with mla")
        need(not self.shared_gate or self.shared_width > 0, "shared_gate", "false without shared_width")
        if self.router is None:
            need(self.ffn >= 1, "ffn", "at least 1 in a dense model")
            for name in ("expert_width", "shared_width"):
                need(getattr(self, name) == 0, name, "0 without a router")
        else:
            need(self.expert_width >= 1, "expert_width", "at least 1 with a router")
            need(any(self.is_moe(i) for i in range(self.layers)), "dense_first", "few enough to leave an MoE layer")
            has_dense = not all(self.is_moe(i) for i in range(self.layers))
            need(not has_dense or self.ffn >= 1, "ffn", "at least 1 when some layers are dense")

    @property
    def n_kv_heads(self) -> int:
        return self.kv_heads if self.kv_heads is not None else self.heads

    @property
    def d_head(self) -> int:
        return self.head_dim if self.head_dim is not None else self.width // self.heads

    @property
    def rotary_dim(self) -> int:
        """The dimensions of a head that RoPE turns: the leading ones, or with MLA those that it has for them."""
        return self.mla.rope_dim if self.mla is not None else int(self.d_head * self.rotary_fraction)

    @property
    def gated(self) -> bool:
        """The activation multiplies a gate with an up projection (three matrices), or not (two)."""
        return self.activation in GATED

    def window_of(self, layer: int) -> int | None:
        """How many of the latest tokens block `layer` attends to; None: all."""
        return None if layer in self.full_layers else self.window

    def is_moe(self, layer: int) -> bool:
        """Whether block `layer`, counted from 0, routes to experts."""
        regular = layer >= self.dense_first and (layer + 1) % self.moe_every == 0
        return self.router is not None and regular and layer not in self.dense_layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The blocks that route to experts, by number."""
        return tuple(layer for layer in range(self.layers) if self.is_moe(layer))


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """The shape of an encoder-decoder with T5's attention and MoE layers (Switch Transformers, arXiv:2101.03961).

    vocab, width             V and D, of both stacks.
    encoder_layers, decoder_layers  blocks; a decoder's block has cross-attention too.
    heads, head_dim          of every attention, whose width is heads x head_dim; None: width / heads.
    ffn                      hidden width of every feed-forward network, dense or expert.
    router                   of every MoE layer.
    encoder_moe_every, decoder_moe_every  layer i is an MoE when i mod every = 1 mod every: with 1 every layer, with 2
                             the second, fourth, …, with 3 the second, fifth, …; with 0 none.
    activation               of all feed-forward parts.
    buckets, max_distance    relative positions fall into so many buckets, all from max_distance on into the last.
    tied                     output embedding = input embedding, and the logits are scaled by width^-0.5.
    start, stop              the token that every output begins with, and the one that ends it (None: none does).
    """

    vocab: int
    width: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    head_dim: int | None = None
    ffn: int
    router: RouterConfig
    encoder_moe_every: int = 2
    decoder_moe_every: int = 2
    activation: Activation = "relu"
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    tied: bool = True
    start: int = 0
    stop: int | None = 1

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, right: str) -> None:
            _need(ok, "encoder_decoder", name, getattr(self, name), right)

        for name in ("vocab", "width", "encoder_layers", "decoder_layers", "heads", "ffn"):
            need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("encoder_moe_every", "decoder_moe_every"):
            need(getattr(self, name) >= 0, name, "at least 0")
        if self.head_dim is None:
            need(self.width % self.heads == 0, "heads", f"a divisor of width = {self.width}, or give head_dim")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        need(self.d_head >= 1, "head_dim", "at least 1")
        need(self.activation in get_args(Activation), "activation", f"one of {', '.join(get_args(Activation))}")
        # Half the encoder's buckets look back and half ahead, and half of those hold one distance each.
        need(self.buckets >= 4 and self.buckets % 2 == 0, "buckets", "even, at least 4")
        need(self.max_distance > self.buckets // 2, "max_distance", f"above buckets / 2 = {self.buckets // 2}")
        need(self.norm_eps > 0, "norm_eps", "above 0")
        need(0 <= self.start < self.vocab, "start", f"a token of the vocabulary of {self.vocab}")
        need(self.stop is None or 0 <= self.stop < self.vocab, "stop", f"a token of the vocabulary of {self.vocab}")
        need(self.router.choice == "token", "router", "one with choice = 'token': an expert's choice sees later tokens")
        # Whatever the step above 1, a stack's second layer is its first MoE layer.
        first = min(1, self.encoder_layers - 1), min(1, self.decoder_layers - 1)
        has_moe = self.encoder_is_moe(first[0]) or self.decoder_is_moe(first[1])
        need(has_moe, "encoder_moe_every", "one that makes an MoE layer, or give decoder_moe_every such a value")

    @property
    def d_head(self) -> int:
        return self.head_dim if self.head_dim is not None else self.width // self.heads

    def encoder_is_moe(self, layer: int) -> bool:
        """Whether the encoder's block `layer`, counted from 0, routes to experts."""
        return _second_of_every(layer, self.encoder_moe_every)

    def decoder_is_moe(self, layer: int) -> bool:
        """The same of the decoder's."""
        return _second_of_every(layer, self.decoder_moe_every)


def _second_of_every(layer: int, every: int) -> bool:
    return every > 0 and layer % every == 1 % every


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """What keeps the experts busy; the losses are in `balance.py`.

    loss         "none", "switch" (per micro-batch), "global" (the same over the whole batch), "sequence" or "gshard".
    weight       of that loss in the training loss, per MoE layer (the mean over layers is what is added).
    bias_rate    u of the loss-free update b += u · sign(mean load - load); 0: none. Needs router.balance_bias.
    z_weight     of the router z-loss.
    """

    loss: Literal["none", "switch", "global", "sequence", "gshard"] = "none"
    weight: float = 0.0
    bias_rate: float = 0.0
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight", "bias_rate", "z_weight"):
            _need(getattr(self, name) >= 0, "balance", name, getattr(self, name), "at least 0")
        kinds = ("none", "switch", "global", "sequence", "gshard")
        _need(self.loss in kinds, "balance", "loss", self.loss, f"one of {', '.join(kinds)}")
        _need(self.loss == "none" or self.weight > 0, "balance", "weight", self.weight, f"above 0 for {self.loss!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained.

    steps, batch, context   optimizer steps, sequences in one, tokens in a sequence.
    accumulate              micro-batches that one step's sequences are cut into.
    lr, min_lr_ratio        peak learning rate, and the share of it that is left at the end.
    schedule                "cosine", or "wsd": warm up, stay, decay over the last `decay` share of the steps.
    warmup                  share of the steps over which the learning rate rises.
    dtype                   "auto" times both on this machine and says which it took; bfloat16 means autocast.
    eval_every              steps between held-out evaluations of at most `eval_tokens` tokens; 0: only at the end.
    checkpoint_every        steps between checkpoints; 0: only at the end.
    activation_checkpoint   keep only block inputs for the backward pass and compute the rest again.
    compile                 run the model through torch.compile.
    """

    steps: int = 500
    batch: int = 64
    context: int = 128
    accumulate: int = 1
    lr: float = 3e-3
    min_lr_ratio: float = 0.1
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    eval_every: int = 50
    eval_tokens: int = 131072
    checkpoint_every: int = 100
    activation_checkpoint: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, right: str) -> None:
            _need(ok, "train", name, getattr(self, name), right)

        for name in ("steps", "batch", "accumulate"):
            need(getattr(self, name) >= 1, name, "at least 1")
        need(self.context >= 2, "context", "at least 2")
        need(self.batch % self.accumulate == 0, "accumulate", f"a divisor of batch = {self.batch}")
        need(self.lr > 0, "lr", "above 0")
        need(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", "from 0 to 1")
        need(self.schedule in ("cosine", "wsd"), "schedule", "'cosine' or 'wsd'")
        need(0 <= self.warmup < 1, "warmup", "from 0 to below 1")
        need(0 <= self.decay <= 1, "decay", "from 0 to 1")
        need(self.weight_decay >= 0, "weight_decay", "at least 0")
        need(0 <= self.beta1 < 1, "beta1", "from 0 to below 1")
        need(0 <= self.beta2 < 1, "beta2", "from 0 to below 1")
        need(self.clip > 0, "clip", "above 0")
        need(self.dtype in ("auto", "float32", "bfloat16"), "dtype", "'auto', 'float32' or 'bfloat16'")
        need(self.seed >= 0, "seed", "at least 0")
        for name in ("eval_every", "checkpoint_every"):
            need(getattr(self, name) >= 0, name, "at least 0")
        need(self.eval_tokens >= 1, "eval_tokens", "at least 1")

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.context
