"""Ranks for tests: packs of experts, and ranks in threads of this process that compute from them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from handful.experts import Experts
from handful.experts.expert_file import Layout, PackFile, layout_of, write_pack
from handful.experts.link import Link
from handful.experts.rank import answer_calls
from handful.experts.store import Store
from handful.quantize import pack


def record_of(layers: Sequence[Experts], bits: int, group: int) -> Callable[[int, int], dict[str, Tensor]]:
    def record(layer: int, expert: int) -> dict[str, Tensor]:
        held = layers[layer]
        found: dict[str, Tensor] = {}
        for key in ("gate_up", "down"):
            weight = getattr(held, key).detach()[expert]
            if bits:
                packed = pack(weight, bits, group)
                found |= {key: packed.codes, f"{key}_scales": packed.scales}
            else:
                found[key] = weight
            bias = getattr(held, f"{key}_bias")
            if bias is not None:
                found[f"{key}_bias"] = bias.detach()[expert]
        return found

    return record


def packed(path: Path, layers: Sequence[Experts], bits: int = 0, group: int = 32) -> Layout:
    """A pack of some layers."""
    first = layers[0]
    (count, rows, width), hidden = first.gate_up.shape, first.down.shape[2]
    layout = layout_of(
        tuple(f"layers.{i}" for i in range(len(layers))),
        (count, rows, width),
        (count, width, hidden),
        first.down.dtype,
        bias=first.down_bias is not None,
        bits=bits,
        group=group,
    )
    write_pack(path, layout, record_of(layers, bits, group))
    return layout


@contextlib.contextmanager
def ranks_in_threads(
    path: Path, slots: Sequence[int], *, top_k: int, activation: str, backend: str = "auto"
) -> Iterator[tuple[list[Link], list[Store]]]:
    """Links to ranks, one for each number of slots, and their stores."""
    links, stores, threads = [], [], []
    for count in slots:
        file = PackFile(path)
        store = Store(file, count * file.layout.record_bytes, top_k=top_k, read_ahead=False)
        ours, theirs = socket.socketpair()
        options = {"activation": activation, "backend": backend}
        thread = threading.Thread(target=answer_calls, args=(Link(theirs), store), kwargs=options, daemon=True)
        thread.start()
        links.append(Link(ours))
        stores.append(store)
        threads.append((thread, theirs))
    try:
        yield links, stores
    finally:
        for link, store, (thread, theirs) in zip(links, stores, threads, strict=True):
            link.release()
            thread.join(10)
            theirs.close()
            store.close()
            assert not thread.is_alive()
