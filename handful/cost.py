"""What a model costs, from its config alone: parameters, FLOPs per token, bytes, and traffic between ranks.

Nothing is allocated and torch is not needed, so a model of a trillion parameters is priced as fast as a small one.
`count.py` says what a model is made of; here it is added up.

What is counted, and how (docs/cost.md works an example):

    parameters    what a checkpoint holds, the router's balance bias included. Active: those that one token uses.
    FLOPs         2 per multiply-add of every matrix a token passes, the output layer included. Left out: additions,
                  norms, softmax, RoPE, the look-up of the input embedding. Training is 3 x forward: a backward pass
                  multiplies twice, for the gradient of the input and of the weights.
    context       in training and prefill a token attends to the mean causal position, (S + 1) / 2 tokens; in decode
                  to the full context S. A window leaves the latest of them.
    bytes         weights and cache at a dtype; training as AdamW holds it, in float32.
    traffic       what one token sends and receives when the experts sit on R ranks and load is even.

Legend: D model width · E experts · K experts per token · S context · R ranks
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import comb
from typing import Any

from handful.config import EncoderDecoderConfig, ModelConfig, RouterConfig
from handful.count import Attended, Counted, Part, Pass, Weights, counted
from handful.errors import ConfigError

__all__ = ["Bytes", "Communication", "Cost", "Flops", "Parameters", "Parts", "Precision", "Traffic", "cost"]

# Bytes of a number of the cache and of what is sent; and of a weight, but for those that a format packs.
NUMBER, ANSWER = 4, 4  # bytes of an expert's number that is sent, and of a number of an expert's answer
CACHE_GROUP = 32  # numbers that share a scale in a cache of 8 bits; kCacheGroup in csrc/kernels.h
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 2, "int4": 2, "mxfp4": 2, "fp8": 2}


# ---------------------------------------------------------------------------------------------------------------------
# Parameters.


@dataclass(frozen=True)
class Parts:
    """Parameters by part. `head` is 0 when the output layer is the input embedding (tied); `state_space` are Mamba's,
    `streams` those of hyper-connections."""

    embeddings: int = 0
    attention: int = 0
    state_space: int = 0
    routers: int = 0
    routed_experts: int = 0
    shared_experts: int = 0
    dense_ffn: int = 0
    streams: int = 0
    norms: int = 0
    head: int = 0


@dataclass(frozen=True)
class Parameters:
    """One count under the three conventions in use. They differ by up to V x D each, so a figure needs its name.

    incl_all_embeddings    everything.
    excl_input_embedding   without the look-up table, whose rows are not multiplied. A tied table is also the output
                           layer, so it stays in.
    excl_embeddings        without the look-up table and without the output layer.
    """

    incl_all_embeddings: int
    excl_input_embedding: int
    excl_embeddings: int
    parts: Parts


def parameters(model: Counted, *, active: bool = False) -> Parameters:
    """All parameters, or those that one token uses: K of the E experts and everything else."""
    held: dict[str, int] = defaultdict(int)
    for weights in model.weights:
        held[weights.part] += weights.numbers(active=active)
    parts = Parts(**held)
    everything = sum(held.values())
    return Parameters(
        incl_all_embeddings=everything,
        excl_input_embedding=everything if model.tied else everything - parts.embeddings,
        excl_embeddings=everything - parts.embeddings - parts.head,
        parts=parts,
    )


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs.


@dataclass(frozen=True)
class Flops:
    """FLOPs per token: of a training step, of reading a prompt, of one more token at the end of the context."""

    training: int
    prefill: int
    decode: int


def matrix_flops(model: Counted, when: Pass) -> int:
    """Forward FLOPs per token in matrices, 2 x the active ones; and in a recurrence, as many for any token."""
    numbers = sum(w.layers * w.active * w.multiplied for w in model.weights if when in w.passes)
    return 2 * numbers + (0 if model.state is None else model.state.flops)


def attended_flops(attention: Attended, when: Pass, context: int) -> int:
    """FLOPs per token of attending, in all of its layers; in training and prefill of the mean token, rounded down."""
    if when not in attention.passes:
        return 0
    if when == "decode":
        return attention.layers * attention.decode_flops * held_tokens(attention, context)
    if not attention.causal:
        return attention.layers * attention.flops * context
    # Token t of 1 … S attends to t / every tokens, rounded down, until these are as many as the window.
    near, every = held_tokens(attention, context), attention.every
    pairs = every * near * (near - 1) // 2 + (context - near * every + 1) * near
    return attention.layers * attention.flops * pairs // context


def held_tokens(attention: Attended, context: int) -> int:
    """To how many the last token of the context attends."""
    tokens = context // attention.every
    return tokens if attention.window is None else min(attention.window, tokens)


def flops(model: Counted, context: int) -> Flops:
    def forward(when: Pass) -> int:
        return matrix_flops(model, when) + sum(attended_flops(each, when, context) for each in model.attention)

    return Flops(training=3 * forward("training"), prefill=forward("prefill"), decode=forward("decode"))


# ---------------------------------------------------------------------------------------------------------------------
# Bytes.


@dataclass(frozen=True)
class Bytes:
    """Bytes held.

    weights                all parameters at the dtype: what inference holds besides its cache. With int8 and int4 the
                           matrices that `quantize_model` packs in groups of 32, with mxfp4 those of routed experts,
                           with fp8 those of all layers but for routers; the rest in bfloat16, as are cache and traffic.
    published              the checkpoint, as it is stored: what there is to download. None: that is not known.
    cache_per_token        keys and values of one token in all layers at the dtype (MLA: the compressed ones).
    cache                  of one sequence at the full context; a layer with a window holds that many tokens.
    state                  what recurrences keep of a sequence of any length, at the dtype.
    training               AdamW in float32: weights, their gradients, and two moments.
    training_weights, training_gradients, training_moments
                           its three parts. The balance bias is a weight without gradient or moments.
    """

    weights: int
    published: int | None
    cache_per_token: int
    cache: int
    state: int
    training: int
    training_weights: int
    training_gradients: int
    training_moments: int


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How a checkpoint stores its weights (`families.precision` reads it from a config.json).

    name            for people: "fp8", "awq int4/128".
    number          bytes of what is not packed.
    parts           whose matrices are packed, but for those in `without`; of a part in `layers_without` so many layers
                    are not.
    bits            of a packed number. block_bits: beside every block of (rows, columns), where 0 columns are a whole
                    row; input_bits: beside every column; tensor_bits: beside every matrix.
    known           False: the config says that they are packed in a way that is not known here.
    """

    name: str
    number: int = 2
    parts: frozenset[Part] = frozenset()
    without: frozenset[Part] = frozenset()
    layers_without: Mapping[Part, int] = field(default_factory=dict)
    bits: int = 0
    block: tuple[int, int] | None = None
    block_bits: int = 0
    input_bits: int = 0
    tensor_bits: int = 0
    known: bool = True

    def nbytes(self, model: Counted) -> int:
        """Of all weights of a model: what there is to download."""
        return sum(self.of(weights) for weights in model.weights)

    def of(self, weights: Weights) -> int:
        plain = weights.layers * weights.copies * (weights.multiplied + weights.vectors) * self.number
        if weights.part not in self.parts - self.without:
            return plain
        packed = max(0, weights.layers - self.layers_without.get(weights.part, 0))
        saved = sum(
            outputs * inputs * self.number - self._matrix(outputs, inputs) for outputs, inputs in weights.matrices
        )
        return plain - packed * weights.copies * saved

    def _matrix(self, outputs: int, inputs: int) -> int:
        bits = outputs * inputs * self.bits + inputs * self.input_bits + self.tensor_bits
        if self.block is not None:
            rows, columns = self.block
            bits += -(-outputs // rows) * -(-inputs // (columns or inputs)) * self.block_bits
        return -(-bits // 8)


# What --dtype names beside dtypes of a number: as gpt-oss is published, and as DeepSeek-V3 is.
PACKED = {
    "mxfp4": Precision(name="mxfp4", parts=frozenset({"routed_experts"}), bits=4, block=(1, 32), block_bits=8),
    "fp8": Precision(
        name="fp8",
        parts=frozenset({"attention", "routed_experts", "shared_experts", "dense_ffn", "state_space"}),
        bits=8,
        block=(128, 128),
        block_bits=32,
    ),
}


def held_bytes(weights: Weights, dtype: str) -> int:
    """Bytes of weights at a dtype or in a packed format."""
    if dtype in PACKED:
        return PACKED[dtype].of(weights)
    number, packed = BYTES[dtype], dtype in ("int8", "int4") and weights.packed
    each = [
        outputs * (packed_row(inputs, dtype) if packed else inputs * number) for outputs, inputs in weights.matrices
    ]
    return weights.layers * weights.copies * (sum(each) + weights.vectors * number)


def expert_bytes(model: Counted, dtype: str) -> int:
    """Bytes of one routed expert, of the largest where layers differ; 0 without experts."""
    routed = [weights for weights in model.weights if weights.part == "routed_experts"]
    each = [dataclasses.replace(weights, layers=1, copies=1) for weights in routed]
    return max((held_bytes(weights, dtype) for weights in each), default=0)


def packed_row(inputs: int, dtype: str) -> int:
    """Bytes of one row of a matrix in our formats (quantize.py): whole blocks of 64 numbers, 16 bits beside each 32."""
    return ((64 if dtype == "int8" else 32) + 2 * 2) * -(-inputs // 64)


def cache_row_bytes(width: int) -> int:
    """Bytes of a row of so many numbers in a cache of 8 bits (`kv_rows`)."""
    return (2 * -(-width // CACHE_GROUP) + width + 1) // 2 * 2


def check_cache_dtype(name: str, *, latent: bool) -> None:
    """ConfigError for a kv_cache_dtype that there is not, or not for latent attention."""
    if name not in ("auto", "int8"):
        raise ConfigError(f"kv_cache_dtype = {name!r}: auto or int8")
    if name == "int8" and latent:
        raise ConfigError("kv_cache_dtype = 'int8': not with latent attention, whose cache is small as it is")


def cached_bytes(attention: Attended, dtype: str, kv_cache_dtype: str = "auto") -> int:
    """Bytes that the cache holds of one token, in one layer: in the dtype, or in rows of 8 bits (`kv_rows`)."""
    if kv_cache_dtype == "auto" or not attention.cached:
        return BYTES[dtype] * attention.cached
    check_cache_dtype(kv_cache_dtype, latent=attention.row is None)
    assert attention.row is not None
    return attention.cached // attention.row * cache_row_bytes(attention.row)


def byte_counts(model: Counted, context: int, dtype: str, published: Precision | None = None) -> Bytes:
    held = parameters(model).incl_all_embeddings
    trained = held - sum(w.layers * w.copies * w.untrained for w in model.weights)
    number = BYTES[dtype]
    return Bytes(
        weights=sum(held_bytes(weights, dtype) for weights in model.weights),
        published=published.nbytes(model) if published is not None and published.known else None,
        cache_per_token=number * sum(a.layers * a.cached // a.every for a in model.attention),
        cache=number * sum(a.layers * a.cached * held_tokens(a, context) for a in model.attention),
        state=0 if model.state is None else number * model.state.numbers,
        training=4 * held + 4 * trained + 8 * trained,
        training_weights=4 * held,
        training_gradients=4 * trained,
        training_moments=8 * trained,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Traffic between ranks (expert parallelism: each rank holds E / R experts and its own share of the tokens).


@dataclass(frozen=True)
class Traffic:
    """Expected bytes that one token sends between ranks: in one MoE layer's forward pass, in all of them, and in a
    training step, whose backward pass sends as much again."""

    layer: float
    forward: float
    training: float


@dataclass(frozen=True)
class Communication:
    """All-to-all traffic per token. A token's activations of width D go to its experts (dispatch) and their outputs
    come back (combine). Assumed: experts are chosen evenly, tokens stand evenly on the ranks.

    remote_share       of the assignments, those on another rank than the token's: (R - 1) / R.
    ranks_per_token    expected number of different ranks among a token's K experts.
    per_assignment     every assignment sends the token: K · D each way, times the remote share.
    per_rank           a rank is sent the token once and adds up its experts' outputs before it answers:
                       ranks_per_token · D each way, times the remote share.
    exchange           what is the same to the bit as one process: a rank is sent the token once, with the numbers of
                       its experts, and answers with a row in float32 for each assignment, to be added up at home.
    between_hosts      of `exchange`, what crosses to other hosts if a token crosses to each host once.
    """

    moe_layers: int
    remote_share: float
    ranks_per_token: float
    per_assignment: Traffic
    per_rank: Traffic
    exchange: Traffic
    between_hosts: Traffic


def ranks_per_token(router: RouterConfig, ranks: int) -> float:
    """Expected number of different ranks among K experts, drawn evenly from `top_groups` groups that are drawn evenly.

    Experts stand in order, E / R to a rank. A rank is missed when all K fall among the n - m experts that the chosen
    groups have elsewhere, n of them in all and m on this rank: a share C(n - m, K) / C(n, K) of the draws.
    """
    per_group = router.experts // router.groups
    reach = per_group * router.top_groups
    draws = comb(router.groups, router.top_groups) * comb(reach, router.top_k)
    held: defaultdict[int, Counter[int]] = defaultdict(Counter)  # rank -> group -> how many experts
    for expert in range(router.experts):
        held[expert * ranks // router.experts][expert // per_group] += 1
    # Ranks with as many experts of as many groups are missed alike.
    alike = Counter(tuple(sorted(groups.values())) for groups in held.values())
    expected = 0.0
    for groups, times in alike.items():
        # ways[g, m]: how many choices of g groups hold m of such a rank's experts. Most groups hold none.
        others = router.groups - len(groups)
        ways: defaultdict[tuple[int, int], int] = defaultdict(int, {(0, 0): 1})
        for mine in groups:
            for (g, m), choices in list(ways.items()):
                if g < router.top_groups:
                    ways[g + 1, m + mine] += choices
        missed = sum(
            choices * comb(others, router.top_groups - g) * comb(reach - m, router.top_k)
            for (g, m), choices in ways.items()
        )
        expected += times * (1 - missed / draws)
    return expected


def communication(model: Counted, ranks: int, dtype: str, hosts: int = 1) -> Communication:
    layers = model.moe_layers
    remote = (ranks - 1) / ranks
    reached = _reached(model.router, ranks)
    top_k = 0 if model.router is None else model.router.top_k

    def traffic(copies: float) -> Traffic:
        layer = 2 * copies * remote * model.sent * BYTES[dtype]  # 2: dispatch and combine
        return Traffic(layer=layer, forward=layers * layer, training=2 * layers * layer)

    def exchanged(places: int, numbers: int) -> Traffic:
        share, row = (places - 1) / places, model.sent * BYTES[dtype]
        rows, answers = _reached(model.router, places) * share, top_k * share
        backward = rows * row + answers * ANSWER * model.sent  # gradients of the same; experts are known by then
        layer = backward + rows * NUMBER * numbers
        return Traffic(layer=layer, forward=layers * layer, training=layers * (layer + backward))

    return Communication(
        moe_layers=layers,
        remote_share=remote,
        ranks_per_token=reached,
        per_assignment=traffic(top_k),
        per_rank=traffic(reached),
        exchange=exchanged(ranks, top_k),
        between_hosts=exchanged(hosts, top_k + 1),  # with the number of its home
    )


def _reached(router: RouterConfig | None, places: int) -> float:
    """Ranks, or hosts, that a token's experts stand on."""
    return 0.0 if router is None else 1.0 if places == 1 else ranks_per_token(router, places)


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a model costs at a context, a dtype and a number of ranks. `published`: how its checkpoint is stored."""

    context: int
    dtype: str
    published: str | None
    ranks: int
    total_parameters: Parameters
    active_parameters: Parameters
    flops: Flops
    bytes: Bytes
    communication: Communication

    @property
    def total(self) -> int:
        """Total parameters, all embeddings included."""
        return self.total_parameters.incl_all_embeddings

    @property
    def active(self) -> int:
        """Active parameters, all embeddings included."""
        return self.active_parameters.incl_all_embeddings

    @property
    def train_flops(self) -> int:
        """FLOPs per token of a training step."""
        return self.flops.training

    @property
    def weight_bytes(self) -> int:
        """All parameters at the dtype."""
        return self.bytes.weights

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for JSON."""
        return dataclasses.asdict(self)


def cost(
    model: ModelConfig | EncoderDecoderConfig | Counted,
    *,
    context: int | None = None,
    ranks: int = 1,
    hosts: int = 1,
    dtype: str = "bfloat16",
    published: Precision | None = None,
) -> Cost:
    """Price a model.

    model     a config, or what a family that has none was counted as (`families.count_from_hf`).
    context   tokens of a sequence, for attention's FLOPs and the cache; None: the model's own. Of an encoder-decoder,
              tokens of the source and of the target.
    ranks     over how many devices the routed experts are spread; hosts: on how many the ranks stand, as many on each.
    dtype     of weights, cache and traffic: "float32", "bfloat16" or "float16"; or how the weights are packed, "int8",
              "int4", "mxfp4" or "fp8" (see `Bytes`).
    published how its checkpoint stores the weights (`families.precision`), for the size of a download.

    ConfigError for a context or a number of ranks below 1, hosts that do not divide them, more ranks than a layer has
    experts, no context where the model has none, or another dtype.
    """
    model = counted(model)
    context = model.context if context is None else context
    if context is None:
        raise ConfigError("context = None: give one, for this model names none")
    if context < 1:
        raise ConfigError(f"context = {context}: at least 1")
    if ranks < 1:
        raise ConfigError(f"ranks = {ranks}: at least 1")
    experts = 0 if model.router is None else model.router.experts
    if ranks > max(1, experts):
        raise ConfigError(
            f"ranks = {ranks}: at most {experts}, the experts of a layer, for a rank without one has nothing to do"
            if experts
            else f"ranks = {ranks}: 1 for a model without experts"
        )
    if hosts < 1 or ranks % hosts:
        raise ConfigError(f"hosts = {hosts}: a number that divides the {ranks} ranks")
    if dtype not in BYTES:
        raise ConfigError(f"dtype = {dtype!r}: one of {', '.join(BYTES)}")
    return Cost(
        context=context,
        dtype=dtype,
        published=None if published is None else published.name,
        ranks=ranks,
        total_parameters=parameters(model),
        active_parameters=parameters(model, active=True),
        flops=flops(model, context),
        bytes=byte_counts(model, context, dtype, published),
        communication=communication(model, ranks, dtype, hosts),
    )
