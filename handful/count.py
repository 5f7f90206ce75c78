"""What a model is made of, from its config alone: which matrices in how many layers, what its tokens do to each other,
what a sequence leaves in memory. `cost.py` prices it.

    Counted = Weights (attention, experts, norms, …) + Attended (who attends to whom) + State (what a recurrence keeps)

`count` makes one of a ModelConfig, `count_encoder_decoder` of an EncoderDecoderConfig. Families that neither describes
(Mamba layers, hyper-connections, …) are counted in `families/hybrids.py`, straight from their config.json.

Legend: D model width · F an expert's hidden width · E experts · K experts per token · V vocabulary · H heads ·
J key-value heads · d head width
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from handful.config import EncoderDecoderConfig, ModelConfig, RouterConfig

__all__ = [
    "Attended",
    "Counted",
    "Pass",
    "Shape",
    "State",
    "Weights",
    "count",
    "count_encoder_decoder",
    "counted",
    "feed_forward",
    "grouped_attention",
    "scores",
    "tables",
]

Pass = Literal["training", "prefill", "decode"]
# Relative positions know no longest sequence; the published encoder-decoders were trained with this many tokens.
T5_CONTEXT = 512
EVERY: tuple[Pass, ...] = ("training", "prefill", "decode")
Part = Literal[
    "embeddings",
    "attention",
    "state_space",
    "routers",
    "routed_experts",
    "shared_experts",
    "dense_ffn",
    "streams",
    "norms",
    "head",
]
Shape = tuple[int, int]  # (outputs, inputs)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of one kind.

    part       where `cost.Parts` counts them.
    layers     how many layers have them.
    matrices   the shapes, (outputs, inputs), by which a token is multiplied. In one copy.
    vectors    the numbers beside them: biases, norms, a table that is looked up. In one copy.
    copies, active  how many are held (E experts), and how many of them a token uses (K).
    untrained  of the vectors, those that no gradient reaches (the router's balance bias).
    passes     in which a token is multiplied by them.
    packed     `quantize_model` quantizes the matrices.
    """

    part: Part
    layers: int = 1
    matrices: tuple[Shape, ...] = ()
    vectors: int = 0
    copies: int = 1
    active: int = 1
    untrained: int = 0
    passes: tuple[Pass, ...] = EVERY
    packed: bool = True

    @property
    def multiplied(self) -> int:
        """Numbers of one copy's matrices."""
        return sum(outputs * inputs for outputs, inputs in self.matrices)

    def numbers(self, *, active: bool = False) -> int:
        """All of them, or those that a token uses."""
        return self.layers * (self.active if active else self.copies) * (self.multiplied + self.vectors)


@dataclass(frozen=True, kw_only=True)
class Attended:
    """How tokens attend in layers that are alike.

    flops         of one token attending to one: a score and a weighted value, for every head of one layer.
    decode_flops  the same in decode.
    cached        numbers that the cache holds of one token, in one layer.
    row           how many of them are of one key-value head, which 8 bits can pack; None: they are latents.
    window        the most tokens that one attends to, and that the cache holds; None: no limit.
    every         so many tokens are compressed into one before they are attended to (DeepSeek-V4).
    causal        a token attends to itself and those before it; otherwise to the whole sequence.
    passes        in which it happens.
    """

    layers: int
    flops: int
    decode_flops: int
    cached: int
    row: int | None = None
    window: int | None = None
    every: int = 1
    causal: bool = True
    passes: tuple[Pass, ...] = EVERY


@dataclass(frozen=True, kw_only=True)
class State:
    """A recurrence (Mamba): the numbers that it keeps of a sequence of any length in all layers, and the FLOPs of
    moving them on by one token and reading them."""

    numbers: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What a model is made of.

    context        the longest sequence that it is meant for; None: its config does not say.
    sent           numbers that a token sends to each of its experts on another rank, and gets back.
    router         for the traffic between ranks: E, K and groups.
    family         the model_type of its config.json; "" for a config of ours.
    lacks          why it can be counted but not run ("it has Mamba layers"); "": it can be run.
    notes          what else a reader of the figures should know.
    known          False: nobody here knows the family, and it was counted by common field names.
    not_understood the fields of its config.json that were then left out of account.
    """

    weights: tuple[Weights, ...]
    attention: tuple[Attended, ...] = ()
    state: State | None = None
    context: int | None = None
    sent: int = 0
    router: RouterConfig | None = None
    family: str = ""
    lacks: str = ""
    notes: tuple[str, ...] = ()
    known: bool = True
    not_understood: tuple[str, ...] = ()

    @property
    def tied(self) -> bool:
        """The output layer is the input embedding."""
        return not any(w.part == "head" for w in self.weights)

    @property
    def moe_layers(self) -> int:
        return sum(w.layers for w in self.weights if w.part == "routed_experts")


# ---------------------------------------------------------------------------------------------------------------------
# Pieces that families share.


def feed_forward(width: int, hidden: int, gated: bool = True) -> tuple[Shape, Shape]:
    """A feed-forward network's two matrices: gate and up stacked, or up alone, then down."""
    return ((2 if gated else 1) * hidden, width), (width, hidden)


def grouped_attention(width: int, heads: int, kv_heads: int, head_dim: int) -> tuple[Shape, ...]:
    """Query, key, value and output projections."""
    query, key = heads * head_dim, kv_heads * head_dim
    return (query, width), (key, width), (key, width), (width, query)


def scores(layers: int, heads: int, kv_heads: int, head_dim: int, window: int | None = None) -> Attended:
    """Grouped-query attention's sums and cache."""
    per_token = heads * 4 * head_dim  # 2 for a score, 2 for a weighted value, in each of d numbers
    return Attended(
        layers=layers,
        flops=per_token,
        decode_flops=per_token,
        cached=2 * kv_heads * head_dim,
        row=head_dim,
        window=window,
    )


def tables(vocab: int, width: int, tied: bool, head_bias: bool = False) -> tuple[Weights, ...]:
    """Input embedding and output layer. A tied table is looked up and multiplied."""
    shape = (vocab, width)
    if tied:
        bias = (Weights(part="embeddings", vectors=vocab),) if head_bias else ()
        return (Weights(part="embeddings", matrices=(shape,), packed=False), *bias)
    head = Weights(part="head", matrices=(shape,), vectors=vocab * head_bias)
    return Weights(part="embeddings", vectors=vocab * width), head


# ---------------------------------------------------------------------------------------------------------------------
# A decoder of ours.


def counted(model: ModelConfig | EncoderDecoderConfig | Counted) -> Counted:
    """What a model is made of, whichever way it is described."""
    if isinstance(model, ModelConfig):
        return count(model)
    return count_encoder_decoder(model) if isinstance(model, EncoderDecoderConfig) else model


def count(config: ModelConfig) -> Counted:
    """What a decoder is made of."""
    D, L = config.width, config.layers
    moe = sum(config.is_moe(layer) for layer in range(L))
    weights = [
        *tables(config.vocab, D, config.tied),
        *_attention(config),
        Weights(part="norms", layers=L, vectors=2 * D + _own_norms(config)),
        Weights(part="norms", vectors=D),
    ]
    if config.router is not None:
        weights += _moe(config, config.router, moe)
    if moe < L:
        weights.append(Weights(part="dense_ffn", layers=L - moe, matrices=feed_forward(D, config.ffn, config.gated)))
    return Counted(
        weights=tuple(weights),
        attention=_scores(config),
        context=config.context,
        sent=D if config.router is not None else 0,
        router=config.router,
    )


def _attention(config: ModelConfig) -> Iterable[Weights]:
    D, H, J, d, L = config.width, config.heads, config.n_kv_heads, config.d_head, config.layers
    if config.mla is None:
        biases = config.qkv_bias * (H + 2 * J) * d + config.o_bias * D + config.sinks * H
        yield Weights(part="attention", layers=L, matrices=grouped_attention(D, H, J, d), vectors=biases)
        return
    m = config.mla
    query = H * (m.nope_dim + m.rope_dim)
    queries: tuple[Shape, ...] = ((query, D),) if m.q_rank is None else ((m.q_rank, D), (query, m.q_rank))
    compress = (m.kv_rank + m.rope_dim, D)  # what the cache holds: a latent, and one key with position for all heads
    yield Weights(part="attention", layers=L, matrices=(*queries, compress, (D, H * m.v_dim)))
    expand = (H * (m.nope_dim + m.v_dim), m.kv_rank)
    yield Weights(part="attention", layers=L, matrices=(expand,), packed=False)


def _own_norms(config: ModelConfig) -> int:
    """Attention's own norms in one layer: of queries and keys, or of latents."""
    if config.mla is not None:
        return (config.mla.q_rank or 0) + config.mla.kv_rank
    return {"none": 0, "head": 2, "full": config.heads + config.n_kv_heads}[config.qk_norm] * config.d_head


def _moe(config: ModelConfig, router: RouterConfig, layers: int) -> Iterable[Weights]:
    D, E, F = config.width, router.experts, config.expert_width
    yield Weights(
        part="routers",
        layers=layers,
        matrices=((E, D),),
        vectors=E * (router.logits_bias + router.balance_bias),
        untrained=E * router.balance_bias,
        packed=False,
    )
    if router.noisy_top_k:
        yield Weights(part="routers", layers=layers, matrices=((E, D),), passes=("training",), packed=False)
    yield Weights(
        part="routed_experts",
        layers=layers,
        matrices=feed_forward(D, F, config.gated),
        vectors=config.expert_bias * ((2 if config.gated else 1) * F + D),
        copies=E,
        active=router.top_k,
    )
    if config.shared_width:
        gate = ((1, D),) if config.shared_gate else ()
        matrices = (*feed_forward(D, config.shared_width, config.gated), *gate)
        yield Weights(part="shared_experts", layers=layers, matrices=matrices)


def _scores(config: ModelConfig) -> tuple[Attended, ...]:
    H, L = config.heads, config.layers
    if config.mla is not None:
        m = config.mla
        # Decoding stays in the cache's latent space: the expansion is folded into query and output, where it costs
        # what the projection cost.
        latent = H * 2 * (m.kv_rank + m.rope_dim + m.kv_rank)
        expanded = H * 2 * (m.nope_dim + m.rope_dim + m.v_dim)
        return (Attended(layers=L, flops=expanded, decode_flops=latent, cached=m.kv_rank + m.rope_dim),)
    shape = H, config.n_kv_heads, config.d_head
    if config.window is None:
        return (scores(L, *shape),)
    full = len(config.full_layers)
    near = scores(L - full, *shape, window=config.window)
    return (scores(full, *shape), near) if full else (near,)


# ---------------------------------------------------------------------------------------------------------------------
# An encoder-decoder of ours.


def count_encoder_decoder(config: EncoderDecoderConfig) -> Counted:
    """What an encoder-decoder is made of.

    A token here is one of the source and one of the target. Prefill is the source's: the encoder, and the keys and
    values that cross-attention makes of its output. Decode is the target's: the rest of the decoder. Training is both.
    """
    D, H, d, gated = config.width, config.heads, config.d_head, config.activation in ("swiglu", "geglu")
    source: tuple[Pass, ...] = ("training", "prefill")
    target: tuple[Pass, ...] = ("training", "decode")
    query, key, value, out = grouped_attention(D, H, H, d)
    encoder, decoder = config.encoder_layers, config.decoder_layers
    weights = [
        *_output(config, target),
        # Relative positions have one table in each stack, in its first layer.
        Weights(part="attention", vectors=2 * config.buckets * H),
        Weights(part="attention", layers=encoder, matrices=(query, key, value, out), passes=source),
        Weights(part="attention", layers=decoder, matrices=(query, key, value, out), passes=target),
        Weights(part="attention", layers=decoder, matrices=(key, value), passes=source),
        Weights(part="attention", layers=decoder, matrices=(query, out), passes=target),
        Weights(part="norms", layers=encoder, vectors=2 * D),
        Weights(part="norms", layers=decoder, vectors=3 * D),
        Weights(part="norms", layers=2, vectors=D),
    ]
    router, network = config.router, feed_forward(D, config.ffn, gated)
    for layers, moe, passes in (
        (encoder, sum(map(config.encoder_is_moe, range(encoder))), source),
        (decoder, sum(map(config.decoder_is_moe, range(decoder))), target),
    ):
        biases = router.experts * (router.logits_bias + router.balance_bias)
        if moe:
            weights += [
                Weights(
                    part="routers",
                    layers=moe,
                    matrices=((router.experts, D),),
                    vectors=biases,
                    untrained=router.experts * router.balance_bias,
                    passes=passes,
                    packed=False,
                ),
                Weights(
                    part="routed_experts",
                    layers=moe,
                    matrices=network,
                    copies=router.experts,
                    active=router.top_k,
                    passes=passes,
                ),
            ]
        if moe < layers:
            weights.append(Weights(part="dense_ffn", layers=layers - moe, matrices=network, passes=passes))
    per_token = 4 * d * H
    return Counted(
        weights=tuple(weights),
        attention=(
            Attended(layers=encoder, flops=per_token, decode_flops=per_token, cached=0, causal=False, passes=source),
            Attended(layers=decoder, flops=per_token, decode_flops=per_token, cached=2 * H * d, passes=target),
            Attended(
                layers=decoder, flops=per_token, decode_flops=per_token, cached=2 * H * d, causal=False, passes=target
            ),
        ),
        sent=D,
        router=router,
        context=T5_CONTEXT,
        notes=("an encoder-decoder: a token is one of the source and one of the target; prefill is the source's",),
    )


def _output(config: EncoderDecoderConfig, target: tuple[Pass, ...]) -> tuple[Weights, ...]:
    """Embedding and output layer; only the target is given logits."""
    table = (config.vocab, config.width)
    if config.tied:
        return (Weights(part="embeddings", matrices=(table,), passes=target, packed=False),)
    numbers = config.vocab * config.width
    return Weights(part="embeddings", vectors=numbers), Weights(part="head", matrices=(table,), passes=target)
