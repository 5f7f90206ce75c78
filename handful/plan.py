"""Does a model run on this computer, and how fast? From its config alone, before anything is downloaded or loaded.

    plan(config, ceilings) -> Plan     sizes, whether it fits, and the seconds of a step, part by part

A pure function of a config and of what the computer can do (`handful.ceilings`). What is counted, and how:

    fits      weights + cache + a working allowance must be free; with a memory budget the experts that are not held
              wait in a pack on disk (`handful.memory`), which must have room.
    seconds   of a step of decoding and of a prompt's chunk (`handful.forecast`). Without a recorded trace, the hit rate
              is the share of experts that are held.

Legend: B sequences
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from handful.ceilings import Ceilings
from handful.config import EncoderDecoderConfig, ModelConfig
from handful.cost import byte_counts, cached_bytes, held_bytes, held_tokens
from handful.count import Attended, Counted, Weights, counted
from handful.engine import CHUNK
from handful.errors import ConfigError
from handful.experts.expert_file import Layout, layout_of
from handful.forecast import FORMATS, Step, forecast
from handful.positions import window_room
from handful.units import size

__all__ = ["FitVerdict", "Plan", "plan"]

FitVerdict = Literal["fits", "fits with memory", "does not fit", "not run"]

CONTEXT = 4096  # tokens of a sequence, where nothing is said
PROCESS = 400_000_000  # bytes of Python, torch and what they load


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
    slots            experts that a budget holds; all without one.
    pack, download   on disk: a pack of the experts (0 without a budget), and the checkpoint, if it is not there.
    hit_rate         taken where nothing better is known: with routers that choose evenly, the share that is held.
    decode, prefill  the seconds of a step; None: not forecast, and `unforecast` says why.
    fits_gpu         weights, cache and working memory fit the largest GPU; None: there is none.
    """

    dtype: str
    kv_cache_dtype: str
    context: int
    batch: int
    lacks: str
    verdict: FitVerdict
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
    kv_cache_dtype: str = "auto",
    memory: int | None = None,
    context: int | None = None,
    batch: int = 1,
    download: int = 0,
) -> Plan:
    """Plan a model for a computer.

    model      a config, or what a family that is not run was counted as.
    dtype      "float32", "bfloat16", or how the weights are packed: "int8", "int4", in groups of 32.
    kv_cache_dtype   "auto": as what is not packed; "int8": in 8 bits (`Engine`).
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
    sizes = _sizes(model, dtype, kv_cache_dtype, context, batch)
    layout = _layout(model, dtype)
    pack = sizes.experts * sizes.expert if layout is None else layout.nbytes
    fit = _fit(sizes, machine, memory, pack, download, model.lacks)
    unforecast = model.lacks or ("" if machine.native_error is None else f"no native kernels: {machine.native_error}")
    decode = prefill = None
    if not unforecast:
        stored, chunk = fit.memory is not None, min(CHUNK, context)
        decode = forecast(model, machine, dtype, "decode", batch, context, batch, layout, stored, kv_cache_dtype)
        prefill = forecast(model, machine, dtype, "prefill", chunk, chunk, 1, layout, stored, kv_cache_dtype)
    scratch = sizes.cache + sizes.working
    return Plan(
        **vars(sizes),
        **vars(fit),
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        context=context,
        batch=batch,
        lacks=model.lacks,
        download=download,
        hit_rate=min(1.0, fit.slots / sizes.experts) if sizes.experts else 1.0,
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
    verdict: FitVerdict
    reason: str
    memory: int | None
    slots: int
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


def _with_room(attention: Attended, context: int) -> Attended:
    return dataclasses.replace(attention, window=window_room(attention.window, context))


def _sizes(model: Counted, dtype: str, kv_cache_dtype: str, context: int, batch: int) -> _Sizes:
    held = byte_counts(model, context, dtype)
    routed = sum(held_bytes(weights, dtype) for weights in _routed(model))
    experts = sum(weights.layers * weights.copies for weights in _routed(model))
    # Of models that are run, what `KVCache` takes.
    room = model.attention if model.lacks else [_with_room(a, context) for a in model.attention]
    cache = sum(a.layers * cached_bytes(a, dtype, kv_cache_dtype) * held_tokens(a, context) for a in room)
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

    def whole(verdict: FitVerdict, reason: str) -> _Fit:
        return _Fit(verdict=verdict, reason=reason, memory=memory, slots=sizes.experts, pack=0)

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
        pack=pack,
    )


def _disk(machine: Ceilings, pack: int, download: int) -> str:
    """Why the disk is too small; empty if it is not."""
    if pack + download <= machine.disk_free_bytes:
        return ""
    parts = [f"{_size(count)} of {what}" for what, count in (("checkpoint", download), ("pack", pack)) if count]
    return f"{_size(machine.disk_free_bytes)} of disk are free: it takes {' and '.join(parts)}"
