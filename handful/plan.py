"""Does a model run on this computer, and how fast? From its config alone, before anything is downloaded or loaded.

    plan(config, ceilings) -> Plan     sizes, whether it fits, and the seconds of a step, part by part

A pure function of a config and of what the computer can do (`handful.ceilings`). What is counted, and how:

    fits      weights + cache + a working allowance must be free; with a memory budget the experts that are not held
              wait in a pack on disk (`handful.memory`), which must have room.
    decode    each weight that a step uses is read once: bytes / (memory's rate x the format's share of it), or its
              multiplications, if they take longer. With several sequences, each layer reads the experts that any of
              them chose: E · (1 - (1 - K/E)^B) for B sequences.
    prefill   multiplications / (the product's rate x the format's share of it), or its bytes, if they take longer.
    disk      (1 - hit rate) x the experts that a step needs / the rate at which a store reads them, and what a layer
              waits that misses any; added, for reads hardly move on while all cores multiply. Without a recorded trace,
              the hit rate is the share of experts that are held.

Legend: D model width · F an expert's hidden width · E experts · K experts per token · B sequences · T tokens
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from handful.ceilings import Ceilings
from handful.config import EncoderDecoderConfig, ModelConfig
from handful.cost import BYTES, attended_flops, byte_counts, held_bytes, held_tokens
from handful.count import Counted, Pass, Weights, counted
from handful.engine import CHUNK
from handful.errors import ConfigError
from handful.experts.disk import Layout, layout_of
from handful.experts.native import FEW
from handful.experts.stored import GUESSES
from handful.units import size

__all__ = ["EFFICIENCY", "FORMATS", "Efficiency", "Plan", "Step", "plan"]

Verdict = Literal["fits", "fits with memory", "does not fit", "not run"]

FORMATS = {"float32": 0, "bfloat16": 0, "int8": 8, "int4": 4}  # bits of a packed weight; 0: not packed
CONTEXT = 4096  # tokens of a sequence, where nothing is said
STREAM = 400  # bytes that norms, sums and the like move for each number of the stream, in a layer
STEP, CODES_STEP = 8, 16  # tokens that the kernels multiply at once by floats, and by codes
PROCESS = 400_000_000  # bytes of Python, torch and what they load


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """The shares of this computer's ceilings that a format's sums reach.

    experts, matrices, attention   of memory's rate: experts, all other matrices, and the cache, for few tokens.
    experts_product, matrices_product, attention_product   of the product's rate, for many; tokens of the native kernels
                                   counted in whole steps.
    """

    experts: float
    matrices: float
    attention: float
    experts_product: float
    matrices_product: float
    attention_product: float


# Seen on an EPYC with AVX-512 BF16 and VNNI. Experts: bench/results/experts.json (`python bench/experts.py`), medians
# of "decode" with one token by "read", and of "prefill" by the product 1024×2048×2048, which is the one that
# `machine.measure` takes. The rest, attention with its norms and RoPE: `python bench/plan.py --shares`. With few tokens
# codes take about as many instructions as bytes allow, so that where memory is quick they reach less of its rate: their
# shares stand between what was seen at 30 and at 45 GB/s.
EFFICIENCY = {
    "float32": Efficiency(
        experts=0.94,
        matrices=0.9,
        attention=0.8,
        experts_product=1.2,
        matrices_product=1.0,
        attention_product=0.5,
    ),
    "bfloat16": Efficiency(
        experts=0.94,
        matrices=0.9,
        attention=0.7,
        experts_product=1.2,
        matrices_product=1.0,
        attention_product=0.35,
    ),
    "int8": Efficiency(
        experts=0.88,
        matrices=0.8,
        attention=0.7,
        experts_product=1.35,
        matrices_product=1.15,
        attention_product=0.35,
    ),
    "int4": Efficiency(
        experts=0.8,
        matrices=0.55,
        attention=0.7,
        experts_product=1.4,
        matrices_product=1.15,
        attention_product=0.35,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """The seconds of one step: of decoding a token of every sequence, or of reading a chunk of a prompt.

    tokens       that it gives or reads.
    resident     of what every token uses: attention's matrices, routers, shared experts, the output layer, …
    experts      of the routed experts, in memory.
    attention    of scores and values, and of reading the cache.
    overhead     of calls, norms and sums.
    disk         of reading all of the experts that the step needs from disk; None: its rate is not known.
    fetch        of each layer that must wait for the disk, beside its bytes.
    layers       that have routed experts; chosen: experts that each of them needs.
    """

    tokens: int
    resident: float
    experts: float
    attention: float
    overhead: float
    disk: float | None
    fetch: float
    layers: int
    chosen: float

    def seconds(self, hit_rate: float) -> float | None:
        """Of the step, if of the experts that it needs so many are in memory, from 0 to 1; None if the disk's rate is
        not known and some of it is needed."""
        if not 0 <= hit_rate <= 1:
            raise ConfigError(f"hit_rate = {hit_rate}: from 0 to 1")
        beside = self.resident + self.attention + self.overhead
        if hit_rate == 1 or not self.layers:
            return beside + self.experts
        if self.disk is None:
            return None
        # The share of layers that miss any, if all experts are as likely to be there.
        waits = 1 - float(hit_rate**self.chosen)
        return beside + self.experts + waits * self.layers * self.fetch + (1 - hit_rate) * self.disk

    def rate(self, hit_rate: float) -> float | None:
        """Tokens a second; None as `seconds`."""
        seconds = self.seconds(hit_rate)
        return None if seconds is None else self.tokens / seconds


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model in one format on one computer. Sizes are bytes.

    lacks            why it can be counted but not run; "": it can be run.
    verdict, reason  "fits", "fits with memory" (a budget for the weights; the other experts wait on disk), "does not
                     fit", or "not run"; and why, in words.
    weights          of all weights; resident: of those that are in memory whatever is chosen.
    cache, working   of the sequences' caches at the full context, and what else the process takes: PROCESS, and what
                     the kernels keep of a chunk.
    expert, experts  of one expert as a pack holds it (weights hold it without its padding); how many there are in all.
    least            the smallest budget that runs: `resident`, and one token's experts of a layer.
    memory           the budget: as asked, or the largest that fits where the model does not; None: none.
    slots, capacity  experts that a budget holds, and of them those that are not kept for guesses; all without one.
    pack, download   on disk: a pack of the experts (0 without a budget), and the checkpoint, if it is not there.
    hit_rate         taken where nothing better is known: with routers that choose evenly, the share that is held.
    decode, prefill  the seconds of a step; None: not forecast, and `unforecast` says why.
    fits_gpu         weights, cache and working memory fit the largest GPU; None: there is none.
    """

    dtype: str
    context: int
    batch: int
    lacks: str
    verdict: Verdict
    reason: str
    weights: int
    resident: int
    cache: int
    working: int
    expert: int
    experts: int
    least: int
    memory: int | None
    slots: int
    capacity: int
    pack: int
    download: int
    hit_rate: float
    decode: Step | None
    prefill: Step | None
    unforecast: str
    fits_gpu: bool | None

    @property
    def held_share(self) -> float:
        """Of the experts, those that are in memory; 1 where there are none."""
        return self.slots / self.experts if self.experts else 1.0

    @property
    def needed(self) -> int:
        """Memory that the whole process takes, with the budget if there is one."""
        weights = self.weights if self.memory is None else min(self.memory, self.resident + self.slots * self.expert)
        return weights + self.cache + self.working

    def decode_tokens_per_second(self, hit_rate: float | None = None) -> float | None:
        """Of all sequences together. hit_rate: of the experts that a step needs, those in memory; None: `hit_rate`.
        None if it is not forecast. ConfigError for a hit rate that is not from 0 to 1."""
        return None if self.decode is None else self.decode.rate(self.hit_rate if hit_rate is None else hit_rate)

    def prefill_tokens_per_second(self, hit_rate: float | None = None) -> float | None:
        """As `decode_tokens_per_second`, of a prompt's first chunk."""
        return None if self.prefill is None else self.prefill.rate(self.hit_rate if hit_rate is None else hit_rate)

    def to_dict(self) -> dict[str, Any]:
        """Every value, and the two rates, for JSON."""
        return {
            **dataclasses.asdict(self),
            "needed": self.needed,
            "held_share": self.held_share,
            "decode_tokens_per_second": self.decode_tokens_per_second(),
            "prefill_tokens_per_second": self.prefill_tokens_per_second(),
        }


def plan(
    model: ModelConfig | EncoderDecoderConfig | Counted,
    machine: Ceilings,
    *,
    dtype: str = "bfloat16",
    memory: int | None = None,
    context: int | None = None,
    batch: int = 1,
    download: int = 0,
) -> Plan:
    """Plan a model for a computer.

    model      a config, or what a family that is not run was counted as.
    dtype      "float32", "bfloat16", or how the weights are packed: "int8", "int4", in groups of 32.
    memory     the bytes that weights may take; None: as many as they need, or where these are not free, as many as are.
    context    tokens of each sequence; None: 4096, or the model's own if that is shorter.
    batch      B, sequences that decode together.
    download   bytes of the checkpoint that the disk must still take.

    ConfigError for a wrong setting; too little memory or disk is no error, but what the plan says.
    """
    if dtype not in FORMATS:
        raise ConfigError(f"quant = {dtype!r}: one of {', '.join(FORMATS)}")
    for name, value in (("memory", memory), ("context", context), ("batch", batch)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value}: at least 1")
    model = counted(model)
    context = min(model.context or CONTEXT, CONTEXT) if context is None else context
    sizes = _sizes(model, dtype, context, batch)
    layout = _layout(model, dtype)
    pack = sizes.experts * sizes.expert if layout is None else layout.nbytes
    fit = _fit(sizes, machine, memory, pack, download, model.lacks)
    unforecast = model.lacks or ("" if machine.native_error is None else f"no native kernels: {machine.native_error}")
    decode = prefill = None
    if not unforecast:
        stored, chunk = fit.memory is not None, min(CHUNK, context)
        decode = _step(model, machine, dtype, "decode", batch, context, batch, stored)
        prefill = _step(model, machine, dtype, "prefill", chunk, chunk, 1, stored)
    scratch = sizes.cache + sizes.working
    return Plan(
        **vars(sizes),
        **vars(fit),
        dtype=dtype,
        context=context,
        batch=batch,
        lacks=model.lacks,
        download=download,
        hit_rate=min(1.0, fit.capacity / sizes.experts) if sizes.experts else 1.0,
        decode=decode,
        prefill=prefill,
        unforecast=unforecast,
        fits_gpu=max(held for _, held in machine.gpus) >= sizes.weights + scratch if machine.gpus else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sizes, and whether they fit.


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    weights: int
    resident: int
    cache: int
    working: int
    expert: int
    experts: int
    least: int


@dataclass(frozen=True, kw_only=True)
class _Fit:
    verdict: Verdict
    reason: str
    memory: int | None
    slots: int
    capacity: int
    pack: int


_size = partial(size, short=True)  # as sentences have it


def _routed(model: Counted) -> list[Weights]:
    return [weights for weights in model.weights if weights.part == "routed_experts"]


def _layout(model: Counted, dtype: str) -> Layout | None:
    """The pack of a model's experts; None if it has none, or they are not two matrices as ours are."""
    routed = _routed(model)
    if not routed or any(len(w.matrices) != 2 or w.matrices != routed[0].matrices for w in routed):
        return None
    (rows, width), (_, hidden) = routed[0].matrices
    bits = FORMATS[dtype]
    return layout_of(
        tuple(f"layers.{layer}.ffn.experts" for layer in range(model.moe_layers)),
        (routed[0].copies, rows, width),
        (routed[0].copies, width, hidden),
        torch.float32 if dtype == "float32" else torch.bfloat16,
        bias=routed[0].vectors > 0,
        bits=bits,
    )


def _top_k(model: Counted) -> int:
    return max((min(w.active, w.copies) for w in _routed(model)), default=0)


def _sizes(model: Counted, dtype: str, context: int, batch: int) -> _Sizes:
    held = byte_counts(model, context, dtype)
    routed = sum(held_bytes(weights, dtype) for weights in _routed(model))
    experts = sum(weights.layers * weights.copies for weights in _routed(model))
    # Of models that are run, what `KVCache` takes: layers with a window have room for as much as the others.
    room = model.attention if model.lacks else [dataclasses.replace(a, window=None) for a in model.attention]
    cache = BYTES[dtype] * sum(a.layers * a.cached * held_tokens(a, context) for a in room)
    layout = _layout(model, dtype)
    expert = layout.record_bytes if layout is not None else -(-routed // experts) if experts else 0
    top_k, resident = _top_k(model), held.weights - routed
    # What the kernels keep of a chunk: a token and a hidden value of each assignment, in float32.
    widths = max((sum(inputs for _, inputs in weights.matrices) for weights in _routed(model)), default=0)
    return _Sizes(
        weights=held.weights,
        resident=resident,
        cache=batch * (cache + held.state),
        working=PROCESS + 4 * CHUNK * top_k * widths,
        expert=expert,
        experts=experts,
        least=resident + top_k * expert,
    )


def _fit(sizes: _Sizes, machine: Ceilings, memory: int | None, pack: int, download: int, lacks: str) -> _Fit:
    room = machine.memory_bytes - sizes.cache - sizes.working
    free = f"{_size(machine.memory_bytes)} of memory are free"
    beside = f"{_size(sizes.cache)} of cache and {_size(sizes.working)} to work with"

    def whole(verdict: Verdict, reason: str) -> _Fit:
        return _Fit(verdict=verdict, reason=reason, memory=memory, slots=sizes.experts, capacity=sizes.experts, pack=0)

    if lacks:
        return whole("not run", lacks)
    if memory is None and sizes.weights <= room:
        lacking = _disk(machine, 0, download)
        takes = f"it takes {_size(sizes.weights + sizes.cache + sizes.working)} of the {_size(machine.memory_bytes)}"
        return whole("does not fit" if lacking else "fits", lacking or f"{takes} of memory that are free")
    if not sizes.experts:
        why = "and it has no experts that could wait on disk" if memory is None else "a memory budget is for experts"
        return whole("does not fit", f"{free}, {why}" if memory is None else f"{why}, and it has none")
    if memory is None and room < sizes.least:
        return whole("does not fit", f"{free}; with {beside}, at least {_size(sizes.least)} of weights must be in it")
    if memory is None:
        memory = max(sizes.least, room // 10**8 * 10**8)  # a size that is easy to type
    elif memory < sizes.least:
        return whole("does not fit", f"memory = {memory:,} bytes: at least {sizes.least:,}")
    slots = min((memory - sizes.resident) // sizes.expert, sizes.experts)
    # As `Store` does it: guesses have slots of their own, unless all experts are there.
    top_k = (sizes.least - sizes.resident) // sizes.expert
    spare = min(GUESSES * top_k, (slots - top_k) // 2) if slots < sizes.experts else 0
    lacking = _disk(machine, pack, download)
    held = f"{slots:,} of {sizes.experts:,} experts are held, the others wait on disk"
    if slots == sizes.experts:
        held = f"all {slots:,} experts are held"
    if sizes.resident + slots * sizes.expert > room:
        lacking = f"{free}: the budget, {beside} are more"
    return _Fit(
        verdict="does not fit" if lacking else "fits with memory",
        reason=lacking or held,
        memory=memory,
        slots=slots,
        capacity=slots - spare,
        pack=pack,
    )


def _disk(machine: Ceilings, pack: int, download: int) -> str:
    """Why the disk is too small; empty if it is not."""
    if pack + download <= machine.disk_free_bytes:
        return ""
    parts = [f"{_size(count)} of {what}" for what, count in (("checkpoint", download), ("pack", pack)) if count]
    return f"{_size(machine.disk_free_bytes)} of disk are free: it takes {' and '.join(parts)}"


# ---------------------------------------------------------------------------------------------------------------------
# Seconds.


@dataclass(frozen=True, kw_only=True)
class _Rates:
    """Bytes and FLOPs a second, of a format's sums on a computer."""

    read: float
    product: float
    of: Efficiency
    plain: Efficiency  # of matrices that the format does not pack

    @staticmethod
    def at(machine: Ceilings, dtype: str) -> _Rates:
        wide = "float32" if dtype == "float32" else "bfloat16"
        product = machine.float32_flops if wide == "float32" else machine.bfloat16_flops
        return _Rates(read=machine.read_bytes_per_second, product=product, of=EFFICIENCY[dtype], plain=EFFICIENCY[wide])


def _step(
    model: Counted,
    machine: Ceilings,
    dtype: str,
    when: Pass,
    tokens: int,
    context: int,
    sequences: int,
    stored: bool,
) -> Step:
    """A step of so many tokens: of decoding at the end of a context, or of reading one from its beginning. stored:
    with a memory budget."""
    rates = _Rates.at(machine, dtype)
    parts = {"resident": 0.0, "experts": 0.0}
    from_disk = chosen = 0.0
    layout = _layout(model, dtype)
    for weights in model.weights:
        if when not in weights.passes or not weights.matrices:
            continue
        routed = weights.part == "routed_experts"
        used = _used(weights, tokens)
        # Of a prompt only the last token is given logits.
        passed = sequences if _is_output(model, weights) and when == "prefill" else tokens
        packed = FORMATS[dtype] > 0 and weights.packed
        one = held_bytes(dataclasses.replace(weights, layers=1, copies=1, vectors=0, untrained=0), dtype)
        efficiency = rates.of if packed or routed else rates.plain
        share = efficiency.experts if routed else efficiency.matrices
        of_product = efficiency.experts_product if routed else efficiency.matrices_product
        rows = passed * weights.active / used  # tokens of each that is used
        if (routed or packed) and rows > FEW:
            rows += (CODES_STEP if packed else STEP) / 2  # the last step is half full on average
        reading = used * one / (rates.read * share)
        multiplying = used * rows * 2 * weights.multiplied / (rates.product * of_product)
        parts["experts" if routed else "resident"] += weights.layers * max(reading, multiplying)
        if routed and layout is not None:
            from_disk += weights.layers * used * layout.record_bytes
            chosen += weights.layers * used / model.moe_layers
    disk_rate = machine.disk_bytes_per_second
    return Step(
        tokens=tokens,
        **parts,
        attention=_attention_seconds(model, rates, dtype, when, tokens, context),
        overhead=_overhead_seconds(model, machine, dtype, when, tokens, sequences, stored),
        # What has come is read once more, for its checksum.
        disk=None if disk_rate is None else from_disk / disk_rate + from_disk / machine.read_bytes_per_second,
        fetch=machine.overhead.fetch_seconds,
        layers=model.moe_layers if chosen else 0,
        chosen=chosen,
    )


def _used(weights: Weights, tokens: int) -> float:
    """Copies that at least one of the tokens uses, if each takes `active` of them evenly: E · (1 - (1 - K/E)^T)."""
    return weights.copies * (1 - (1 - min(1.0, weights.active / weights.copies)) ** tokens)


def _is_output(model: Counted, weights: Weights) -> bool:
    return weights.part == ("embeddings" if model.tied else "head")


def _attention_seconds(model: Counted, rates: _Rates, dtype: str, when: Pass, tokens: int, context: int) -> float:
    """Scores and values of all tokens."""
    seconds = 0.0
    for attention in model.attention:
        if when not in attention.passes:
            continue
        flops = tokens * attended_flops(attention, when, context)
        read = 0
        if when == "decode":
            read = tokens * BYTES[dtype] * attention.layers * attention.cached * held_tokens(attention, context)
        seconds += max(flops / (rates.product * rates.of.attention_product), read / (rates.read * rates.of.attention))
    return seconds


def _overhead_seconds(
    model: Counted, machine: Ceilings, dtype: str, when: Pass, tokens: int, sequences: int, stored: bool
) -> float:
    """Calls, and what is neither a product nor attention: norms, RoPE, sums, the order of tokens by expert."""
    layers = sum(attention.layers for attention in model.attention if when in attention.passes)
    calls = machine.overhead
    width = next((w.matrices[0][1] for w in model.weights if w.part == "attention" and w.matrices), 0)
    each = calls.layer_seconds + (sequences - 1) * calls.sequence_seconds
    each += calls.packed_seconds if FORMATS[dtype] else 0.0
    # One token's share is in the measured calls.
    each += (tokens - 1) * width * STREAM / machine.read_bytes_per_second
    held = model.moe_layers * calls.stored_seconds if stored else 0.0
    return calls.step_seconds + layers * each + held
