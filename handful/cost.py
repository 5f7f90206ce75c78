"""What a model costs, from its config alone: parameters, FLOPs per token, bytes, and traffic between ranks.

Nothing is allocated and torch is not needed, so a model of a trillion parameters is priced as fast as a small one.

What is counted, and how (docs/cost.md works an example):

    parameters    what a checkpoint holds, the router's balance bias included. Active: those that one token uses.
    FLOPs         2 per multiply-add of every matrix a token passes, the output layer included. Left out: additions,
                  norms, softmax, RoPE, the look-up of the input embedding. Training is 3 x forward: a backward pass
                  multiplies twice, for the gradient of the input and of the weights.
    context       in training and prefill a token attends to the mean causal position, (S + 1) / 2 tokens; in decode
                  to the full context S.
    bytes         weights and cache at a dtype; training as AdamW holds it, in float32.
    traffic       what one token sends and receives when the experts sit on R ranks and load is even.

Legend: D model width · F an expert's hidden width · E experts · K experts per token · V vocabulary · H heads ·
J key-value heads · d head width · S context · R ranks
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from math import comb
from typing import Any

from handful.config import MLAConfig, ModelConfig, RouterConfig
from handful.errors import ConfigError

__all__ = ["Bytes", "Communication", "Cost", "Flops", "Parameters", "Parts", "Traffic", "cost"]

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


# ---------------------------------------------------------------------------------------------------------------------
# One layer's pieces. Matrices are what a token is multiplied by; vectors (biases, sinks) only add to what is held.


def attention_matrices(config: ModelConfig) -> int:
    """Query, key, value and output projections of one layer."""
    D, H, J, d = config.width, config.heads, config.n_kv_heads, config.d_head
    if config.mla is None:
        return D * (H + 2 * J) * d + H * d * D
    m = config.mla
    query = H * (m.nope_dim + m.rope_dim)
    queries = D * query if m.q_rank is None else D * m.q_rank + m.q_rank * query
    compress = D * (m.kv_rank + m.rope_dim)  # what the cache holds: a latent, and one key with position for all heads
    expand = m.kv_rank * H * (m.nope_dim + m.v_dim)
    return queries + compress + expand + H * m.v_dim * D


def attention_vectors(config: ModelConfig) -> int:
    """Biases of the projections, and a sink per head."""
    qkv = (config.heads + 2 * config.n_kv_heads) * config.d_head
    return config.qkv_bias * qkv + config.o_bias * config.width + config.sinks * config.heads


def norm_vectors(config: ModelConfig) -> int:
    """One layer's RMSNorm weights: before attention, before the feed-forward part, and attention's own."""
    own = {"none": 0, "head": 2 * config.d_head, "full": (config.heads + config.n_kv_heads) * config.d_head}
    latent = 0 if config.mla is None else (config.mla.q_rank or 0) + config.mla.kv_rank
    return 2 * config.width + own[config.qk_norm] + latent


def ffn_matrices(config: ModelConfig, hidden: int) -> int:
    """A feed-forward network of that hidden width: gate, up and down, or up and down alone."""
    return (3 if config.gated else 2) * config.width * hidden


def expert_vectors(config: ModelConfig) -> int:
    """The biases of one routed expert, after its first matrices and after its last."""
    return config.expert_bias * ((2 if config.gated else 1) * config.expert_width + config.width)


def router_matrices(config: ModelConfig, router: RouterConfig) -> int:
    """The scores' map, and with noisy top-k a second one for the size of the noise."""
    return config.width * router.experts * (2 if router.noisy_top_k else 1)


def router_vectors(router: RouterConfig) -> int:
    return router.experts * (router.logits_bias + router.balance_bias)


def shared_matrices(config: ModelConfig) -> int:
    """The shared experts are one wider expert; its gate is one row."""
    return ffn_matrices(config, config.shared_width) + config.shared_gate * config.width


def moe_layers(config: ModelConfig) -> int:
    return sum(config.is_moe(layer) for layer in range(config.layers))


# ---------------------------------------------------------------------------------------------------------------------
# Parameters.


@dataclass(frozen=True)
class Parts:
    """Parameters by part. `head` is 0 when the output layer is the input embedding (tied)."""

    embeddings: int
    attention: int
    routers: int
    routed_experts: int
    shared_experts: int
    dense_ffn: int
    norms: int
    head: int


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


def parameters(config: ModelConfig, *, active: bool = False) -> Parameters:
    """All parameters, or those that one token uses: K of the E experts and everything else."""
    table = config.vocab * config.width
    moe = moe_layers(config)
    routers = routed = shared = 0
    if config.router is not None:
        experts = config.router.top_k if active else config.router.experts
        expert = ffn_matrices(config, config.expert_width) + expert_vectors(config)
        routed = moe * experts * expert
        routers = moe * (router_matrices(config, config.router) + router_vectors(config.router))
        shared = moe * shared_matrices(config)
    parts = Parts(
        embeddings=table,
        attention=config.layers * (attention_matrices(config) + attention_vectors(config)),
        routers=routers,
        routed_experts=routed,
        shared_experts=shared,
        dense_ffn=(config.layers - moe) * ffn_matrices(config, config.ffn),
        norms=config.layers * norm_vectors(config) + config.width,
        head=0 if config.tied else table,
    )
    everything = sum(dataclasses.astuple(parts))
    return Parameters(
        incl_all_embeddings=everything,
        excl_input_embedding=everything if config.tied else everything - parts.embeddings,
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


def matrix_flops(config: ModelConfig, *, training: bool = False) -> int:
    """Forward FLOPs per token in matrices: 2 x the active ones. The noise of noisy top-k is only for training."""
    moe = moe_layers(config)
    matrices = config.layers * attention_matrices(config) + (config.layers - moe) * ffn_matrices(config, config.ffn)
    if config.router is not None:
        router = config.router if training else dataclasses.replace(config.router, noisy_top_k=False)
        routed = router.top_k * ffn_matrices(config, config.expert_width)
        matrices += moe * (routed + router_matrices(config, router) + shared_matrices(config))
    return 2 * (matrices + config.vocab * config.width)


def score_flops(config: ModelConfig) -> int:
    """FLOPs of one token attending to one: a score (q · k) and a weighted value, for every head of every layer."""
    per_head = 2 * config.d_head if config.mla is None else config.mla.nope_dim + config.mla.rope_dim + config.mla.v_dim
    return config.layers * config.heads * 2 * per_head


def latent_score_flops(config: ModelConfig, mla: MLAConfig) -> int:
    """The same in MLA's decode, which stays in the cache's latent space: the expansion is folded into query and output,
    where it costs what the projection cost."""
    return config.layers * config.heads * 2 * ((mla.kv_rank + mla.rope_dim) + mla.kv_rank)


def flops(config: ModelConfig, context: int) -> Flops:
    attended = score_flops(config) * (context + 1) // 2  # exact: the factor is even
    last = score_flops(config) if config.mla is None else latent_score_flops(config, config.mla)
    return Flops(
        training=3 * (matrix_flops(config, training=True) + attended),
        prefill=matrix_flops(config) + attended,
        decode=matrix_flops(config) + last * context,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Bytes.


@dataclass(frozen=True)
class Bytes:
    """Bytes held.

    weights                all parameters at the dtype: what inference holds besides its cache.
    cache_per_token        keys and values of one token in all layers at the dtype (MLA: the compressed ones).
    cache                  of one sequence at the full context.
    training               AdamW in float32: weights, their gradients, and two moments.
    training_weights, training_gradients, training_moments
                           its three parts. The balance bias is a weight without gradient or moments.
    """

    weights: int
    cache_per_token: int
    cache: int
    training: int
    training_weights: int
    training_gradients: int
    training_moments: int


def cache_values(config: ModelConfig) -> int:
    """Numbers that one cached token takes in all layers."""
    if config.mla is not None:
        return config.layers * (config.mla.kv_rank + config.mla.rope_dim)
    return config.layers * 2 * config.n_kv_heads * config.d_head


def byte_counts(config: ModelConfig, context: int, dtype: str) -> Bytes:
    held = parameters(config).incl_all_embeddings
    untrained = moe_layers(config) * config.router.experts if config.router and config.router.balance_bias else 0
    trained = held - untrained
    per_token = cache_values(config) * BYTES[dtype]
    return Bytes(
        weights=held * BYTES[dtype],
        cache_per_token=per_token,
        cache=per_token * context,
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
    """

    moe_layers: int
    remote_share: float
    ranks_per_token: float
    per_assignment: Traffic
    per_rank: Traffic


def ranks_per_token(router: RouterConfig, ranks: int) -> float:
    """Expected number of different ranks among K experts, drawn evenly from `top_groups` groups that are drawn evenly.

    Experts stand in order, E / R to a rank. A rank is missed when all K fall among the n - m experts that the chosen
    groups have elsewhere, n of them in all and m on this rank: a share C(n - m, K) / C(n, K) of the draws.
    """
    per_group = router.experts // router.groups
    reach = per_group * router.top_groups
    choices = comb(router.groups, router.top_groups)
    expected = 0.0
    for rank in range(ranks):
        here = [expert * ranks // router.experts == rank for expert in range(router.experts)]
        # ways[g, m]: how many choices of g groups hold m of this rank's experts.
        ways: defaultdict[tuple[int, int], int] = defaultdict(int, {(0, 0): 1})
        for group in range(router.groups):
            mine = sum(here[group * per_group : (group + 1) * per_group])
            for (g, m), count in list(ways.items()):
                ways[g + 1, m + mine] += count
        missed = sum(count * comb(reach - m, router.top_k) for (g, m), count in ways.items() if g == router.top_groups)
        expected += 1 - missed / (choices * comb(reach, router.top_k))
    return expected


def communication(config: ModelConfig, ranks: int, dtype: str) -> Communication:
    layers = moe_layers(config)
    remote = (ranks - 1) / ranks
    reached = 0.0 if config.router is None else ranks_per_token(config.router, ranks)
    top_k = 0 if config.router is None else config.router.top_k

    def traffic(copies: float) -> Traffic:
        layer = 2 * copies * remote * config.width * BYTES[dtype]  # 2: dispatch and combine
        return Traffic(layer=layer, forward=layers * layer, training=2 * layers * layer)

    return Communication(
        moe_layers=layers,
        remote_share=remote,
        ranks_per_token=reached,
        per_assignment=traffic(top_k),
        per_rank=traffic(reached),
    )


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a model costs at a context, a dtype and a number of ranks."""

    context: int
    dtype: str
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


def cost(config: ModelConfig, *, context: int | None = None, ranks: int = 1, dtype: str = "bfloat16") -> Cost:
    """Price a model.

    context   tokens of a sequence, for attention's FLOPs and the cache; None: the config's.
    ranks     over how many devices the routed experts are spread.
    dtype     of weights, cache and traffic: "float32", "bfloat16" or "float16".

    ConfigError for a context or a number of ranks below 1, or another dtype.
    """
    context = config.context if context is None else context
    if context < 1:
        raise ConfigError(f"context = {context}: at least 1")
    if ranks < 1:
        raise ConfigError(f"ranks = {ranks}: at least 1")
    if dtype not in BYTES:
        raise ConfigError(f"dtype = {dtype!r}: one of {', '.join(BYTES)}")
    return Cost(
        context=context,
        dtype=dtype,
        ranks=ranks,
        total_parameters=parameters(config),
        active_parameters=parameters(config, active=True),
        flops=flops(config, context),
        bytes=byte_counts(config, context, dtype),
        communication=communication(config, ranks, dtype),
    )
