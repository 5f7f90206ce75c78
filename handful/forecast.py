"""How long a step takes on this computer: of decoding a token of every sequence, or of reading a chunk of a prompt.

    forecast(...) -> Step     part by part, from what a model is made of and what the computer can do

decode    each weight that a step uses is read once: bytes / (memory's rate x the format's share of it), or its
          multiplications, if they take longer. With several sequences, each layer reads the experts that any of them
          chose: E · (1 - (1 - K/E)^B) for B sequences.
prefill   multiplications / (the product's rate x the format's share of it), or its bytes, if they take longer.
disk      (1 - hit rate) x the experts that a step needs / the rate at which a store reads them, and what a layer waits
          that misses any; added, for a layer's reads begin with its products. What is read ahead is read while the
          layer before computes, as far as that takes as long, and adds the guesses that were wrong.

Legend: E experts · K experts per token · B sequences · T tokens
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from handful.ceilings import Ceilings
from handful.cost import attended_flops, cached_bytes, held_bytes, held_tokens
from handful.count import Counted, Pass, Weights
from handful.errors import ConfigError
from handful.experts.expert_file import Layout
from handful.kernels.extension import gemv_max_tokens

__all__ = ["EFFICIENCY", "FORMATS", "Efficiency", "Step", "forecast"]

FORMATS = {"float32": 0, "bfloat16": 0, "int8": 8, "int4": 4}  # bits of a packed weight; 0: not packed
STREAM = 400  # bytes that norms, sums and the like move for each number of the stream, in a layer
STEP, CODES_STEP = 8, 16  # tokens that the kernels multiply at once by floats, and by codes


@dataclass(frozen=True)
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
# experts, matrices, attention; experts_product, matrices_product, attention_product
EFFICIENCY = {
    "float32": Efficiency(0.94, 0.9, 0.8, 1.2, 1.0, 0.5),
    "bfloat16": Efficiency(0.94, 0.9, 0.7, 1.2, 1.0, 0.35),
    "int8": Efficiency(0.88, 0.8, 0.7, 1.35, 1.15, 0.35),
    "int4": Efficiency(0.8, 0.55, 0.7, 1.4, 1.15, 0.35),
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

    def seconds(self, hit_rate: float, *, guessed: float = 0.0, right: float = 0.0) -> float | None:
        """Of the step, if of the experts that it needs so many are in memory, from 0 to 1; None if the disk's rate is
        not known and some of it is needed.

        guessed   experts that are read ahead, for each that the step needs; right: those of them that it needs, none of
                  which counts as in memory.
        """
        if not 0 <= hit_rate <= 1:
            raise ConfigError(f"hit_rate = {hit_rate}: from 0 to 1")
        there = min(1.0, hit_rate + right)
        if not 0 <= right <= guessed or hit_rate + right > 1 + 1e-9:
            raise ConfigError(f"right = {right}: from 0 to guessed = {guessed} and 1 - hit_rate = {1 - hit_rate}")
        beside = self.resident + self.attention + self.overhead
        if (hit_rate == 1 and not guessed) or not self.layers:
            return beside + self.experts
        if self.disk is None:
            return None
        # The share of layers that miss any, if all experts are as likely to be there.
        waits = 1 - float(there**self.chosen)
        missing, ahead = (1 - there) * self.disk, guessed * self.disk
        return max(beside + self.experts, ahead) + waits * self.layers * self.fetch + missing

    def rate(self, hit_rate: float) -> float | None:
        """Tokens a second; None as `seconds`."""
        seconds = self.seconds(hit_rate)
        return None if seconds is None else self.tokens / seconds


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
        product = machine.product_flops(dtype)
        return _Rates(read=machine.read_bytes_per_second, product=product, of=EFFICIENCY[dtype], plain=EFFICIENCY[wide])


def forecast(
    model: Counted,
    machine: Ceilings,
    dtype: str,
    when: Pass,
    tokens: int,
    context: int,
    sequences: int,
    layout: Layout | None,
    stored: bool,
    kv_cache_dtype: str = "auto",
) -> Step:
    """A step of so many tokens: of decoding at the end of a context, or of reading one from its beginning.

    layout   how a pack holds the experts; None: they cannot be packed, or there are none.
    stored   with a memory budget.
    kv_cache_dtype   as in `Engine`.
    """
    rates = _Rates.at(machine, dtype)
    parts = {"resident": 0.0, "experts": 0.0}
    from_disk = chosen = 0.0
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
        if (routed or packed) and 0 < gemv_max_tokens() < rows:
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
        attention=_attention_seconds(model, rates, dtype, kv_cache_dtype, when, tokens, context),
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


def _attention_seconds(
    model: Counted, rates: _Rates, dtype: str, kv_cache_dtype: str, when: Pass, tokens: int, context: int
) -> float:
    """Scores and values of all tokens."""
    seconds = 0.0
    for attention in model.attention:
        if when not in attention.passes:
            continue
        flops = tokens * attended_flops(attention, when, context)
        read = 0
        if when == "decode":
            held = cached_bytes(attention, dtype, kv_cache_dtype) * held_tokens(attention, context)
            read = tokens * attention.layers * held
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
