"""Experts on disk, and as many of them in memory as a budget allows.

A Store is slots of one expert each, shared by all layers, and who is in which. `experts/offload.py` multiplies from
them.

    held ───── in slots, as long as they are held
    needed ─┬─ in a slot ─► ready
            └─ not ─► read into another's slot ─► ready then
               guessed by the next layer's router ─► read ahead if asked to, into slots kept for that

Legend: T tokens · D model width · K experts per token · S slots
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handful.errors import ConfigError, HandfulError
from handful.experts.cache import POLICIES, Call, Policy, check_policy
from handful.experts.expert_file import PackFile, view
from handful.experts.readahead import ExpertId, Read, Reader
from handful.routing import Routing

__all__ = ["DEFAULT_POLICY", "LayerStats", "Store", "StoreStats"]

DEFAULT_POLICY = "next-use"
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
        read_ahead: bool = False,
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
        # Beside those that are held there is room for the experts of a token, or for all.
        self.holdable = self.slots if self.slots == total else max(0, self.capacity - top_k)
        self.policy = policy
        self._policy = self._fresh_policy()  # of those that are not held
        self._experts = frozenset(range(self.layout.experts))
        self._held: frozenset[ExpertId] = frozenset()
        self._routers: dict[int, Callable[[Tensor], Routing]] = {}
        memory = mmap.mmap(-1, self.slots * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Reads that go on and on are quicker into large pages; where all fit, each is read once, and to find large
        # pages for it can take longer than that.
        if self.slots < total and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8).view(self.slots, size)
        self._fields: dict[str, Tensor] | None = {field.name: view(whole, field) for field in self.layout.fields}
        self._slot: dict[ExpertId, int] = {}  # whose weights are there or on their way, needed
        self._reads: dict[ExpertId, Read] = {}  # of those, on their way
        self._guess: OrderedDict[ExpertId, Read] = OrderedDict()  # guessed, there or on their way, not needed yet
        self._free = list(range(self.slots - 1, -1, -1))
        self._counts = [_Counts() for _ in self.layout.layers]
        self._guesses = 0
        self._trust, self._calls = 1.0, 0
        self._failing = False  # the last read came to nothing
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

    def called(self, layer: int, routing: Routing, tokens: int | None = None) -> None:
        """Tell the policy what a layer's next call chose, before `there` or `fetch`.

        tokens   of the call, of which the routing's are a part; None: they are all.
        """
        if self.slots == self.layout.records:  # nobody ever gives way
            return
        tokens = routing.tokens if tokens is None else tokens
        if tokens:
            chosen = routing.experts_TK.flatten()
            if routing.dropped_TK is not None:
                chosen = routing.experts_TK[routing.computed_TK]
            counts = Counter(chosen.tolist())
            if counts.keys() <= self._experts:  # who multiplies refuses all others
                with self._reader.cond:
                    self._policy.call(Call(layer, tokens, counts))

    def _fresh_policy(self) -> Policy:
        return POLICIES[self.policy](len(self.layout.layers), self.layout.experts)

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
                    self._use(key)
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
                    self._use(key)
                    counts.hits += 1
                    here.append(key)
                elif self._take_guess(key, wanted):
                    here.append(key)
                else:
                    counts.misses += 1
                    missing.append(key)
            self._forget_guesses(layer)
            on_the_way = {key: self._reads[key] for key in here if key in self._reads} if self._reads else {}
            for read in on_the_way.values():
                self._reader.hurry(read)  # one that is to be held would be read after all others
            ready = [key for key in here if key not in on_the_way] if on_the_way else here
            missing.reverse()
            self._start(missing, on_the_way, wanted)
        return self._lists(layer, ready, on_the_way, missing)

    def _lists(
        self, layer: int, ready: list[ExpertId], on_the_way: dict[ExpertId, Read], missing: list[ExpertId]
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

    def _start(self, missing: list[ExpertId], on_the_way: dict[ExpertId, Read], pinned: set[ExpertId]) -> bool:
        """Begin as many reads as there is room for; whether there was room for one."""
        began = False
        while missing:
            slot = self._room(pinned)
            if slot is None:
                break
            began = True
            key = missing.pop()
            pinned.add(key)
            on_the_way[key] = self._read(key, slot)
        return began

    def _read(self, key: ExpertId, slot: int, *, later: bool = False) -> Read:
        """Begin to read into a slot; later: after all that is needed."""
        self._slot[key] = slot
        if key not in self._held:
            self._policy.add(key)
        self._reads[key] = Read(key, slot, self._arrived)
        self._reader.submit(self._reads[key], guess=later)
        return self._reads[key]

    def _use(self, key: ExpertId) -> None:
        if key not in self._held:
            self._policy.use(key)

    def _room(self, pinned: set[ExpertId]) -> int | None:
        """A slot for one more that is needed, if one is free or another can give way. While the disk fails, those that
        are there do not give way to what is not going to come: there is the slot of the read that failed."""
        if self._free and len(self._slot) < self.capacity:
            return self._free.pop()
        if self._failing and self._reads:
            return None
        victim = self._policy.evict(pinned | self._reads.keys())
        return None if victim is None else self._slot.pop(victim)

    def _arrived(self, read: Read) -> None:
        """A read is done. Under the reader's lock."""
        if not self._whole:
            return
        self._counts[read.key[0]].bytes_read += self.layout.record_bytes
        self._failing = read.error is not None
        if self._reads.get(read.key) is read:
            del self._reads[read.key]
            if read.error is not None:
                if read.key not in self._held:
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
            self._policy = self._fresh_policy()
            self._held = frozenset()
            self._whole = True

    # -----------------------------------------------------------------------------------------------------------------
    # Experts that stay.

    def hold(self, experts: Sequence[ExpertId]) -> None:
        """From now on keep these experts, (layer, expert), and no others of those that were held: those that are not
        there are read in this order, after what calls need. Does not wait for them: `wait_held`.

        ConfigError for more than `holdable`.
        """
        wanted = dict.fromkeys(experts)
        if len(wanted) > self.holdable:
            raise ConfigError(f"hold: {len(wanted):,} experts; there is room for {self.holdable:,}")
        with self.busy:
            if not self._whole:
                self._empty()
            with self._changing():
                for key in self._held - wanted.keys():
                    if key in self._slot:
                        self._policy.add(key)
                for key in wanted.keys() - self._held:
                    if key in self._slot:
                        self._policy.remove(key)
                self._held = frozenset(wanted)
                self._forget_all_guesses()
                missing = [key for key in wanted if key not in self._slot]
            while missing:
                with self._changing():
                    while missing and (slot := self._room(set())) is not None:
                        self._read(missing.pop(0), slot, later=True)
                if missing:  # what a call that failed left on its way takes the room
                    self._reader.wait(lambda: not self._reads)

    def wait_held(self, seconds: float | None = None) -> bool:
        """Wait until no expert that is held is on its way; whether all are there."""
        with self._reader.cond:
            self._reader.cond.wait_for(lambda: self._reads.keys().isdisjoint(self._held), seconds)
            return self._held <= self._slot.keys() and self._reads.keys().isdisjoint(self._held)

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

    def _take_guess(self, key: ExpertId, wanted: set[ExpertId]) -> bool:
        """Make a guess that came true one of the needed ones. False: it is not there, or there is no room."""
        read = self._guess.get(key)
        if read is None:
            return False
        if len(self._slot) >= self.capacity:
            victim = self._policy.evict(wanted | self._reads.keys())
            if victim is None:
                return False
            self._free.append(self._slot.pop(victim))
        del self._guess[key]
        self._slot[key] = read.slot
        if key not in self._held:
            self._policy.add(key)
        self._trust += (1 - self._trust) / LATELY
        counts = self._counts[key[0]]
        counts.misses += 1
        counts.ahead += 1
        if not read.done:
            self._reads[key] = read
            self._reader.hurry(read)
        return True

    def _forget_all_guesses(self) -> None:
        for layer in {key[0] for key in self._guess}:
            self._forget_guesses(layer)

    def _forget_guesses(self, layer: int) -> None:
        """Those of a layer that did not come true."""
        for key in [key for key in self._guess if key[0] == layer]:
            read = self._guess.pop(key)
            self._trust -= self._trust / LATELY
            if read.done or self._reader.cancel(read):
                self._free.append(read.slot)

    # -----------------------------------------------------------------------------------------------------------------

    def places(self) -> list[str]:
        """Where the experts of each layer are now, a letter for each: "m" in memory, "d" on disk alone, "f" being
        fetched. Any thread may ask."""
        with self._reader.cond:
            there, coming = set(self._slot), set(self._reads)
            for key, read in self._guess.items():
                (there if read.done else coming).add(key)
        return [
            "".join("f" if (i, e) in coming else "m" if (i, e) in there else "d" for e in range(self.layout.experts))
            for i in range(len(self.layout.layers))
        ]

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
