"""Experts on disk, and as many of them in memory as a budget allows.

    Store            the memory: slots of one expert each, shared by all layers, and who is in which
    StoredExperts    (x_TD, routing) -> y_TD, as `Experts`, from a store's slots

    routing ─► needed ─┬─ in a slot ────────────────────► multiplied at once ─┐
                       └─ not ─► read into another's slot ─► multiplied then ─┴─► weighted, summed ─► y_TD
                          guessed by the next layer's router ─► read ahead, into slots kept for that

A budget changes no bit: an assignment's output depends on its expert and token alone, and outputs are summed in the
routing's order when all are there.

Legend: T tokens · D model width · E experts · K experts per token · N assignments · F an expert's hidden width ·
G = 2·F gate and up rows (F without a gate) · S slots · n tokens of one expert
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handful.config import GATED
from handful.errors import ConfigError, HandfulError, RoutingError
from handful.experts.cache import POLICIES, check_policy
from handful.experts.disk import PackFile, view
from handful.experts.layer import BACKENDS, check_fits
from handful.experts.native import (
    DTYPES,
    FEW,
    Slots,
    available,
    compute_dtype,
    experts_in_parts,
    experts_in_slots,
    takes,
)
from handful.experts.readahead import Key, Read, Reader
from handful.experts.reference import activate
from handful.experts.untraced import untraced
from handful.machine import native_error
from handful.quantize import Packed, unpack
from handful.routing import Routing

__all__ = ["DEFAULT_POLICY", "LayerStats", "Store", "StoreStats", "StoredExperts"]

DEFAULT_POLICY = "lfu"
READERS = 4  # reads at a time: a disk is quicker with a few
GUESSES = 1  # slots kept for guesses, in a token's experts
# Where fewer of the last guesses (about as many as LATELY) came true than this, they cost the disk more than they save:
# then guesses are made at one call of RARELY alone, to see whether that has changed.
WORTHWHILE, LATELY, RARELY = 0.25, 32, 16


@dataclass(frozen=True, kw_only=True)
class LayerStats:
    """What became of one layer's experts.

    hits, misses    times that an expert was needed (once for all tokens of a call) and was in memory, or was not.
    ahead           of the misses, those whose read had begun before they were known to be needed.
    bytes_read      for this layer, wrong guesses too.
    wait_seconds    that the computation stood still for reads.
    """

    hits: int = 0
    misses: int = 0
    ahead: int = 0
    bytes_read: int = 0
    wait_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """What a store did since it was made or `reset`: a LayerStats by the name of each layer's module.

    slots          experts that fit in memory, of `experts` in all.
    guesses        reads that were begun on a guess; `ahead` of the layers' sum came true.
    """

    layers: dict[str, LayerStats]
    slots: int
    experts: int
    expert_bytes: int
    guesses: int

    def total(self, name: str) -> float:
        """The sum of a LayerStats value over all layers."""
        return sum(float(getattr(layer, name)) for layer in self.layers.values())

    @property
    def hit_rate(self) -> float:
        """Hits among all uses, from 0 to 1; 1 where there were none."""
        hits, misses = self.total("hits"), self.total("misses")
        return hits / (hits + misses) if hits + misses else 1.0


class _Counts:
    """LayerStats while it is being counted."""

    def __init__(self) -> None:
        self.hits = self.misses = self.ahead = self.bytes_read = 0
        self.wait_seconds = 0.0


class Store:
    """The slots of all layers' experts, within a budget of memory, filled from a pack.

    pack          open; the store closes it.
    memory_bytes  for the slots.
    top_k         K, the most experts that one token needs of a layer.
    policy        who gives way when there is no room (see `handful.experts.cache`).
    read_ahead    read what the next layer's router would choose for this layer's input while this layer computes.

    ConfigError, with the least that would do, for a budget below one token's experts of a layer. A store serves one
    call at a time; calls of other threads wait. After `close`, or when nothing holds it any more, its threads, its
    memory and its file are given back.
    """

    def __init__(
        self,
        pack: PackFile,
        memory_bytes: int,
        *,
        top_k: int,
        policy: str = DEFAULT_POLICY,
        read_ahead: bool = True,
        readers: int = READERS,
    ) -> None:
        check_policy(policy)
        self.pack = pack
        self.layout = pack.layout
        self.busy = threading.RLock()  # one call at a time
        size, total = self.layout.record_bytes, self.layout.records
        self.slots = min(memory_bytes // size, total)
        if self.slots < min(top_k, self.layout.experts):
            raise ConfigError(
                f"memory for experts = {max(0, memory_bytes):,} bytes: the {top_k} experts of a token in one layer "
                f"need at least {top_k * size:,}"
            )
        # Guesses have slots of their own: a wrong one costs nobody a place.
        room = self.slots - top_k if self.slots < total else 0
        self._spare = min(GUESSES * top_k, room // 2) if read_ahead else 0
        self.capacity = self.slots - self._spare
        self.policy = policy
        self._policy = POLICIES[policy](self.capacity)
        self._routers: dict[int, Callable[[Tensor], Routing]] = {}
        memory = mmap.mmap(-1, self.slots * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Reads that go on and on are quicker into large pages; where all fit, each is read once, and to find large
        # pages for it can take longer than that.
        if self.slots < total and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8).view(self.slots, size)
        self._fields: dict[str, Tensor] | None = {field.name: view(whole, field) for field in self.layout.fields}
        self._slot: dict[Key, int] = {}  # whose weights are there or on their way, needed
        self._reads: dict[Key, Read] = {}  # of those, on their way
        self._guess: OrderedDict[Key, Read] = OrderedDict()  # guessed, there or on their way, not needed yet
        self._free = list(range(self.slots - 1, -1, -1))
        self._counts = [_Counts() for _ in self.layout.layers]
        self._guesses = 0
        self._trust, self._calls = 1.0, 0
        self._whole = True  # what is said above is true: no change of it was interrupted
        data = memoryview(memory)

        def load(layer: int, expert: int, slot: int) -> None:
            pack.read(layer, expert, data[slot * size : (slot + 1) * size])

        self._reader = Reader(load, readers)
        self._release = weakref.finalize(self, _release, self._reader, pack)

    def guess_with(self, layer: int, router: Callable[[Tensor], Routing]) -> None:
        """Guess what a layer will need by its router, a function of the input of the layer before it."""
        self._routers[layer] = router

    def field(self, name: str) -> Tensor | None:
        """A tensor of every slot, (S, ...); None if the pack has none of that name."""
        if self._fields is None:
            raise HandfulError(f"{self.pack.path}: the store of these experts is closed")
        return self._fields.get(name)

    # -----------------------------------------------------------------------------------------------------------------
    # One layer's experts.

    def there(self, layer: int, experts: Sequence[int]) -> list[int] | None:
        """The slots of those of a layer's experts that are named, if all of them are there; None: `fetch` them. Hold
        `busy` from here until they are done with."""
        keys = [(layer, expert) for expert in experts]
        with self._reader.cond:
            if self._reads or not self._whole or not all(key in self._slot for key in keys):
                return None
            with self._changing():
                used = sorted(set(keys))
                for key in used:
                    self._policy.use(key)
                self._counts[layer].hits += len(used)
                self._forget_guesses(layer)
            return [self._slot[key] for key in keys]

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Begin to read those of a layer's experts that are not there, and give all, (expert, slot), each once: lists
        of those that are ready, which stay where they are until the next list is asked for.

        CheckpointError for one that cannot be read. Hold `busy` from here until the last list is done with.
        """
        counts, keys = self._counts[layer], [(layer, expert) for expert in experts]
        wanted = set(keys)
        if not self._whole:
            self._empty()
        with self._changing():
            here, missing = [], []
            for key in keys:
                if key in self._slot:
                    self._policy.use(key)
                    counts.hits += 1
                    here.append(key)
                elif self._take_guess(key, wanted):
                    here.append(key)
                else:
                    counts.misses += 1
                    missing.append(key)
            self._forget_guesses(layer)
            on_the_way = {key: self._reads[key] for key in here if key in self._reads} if self._reads else {}
            ready = [key for key in here if key not in on_the_way] if on_the_way else here
            missing.reverse()
            self._start(missing, on_the_way, wanted)
        return self._lists(layer, ready, on_the_way, missing)

    def _lists(
        self, layer: int, ready: list[Key], on_the_way: dict[Key, Read], missing: list[Key]
    ) -> Iterator[list[tuple[int, int]]]:
        while ready or on_the_way or missing:
            if ready:
                yield [(key[1], self._slot[key]) for key in ready]

            def progressed() -> bool:
                with self._changing():
                    began = self._start(missing, on_the_way, set(on_the_way))
                return began or any(read.done for read in on_the_way.values())

            if missing or on_the_way:
                self._counts[layer].wait_seconds += self._reader.wait(progressed)
            ready = []
            for read in [read for read in on_the_way.values() if read.done]:
                del on_the_way[read.key]
                if read.error is not None:
                    raise read.error
                ready.append(read.key)

    def _start(self, missing: list[Key], on_the_way: dict[Key, Read], pinned: set[Key]) -> bool:
        """Begin as many reads as there is room for; whether there was room for one."""
        began = False
        while missing:
            slot = self._room(pinned)
            if slot is None:
                break
            began = True
            key = missing.pop()
            self._slot[key] = slot
            self._policy.add(key)
            pinned.add(key)
            on_the_way[key] = self._reads[key] = Read(key, slot, self._arrived)
            self._reader.submit(on_the_way[key])
        return began

    def _room(self, pinned: set[Key]) -> int | None:
        """A slot for one more that is needed, if one is free or another can give way."""
        if self._free and len(self._slot) < self.capacity:
            return self._free.pop()
        victim = self._policy.evict(pinned | self._reads.keys())
        return None if victim is None else self._slot.pop(victim)  # type: ignore[call-overload]

    def _arrived(self, read: Read) -> None:
        """A read is done. Under the reader's lock."""
        if not self._whole:
            return
        self._counts[read.key[0]].bytes_read += self.layout.record_bytes
        if self._reads.get(read.key) is read:
            del self._reads[read.key]
            if read.error is not None:
                self._policy.remove(read.key)
                self._free.append(self._slot.pop(read.key))
        elif self._guess.get(read.key) is not read:
            self._free.append(read.slot)  # it was a guess, and dropped meanwhile
        elif read.error is not None:  # who needs it will read it again, and be told
            del self._guess[read.key]
            self._free.append(read.slot)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Around every change. One that Ctrl-C cuts short leaves a store that is emptied before its next use."""
        with self._reader.cond:
            self._whole = False
            yield
            self._whole = True

    def _empty(self) -> None:
        with self._reader.cond:
            self._reader.drain()
            self._slot.clear()
            self._reads.clear()
            self._guess.clear()
            self._free = list(range(self.slots - 1, -1, -1))
            self._policy = POLICIES[self.policy](self.capacity)
            self._whole = True

    # -----------------------------------------------------------------------------------------------------------------
    # Guesses.

    def guess(self, layer: int, x_TD: Tensor) -> None:
        """Begin to read what a layer is likely to need, with the input of the layer before it."""
        router = self._routers.get(layer)
        self._calls += 1
        if router is None or not self._spare or (self._trust < WORTHWHILE and self._calls % RARELY):
            return
        with torch.no_grad():
            routing = router(x_TD)
            weight_E = torch.zeros(routing.experts, dtype=routing.weights_TK.dtype)
            weight_E.index_add_(0, routing.experts_TK.flatten(), routing.weights_TK.flatten())
        likely = weight_E.argsort(descending=True, stable=True)[: int((weight_E > 0).sum())]
        with self._changing():
            for expert in likely.tolist():
                key = (layer, expert)
                # Those that were dropped while they were read still have their slots.
                if key in self._slot or key in self._guess:
                    continue
                if not self._free or len(self._guess) >= self._spare:
                    return
                self._guess[key] = Read(key, self._free.pop(), self._arrived)
                self._guesses += 1
                self._reader.submit(self._guess[key], guess=True)

    def _take_guess(self, key: Key, wanted: set[Key]) -> bool:
        """Make a guess that came true one of the needed ones. False: it is not there, or there is no room."""
        read = self._guess.get(key)
        if read is None:
            return False
        if len(self._slot) >= self.capacity:
            victim = self._policy.evict(wanted | self._reads.keys())
            if victim is None:
                return False
            self._free.append(self._slot.pop(victim))  # type: ignore[call-overload]
        del self._guess[key]
        self._slot[key] = read.slot
        self._policy.add(key)
        self._trust += (1 - self._trust) / LATELY
        counts = self._counts[key[0]]
        counts.misses += 1
        counts.ahead += 1
        if not read.done:
            self._reads[key] = read
            self._reader.hurry(read)
        return True

    def _forget_guesses(self, layer: int) -> None:
        """Those of a layer that did not come true."""
        for key in [key for key in self._guess if key[0] == layer]:
            read = self._guess.pop(key)
            self._trust -= self._trust / LATELY
            if read.done or self._reader.cancel(read):
                self._free.append(read.slot)

    # -----------------------------------------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        """What happened so far."""
        with self._reader.cond:
            return StoreStats(
                layers={
                    name: LayerStats(**vars(counts))
                    for name, counts in zip(self.layout.layers, self._counts, strict=True)
                },
                slots=self.slots,
                experts=self.layout.records,
                expert_bytes=self.layout.record_bytes,
                guesses=self._guesses,
            )

    def reset(self) -> None:
        """Count from zero again; what is in memory stays."""
        with self._reader.cond:
            self._counts = [_Counts() for _ in self.layout.layers]
            self._guesses = 0

    def close(self) -> None:
        """Give back the threads, the memory and the file; a call after it is a HandfulError. Twice does no harm."""
        with self.busy:
            self._release()
            self._fields = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _release(reader: Reader, pack: PackFile) -> None:
    reader.stop()
    pack.close()


class StoredExperts(nn.Module):
    """E feed-forward networks in a store: (x_TD, routing) -> y_TD, as `Experts`, on a CPU and without gradients.

    backend   "auto": the native kernels where they are (float32 and bfloat16), else the plain loop. "native": those
              kernels or an error. "grouped" and "reference": the plain loop.

    The bits are those of `Experts`, or of `QuantizedExperts` of the same bits and group, with the same backend; where
    the plain loop runs, of "reference", which "auto" is there too.
    """

    def __init__(self, store: Store, layer: int, *, activation: str, backend: str = "auto") -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ConfigError(f"experts backend {backend!r}: one of {', '.join(BACKENDS)}")
        self.store = store
        self.layer = layer
        self.count = store.layout.experts
        self.activation = activation
        self.backend = backend
        shapes = {field.name: field.shape for field in store.layout.fields}
        self.width = shapes["down"][0]
        self.hidden = shapes["gate_up"][0] // (2 if activation in GATED else 1)
        self.float_dtype = None if store.layout.bits else getattr(torch, store.layout.dtype)

    # A traced graph cannot wait for a disk.
    @untraced
    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        check_fits(x_TD, routing, self.count, self.width)
        if torch.is_grad_enabled() and (x_TD.requires_grad or routing.weights_TK.requires_grad):
            raise HandfulError(
                "stored experts give no gradient: run the model under torch.no_grad() or torch.inference_mode()"
            )
        if x_TD.device.type != "cpu":
            raise HandfulError(f"stored experts compute on the cpu: they were given x on {x_TD.device.type}")
        if self.backend == "native" and not available():
            raise HandfulError(f"experts backend 'native': {native_error()}")
        taken = takes(x_TD) and (self.float_dtype is None or self.float_dtype in DTYPES)
        if self.backend == "native" and not taken:
            raise ConfigError("experts backend 'native' takes float32 and bfloat16 on cpu")
        with self.store.busy:
            if self.backend in ("auto", "native") and available() and taken:
                y_TD = self._at_once(x_TD, routing)
                if y_TD is not None:
                    return y_TD
                return experts_in_parts(x_TD, routing, self.count, self._slots(), self._fetch)
            if not self.store.layout.bits:
                return self._loop(x_TD, routing)
            dtype = compute_dtype(x_TD)
            with torch.autocast("cpu", enabled=False):
                return self._loop(x_TD.to(dtype), routing)

    def _at_once(self, x_TD: Tensor, routing: Routing) -> Tensor | None:
        """The output for few tokens whose experts are all in memory; None if they are not."""
        if not 0 < len(x_TD) <= FEW or routing.dropped_TK is not None:
            return None
        slots = self._slots()
        if slots.bits and slots.down_bias is not None and slots.down_bias.dtype != compute_dtype(x_TD):
            return None
        there = self.store.there(self.layer, routing.experts_TK.flatten().tolist())
        if there is None:
            return None
        self.store.guess(self.layer + 1, x_TD)
        slots_TK = torch.tensor(there).view(routing.experts_TK.shape)
        return experts_in_slots(x_TD, slots_TK, routing.weights_TK, slots)

    def _fetch(self, chosen: Sequence[int], x_TD: Tensor) -> Iterator[list[tuple[int, int]]]:
        lists = self.store.fetch(self.layer, chosen)
        self.store.guess(self.layer + 1, x_TD)
        return lists

    def _slots(self) -> Slots:
        """The store's slots as the kernels take them."""
        field, layout = self.store.field, self.store.layout
        gate_up, down = field("gate_up"), field("down")
        assert gate_up is not None
        assert down is not None
        return Slots(
            gate_up=gate_up,
            gate_up_scales=field("gate_up_scales"),
            down=down,
            down_scales=field("down_scales"),
            gate_up_bias=field("gate_up_bias"),
            down_bias=field("down_bias"),
            activation=self.activation,
            hidden=self.hidden,
            bits=layout.bits,
            group=layout.group,
        )

    def _loop(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """`reference`, with experts in the order in which they are there, and their outputs summed in its own."""
        kept_TK = torch.ones_like(routing.experts_TK, dtype=torch.bool)
        if routing.dropped_TK is not None:
            kept_TK = ~routing.dropped_TK
        chosen = routing.experts_TK[kept_TK].unique().tolist()
        for e in chosen:
            if not 0 <= e < self.count:
                raise RoutingError(f"routing names expert {e}: there are {self.count}, counted from 0")
        accumulate = torch.promote_types(x_TD.dtype, torch.float32)
        outputs: dict[int, tuple[Tensor, Tensor]] = {}
        slots = self._slots()
        for ready in self._fetch(chosen, x_TD):
            for e, slot in ready:
                token_n, slot_n = (kept_TK & (routing.experts_TK == e)).nonzero(as_tuple=True)
                gate_up, down, gate_up_bias, down_bias = _one(slots, slot, x_TD.dtype)
                h_nG = F.linear(x_TD[token_n], gate_up, gate_up_bias)
                out_nD = F.linear(activate(h_nG, self.activation), down, down_bias)
                weight_n1 = routing.weights_TK[token_n, slot_n].unsqueeze(1)
                outputs[e] = token_n, (out_nD * weight_n1).to(accumulate)
        y_TD = torch.zeros(x_TD.shape, dtype=accumulate)
        for e in chosen:
            y_TD = y_TD.index_add(0, *outputs[e])
        return y_TD.to(x_TD.dtype)

    def extra_repr(self) -> str:
        layout = self.store.layout
        return f"{self.count} experts, {layout.format}, activation={self.activation}, backend={self.backend}"


def _one(slots: Slots, slot: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One slot's weights and biases, unpacked if they are quantised."""

    def weight(codes: Tensor, scales: Tensor | None, inputs: int) -> Tensor:
        if scales is None:
            return codes[slot].to(dtype)
        return unpack(Packed(codes[slot], scales[slot], slots.bits, slots.group, inputs), dtype)

    def bias(stack: Tensor | None) -> Tensor | None:
        return None if stack is None else stack[slot].to(dtype)

    return (
        weight(slots.gate_up, slots.gate_up_scales, slots.down.shape[1]),
        weight(slots.down, slots.down_scales, slots.hidden),
        bias(slots.gate_up_bias),
        bias(slots.down_bias),
    )
