"""How long a step takes on many devices, each with experts and with tokens of its own: a simulation.

    deploy(model, device, topology, …) -> Deployed     seconds of a step by part, drawn a few times

In every layer a device computes attention and all that its own tokens pass, sends their rows to the devices of their
experts, computes for all who were sent to it, and sends the answers back. A layer goes on when the last answer is
there: so its experts take as long as the busiest device, and each exchange as long as the busiest link. Parts follow
each other; an implementation that computes while it sends takes less, at best as long as the longer of the two.

Which experts tokens choose is drawn: from a recorded load, a Zipf law, or a recording's own tokens.

Legend: T tokens · E experts · K experts per token · D devices
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from handful.ceilings import Ceilings
from handful.config import RouterConfig
from handful.cost import BYTES, attended_flops, held_bytes, held_tokens
from handful.count import Counted, Pass, Weights
from handful.errors import ConfigError
from handful.forecast import EFFICIENCY, FORMATS
from handful.placement import Exchange, Placement, Routes, Topology, as_they_come, exchange, homes, place
from handful.placement.placement import Floats, Ints

__all__ = ["Deployed", "Device", "Rates", "deploy", "zipf"]

DRAWS = 4  # batches that are drawn for each layer's load
DRAWN = 1 << 16  # tokens of all devices that are drawn, at most; what more there are is like them


@dataclass(frozen=True)
class Rates:
    """Bytes a second that are read, and FLOPs a second, as sums of one kind reach them."""

    read: float
    product: float

    def seconds(self, count: float, flops: float) -> float:
        """What takes longer: to read so many bytes, or so many FLOPs."""
        return max(count / self.read, flops / self.product)


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a device reaches.

    matrices, experts, attention   of all other matrices, of routed experts, of scores and values.
    layer_seconds   of calls in a layer, whatever its size.
    step_seconds    of a step, outside of its layers.
    """

    matrices: Rates
    experts: Rates
    attention: Rates
    layer_seconds: float = 0.0
    step_seconds: float = 0.0

    @staticmethod
    def alike(read: float, product: float) -> Device:
        """One that reaches the same in all kinds of sums."""
        rates = Rates(read, product)
        return Device(matrices=rates, experts=rates, attention=rates)

    @staticmethod
    def here(machine: Ceilings, dtype: str, ranks: int = 1) -> Device:
        """This computer, or one of so many ranks that share it evenly: each reads and multiplies that part as quickly.
        ConfigError for a dtype whose sums were not measured."""
        if dtype not in FORMATS:
            raise ConfigError(f"quant = {dtype!r}: one of {', '.join(FORMATS)} on this computer; or give rates")
        of = EFFICIENCY[dtype]
        read = machine.read_bytes_per_second / ranks
        product = machine.product_flops(dtype) / ranks
        return Device(
            matrices=Rates(read * of.matrices, product * of.matrices_product),
            experts=Rates(read * of.experts, product * of.experts_product),
            attention=Rates(read * of.attention, product * of.attention_product),
            layer_seconds=machine.overhead.layer_seconds + (machine.overhead.packed_seconds if FORMATS[dtype] else 0),
            step_seconds=machine.overhead.step_seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """A step on all devices. Seconds are means over what was drawn.

    ranks, tokens   devices that are alive; tokens of all of them together.
    matrices        of what every token passes but routed experts; attention: of scores and values, and the cache.
    experts         of the routed experts, of the mean device; waiting: until the busiest one is done as well.
    exchange        of rows and answers.
    overhead        of calls.
    busiest         assignments of the busiest device beside the mean one's.
    spread          between the shortest and the longest of the steps drawn, in seconds.
    sent, crossing  bytes that a token sends and is sent in a step, and of these between nodes.
    held            bytes of weights on the device that has most.
    """

    ranks: int
    tokens: int
    matrices: float
    attention: float
    experts: float
    waiting: float
    exchange: float
    overhead: float
    busiest: float
    spread: float
    sent: float
    crossing: float
    held: int

    @property
    def seconds(self) -> float:
        """Of the step: all parts, one after the other."""
        return self.matrices + self.attention + self.experts + self.waiting + self.exchange + self.overhead

    @property
    def overlapped(self) -> float:
        """Of the step, if all exchanges were hidden behind sums, or the sums behind them: no step is shorter."""
        return max(self.exchange, self.seconds - self.exchange)

    @property
    def rate(self) -> float:
        """Tokens a second of all devices."""
        return self.tokens / self.seconds


def zipf(experts: int, exponent: float, layers: int = 1, seed: int = 0) -> list[list[float]]:
    """Loads of which the n-th largest is as 1 / n^exponent, each layer's in an order of its own; 0 is even."""
    draw = np.random.default_rng(seed)
    return [draw.permutation(1 / np.arange(1, experts + 1) ** exponent).tolist() for _ in range(layers)]


def deploy(
    model: Counted,
    device: Device,
    topology: Topology,
    *,
    dtype: str,
    when: Literal["decode", "prefill"],
    tokens: int,
    context: int,
    loads: Sequence[Sequence[float]] | None = None,
    recorded: Sequence[Ints] | None = None,
    placements: Sequence[Placement] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Deployed:
    """Simulate a step.

    dtype        of weights and cache, and of rows that are sent.
    when         "decode": each of the tokens ends a sequence of `context`; "prefill": they are whole prompts of it.
    tokens       of each device.
    loads        of some MoE layers, of every expert: what routers choose by, and what experts are placed by where no
                 placement is given; None: even. All of the model's layers are like these in the mean.
    recorded     the experts of recorded tokens in as many layers, (T, K): drawn from instead, so that what is chosen
                 together stays together.
    placements   of as many layers; None: `place` with the slots of the topology, or without room for copies experts in
                 order.

    The links of the topology must be known. ConfigError for a model without experts, a wrong number of layers or
    experts, and as `place`.
    """
    if model.router is None or not model.moe_layers:
        raise ConfigError("ranks: a model without experts has nothing to be spread over them")
    if topology.link is None:
        raise ConfigError("link: what a device sends a second, such as 50GB/s,10us")
    if dtype not in BYTES:
        raise ConfigError(f"dtype = {dtype!r}: one of {', '.join(BYTES)}")
    for name, value in (("tokens", tokens), ("context", context), ("draws", draws)):
        if value < 1:
            raise ConfigError(f"{name} = {value}: at least 1")
    experts = model.router.experts
    if loads is None and recorded is None and placements is not None:
        loads = [[1.0] * experts] * len(placements)
    loads = _loads(experts, loads, recorded)
    slots = topology.room()
    if placements is None:
        placements = [_placed(load, slots) for load in loads]
    if len(placements) != len(loads):
        raise ConfigError(f"placement: {len(placements)} layers; the load has {len(loads)}")
    draw = np.random.default_rng(seed)
    drawn = []
    for layer, (load, placement) in enumerate(zip(loads, placements, strict=True)):
        if len(placement.experts) != topology.devices:
            raise ConfigError(f"placement: of {len(placement.experts)} devices; there are {topology.devices}")
        routes = Routes(placement, topology)
        if len(routes.devices) != experts or any(not len(own) for own in routes.devices):
            raise ConfigError(f"placement: of {len(routes.devices)} experts; the model has {experts} in each layer")
        for _ in range(draws):
            chosen_TK = _chosen(
                draw, load, None if recorded is None else recorded[layer], tokens, topology, model.router
            )
            drawn.append(_layer(model, device, topology, dtype, routes, chosen_TK, tokens))
    layers = model.moe_layers
    mean = {name: statistics.mean(getattr(one, name) for one in drawn) for name in _Layer.__dataclass_fields__}
    each = [one.experts + one.waiting + one.exchange for one in drawn]
    matrices, attention = _own_seconds(model, device, dtype, when, tokens, context)
    every = sum(a.layers for a in model.attention if when in a.passes)
    return Deployed(
        ranks=len(topology.alive_D),
        tokens=tokens * len(topology.alive_D),
        matrices=matrices,
        attention=attention,
        experts=layers * mean["experts"],
        waiting=layers * mean["waiting"],
        exchange=layers * mean["exchange"],
        overhead=device.step_seconds + every * device.layer_seconds,
        busiest=mean["busiest"],
        spread=layers * (max(each) - min(each)),
        sent=layers * mean["sent"],
        crossing=layers * mean["crossing"],
        held=_held(model, dtype, placements),
    )


def _loads(
    experts: int, loads: Sequence[Sequence[float]] | None, recorded: Sequence[Ints] | None
) -> list[Sequence[float]]:
    if recorded is not None:
        counted = [np.bincount(one.ravel(), minlength=experts) for one in recorded]
        loads = [one.astype(np.float64).tolist() for one in counted]
    found: list[Sequence[float]] = [[1.0] * experts] if loads is None else list(loads)
    for load in found:
        if len(load) != experts:
            raise ConfigError(f"load: of {len(load)} experts; the model has {experts} in each layer")
    return found


def _placed(load: Sequence[float], slots: Sequence[int]) -> Placement:
    """In order where there is nothing to choose, for loads are even and there is no room for copies."""
    if len(set(load)) == 1 and sum(slots) == len(load) and len(set(slots)) == 1:
        return as_they_come(len(load), slots)
    return place(load, slots)


# ---------------------------------------------------------------------------------------------------------------------
# Routed experts, drawn.


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """Of one layer that was drawn, what `Deployed` has of all."""

    experts: float
    waiting: float
    exchange: float
    busiest: float
    sent: float
    crossing: float


def _chosen(
    draw: np.random.Generator,
    load: Sequence[float],
    recorded_TK: Ints | None,
    tokens: int,
    topology: Topology,
    router: RouterConfig,
) -> Ints:
    """The experts of tokens of all devices, (T, K), T at most DRAWN and as many on each device."""
    alive = len(topology.alive_D)
    T = max(1, min(tokens, DRAWN // alive)) * alive
    if recorded_TK is not None:
        return recorded_TK[draw.integers(0, len(recorded_TK), T)]
    # The K largest of log load − log of exponential noise: different ones, each by its load among those that are left.
    with np.errstate(divide="ignore"):
        log_E = np.log(np.asarray(load, np.float32))
    found = []
    for part in np.array_split(np.arange(T), 1 + T // 8192):
        noise_TE = draw.standard_exponential((len(part), len(load)), np.float32)
        keys_TE = log_E - np.log(np.maximum(noise_TE, np.finfo(np.float32).tiny))
        if router.top_groups < router.groups:  # of the groups those whose best, or two best, are best
            keys_TGe, best = keys_TE.reshape(len(part), router.groups, -1), 1 if router.group_score == "max" else 2
            best_TG = np.partition(keys_TGe, -best, 2)[:, :, -best:].sum(2)
            least_T = np.sort(best_TG, 1)[:, -router.top_groups]
            keys_TE = np.where((best_TG >= least_T[:, None])[:, :, None], keys_TGe, -np.inf).reshape(keys_TE.shape)
        found.append(np.argpartition(-keys_TE, router.top_k - 1, 1)[:, : router.top_k])
    return np.concatenate(found)


def _layer(
    model: Counted, device: Device, topology: Topology, dtype: str, routes: Routes, chosen_TK: Ints, tokens: int
) -> _Layer:
    alive = topology.alive_D
    T = len(chosen_TK)
    home_T = homes(T, topology)
    scale = tokens * len(alive) / T  # of those that are not drawn
    device_TK = routes.devices_of(chosen_TK, home_T)
    E = len(routes.devices)
    counts = np.bincount((device_TK * E + chosen_TK).ravel(), minlength=topology.devices * E)
    rows_DE = counts.reshape(topology.devices, E).astype(np.float64) * scale
    seconds_D = _experts_seconds(model, device, dtype, rows_DE)[alive]
    rows_D = rows_DE.sum(1)[alive]
    levels = 2 if len(set(topology.node_D[alive].tolist())) > 1 else 1
    moved = exchange(device_TK, home_T, topology, levels=levels)
    dispatch_DD, combine_DD = _bytes(moved, model.sent, BYTES[dtype], scale)
    seconds = [topology.seconds(dispatch_DD), topology.seconds(combine_DD)]
    mean = float(seconds_D.mean())
    return _Layer(
        experts=mean,
        waiting=float(seconds_D.max()) - mean,
        exchange=sum(each for each in seconds if each is not None),
        busiest=float(rows_D.max() / rows_D.mean()),
        sent=float((dispatch_DD.sum() + combine_DD.sum()) / (T * scale)),
        crossing=(topology.between(dispatch_DD) + topology.between(combine_DD)) / (T * scale),
    )


def _bytes(moved: Exchange, width: int, itemsize: int, scale: float) -> tuple[Floats, Floats]:
    """Of rows on their way out, and of answers on theirs back."""
    none = np.zeros_like(moved.rows_DD)
    rows = Exchange(moved.rows_DD, none, moved.numbers).forward(width, itemsize)
    answers = Exchange(none, moved.answers_DD, moved.numbers).forward(width, itemsize)
    return rows.astype(np.float64) * scale, answers.astype(np.float64) * scale


def _experts_seconds(model: Counted, device: Device, dtype: str, rows_DE: Floats) -> Floats:
    """Of every device, (D,), in the mean MoE layer: each expert that has tokens is read, or multiplied, if that takes
    longer."""
    found = np.zeros(len(rows_DE))
    for weights in model.weights:
        if weights.part != "routed_experts":
            continue
        reading = _one(weights, dtype) / device.experts.read * (rows_DE > 0)
        multiplying = rows_DE * 2 * weights.multiplied / device.experts.product
        found += weights.layers / model.moe_layers * np.maximum(reading, multiplying).sum(1)
    return found


def _one(weights: Weights, dtype: str) -> int:
    """Bytes of one copy's matrices in one layer."""
    return held_bytes(dataclasses.replace(weights, layers=1, copies=1, vectors=0, untrained=0), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# What a device computes for its own tokens, and what it holds.


def _own_seconds(
    model: Counted, device: Device, dtype: str, when: Pass, tokens: int, context: int
) -> tuple[float, float]:
    """Of matrices, and of attention."""
    matrices = 0.0
    for weights in model.weights:
        if when not in weights.passes or not weights.matrices or weights.part == "routed_experts":
            continue
        # Of a prompt only the last token is given logits.
        output = weights.part == ("embeddings" if model.tied else "head")
        rows = -(-tokens // context) if output and when == "prefill" else tokens
        flops = rows * 2 * weights.multiplied * weights.active
        matrices += weights.layers * device.matrices.seconds(weights.copies * _one(weights, dtype), flops)
    attention = 0.0
    for attended in model.attention:
        if when in attended.passes:
            read = BYTES[dtype] * attended.layers * attended.cached * held_tokens(attended, context)
            attention += device.attention.seconds(
                tokens * read if when == "decode" else 0, tokens * attended_flops(attended, when, context)
            )
    return matrices, attention


def _held(model: Counted, dtype: str, placements: Sequence[Placement]) -> int:
    """Bytes of weights on the device that has most: all but experts, and the most experts of any device."""
    held = 0.0
    for weights in model.weights:
        whole = float(held_bytes(weights, dtype))
        if weights.part == "routed_experts":
            most = [max(map(len, one.experts)) for one in placements]
            whole = whole / weights.copies * statistics.mean(most)
        held += whole
    return round(held)
