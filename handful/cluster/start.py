"""A model on ranks, from nothing to a server: sockets, processes, and how much each is to hold.

serve_on_ranks   a front and some ranks on this computer, and those that join it from others
join_ranks       some ranks on this computer, for a front on another one
of_torchrun      which of these a process that torchrun started is to be
"""

from __future__ import annotations

import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handful.cluster.children import Child
from handful.cluster.keeper import OnLoss
from handful.cluster.supervisor import Supervisor
from handful.errors import ConfigError
from handful.experts.expert_file import Layout
from handful.families.materialize import Progress
from handful.machine import machine
from handful.memory import open_pack
from handful.model import Decoder

if TYPE_CHECKING:
    from handful.server.settings import ServerSettings

__all__ = ["Held", "join_ranks", "of_torchrun", "opened", "rank_bytes", "serve_on_ranks"]

GROUP = 32  # weights to a scale, where they are quantized
BACKLOG = 128
LOOK = 0.2


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a rank opens and holds: a model's experts, in so many bits, from a pack, within so many bytes; None: so many
    that the loss of any one rank can be made good by the others."""

    model: str
    bits: int | None = None
    pack: Path | None = None
    memory: int | None = None


def rank_bytes(layout: Layout, top_k: int, ranks: int) -> int:
    """What each of some ranks is to hold so that all but one of them hold all experts."""
    own = len(layout.layers) * math.ceil(layout.experts / max(1, ranks - 1))
    return min(layout.records, own + top_k) * layout.record_bytes


def opened(held: Held, progress: Progress | None) -> tuple[Decoder, Layout]:
    """The model without memory and its pack's layout; the pack is made here, before any rank reads it."""
    model, pack = open_pack(held.model, file=held.pack, quantize=held.bits, group=GROUP, progress=progress)
    pack.close()
    if not isinstance(model, Decoder):
        raise ConfigError(f"{held.model}: is an encoder-decoder: a decoder is needed")
    return model, pack.layout


def serve_on_ranks(
    held: Held,
    model: Decoder,
    layout: Layout,
    settings: ServerSettings,
    http: socket.socket,
    *,
    ranks: int,
    max_sequences: int,
    cache_tokens: int | None,
    kv_cache_dtype: str,
    speculate: bool | None = None,
    rank_port: int | None = None,
    token: str | None = None,
    on_loss: OnLoss = "mask",
    replace_every: float = 0.0,
    measure: bool = True,
    debug: bool = False,
    told: Callable[[str], None] = lambda line: None,
    on_ready: Callable[[], None] = lambda: None,
) -> int:
    """Serve what was `opened` until a signal ends it; the exit status. on_ready: told that it answers.

    rank_port   where ranks of other computers join; None: none do. The link port is the one after it.
    token       that all must know; None: made anew, for ranks of this computer alone.
    """
    if ranks < 1:
        raise ConfigError(f"ranks = {ranks}: at least 1")
    if replace_every < 0:
        raise ConfigError(f"replace_every = {replace_every:g}: seconds, or 0 for never")
    if rank_port is not None and token is None:
        raise ConfigError("rank_port: ranks of other computers must know a secret; give it by HANDFUL_RANK_TOKEN")
    assert model.config.router is not None
    memory = held.memory or rank_bytes(layout, model.config.router.top_k, ranks)
    host = settings.host if rank_port is not None else "127.0.0.1"
    secret = secrets.token_bytes(32) if token is None else token.encode()
    with _listening(host, rank_port or 0) as control, _listening(host, rank_port + 1 if rank_port else 0) as links:
        supervisor = Supervisor(
            control,
            http,
            secret,
            layout.source,
            ranks=ranks,
            link_port=links.getsockname()[1],
            told=told,
            on_ready=on_ready,
        )
        threads = max(1, machine().cores // (ranks + 1))
        own = control.getsockname()[:2]
        address = ["127.0.0.1" if own[0] in ("0.0.0.0", "::") else own[0], own[1]]
        shared = {**_options(held), "address": address, "secret": secret.hex()}
        front = {
            **shared,
            "settings": asdict(settings),
            "max_sequences": max_sequences,
            "cache_tokens": cache_tokens,
            "kv_cache_dtype": kv_cache_dtype,
            "speculate": speculate,
            "ranks": ranks,
            "on_loss": on_loss,
            "replace_every": replace_every,
            "measure": measure,
            "fds": [http.fileno(), links.fileno()],
            "debug": debug,
        }
        supervisor.front = Child("handful.server.front", front, threads, (http.fileno(), links.fileno()))
        supervisor.children = [
            Child("handful.cluster.rank", {**shared, "memory": memory, "index": index}, threads)
            for index in range(ranks)
        ]
        return supervisor.run()


def join_ranks(
    held: Held,
    model: Decoder,
    layout: Layout,
    address: tuple[str, int],
    token: str,
    *,
    ranks: int,
    told: Callable[[str], None] = lambda line: None,
) -> None:
    """Hold experts for the front at an address until Ctrl-C. Ranks that die are started again."""
    if ranks < 1:
        raise ConfigError(f"ranks = {ranks}: at least 1")
    assert model.config.router is not None
    memory = held.memory or rank_bytes(layout, model.config.router.top_k, ranks + 1)
    options = {**_options(held), "address": list(address), "secret": token.encode().hex(), "memory": memory}
    threads = max(1, machine().cores // ranks)
    children = [Child("handful.cluster.rank", {**options, "index": None}, threads) for _ in range(ranks)]
    try:
        while True:
            for child in children:
                ended = child.tend()
                if ended is not None:
                    if child.deaths > 2:
                        raise ConfigError(f"address = {address[0]}:{address[1]}: the ranks cannot join; see above")
                    told(f"a rank has ended (status {ended}); it is started again")
            time.sleep(LOOK)
    finally:
        for child in children:
            child.end()


def of_torchrun(environment: Mapping[str, str] = os.environ) -> tuple[int, str, int] | None:
    """Which process of torchrun's this is, and where the first one's ranks join: beside the port that torchrun uses
    itself. None: torchrun did not start it."""
    rank, host, port = (environment.get(name) for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    if rank is None or host is None or port is None:
        return None
    return int(rank), host, int(port) + 1


def _options(held: Held) -> dict[str, Any]:
    pack = None if held.pack is None else str(held.pack)
    return {"model": held.model, "quantize": held.bits, "group": GROUP, "pack": pack}


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(f"rank_port = {port}: {error.strerror or error}") from None
    return sock
