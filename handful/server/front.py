"""The front as a process: `python -m handful.server.front`, started by a supervisor. HTTP, the engine, and all of the
model but its experts, which ranks hold."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading

from rich.console import Console

from handful.cluster.children import options_of
from handful.cluster.control import Control
from handful.cluster.keeper import Keeper
from handful.encoder_decoder import EncoderDecoder
from handful.errors import ConfigError, HandfulError
from handful.experts.layer import Experts
from handful.experts.remote import RanksAsked, RemoteExperts
from handful.memory import load_without
from handful.server.app import Server
from handful.server.measure import Measure
from handful.server.run import serve
from handful.server.settings import ServerSettings

__all__ = ["main"]

PATIENT = 3600.0  # the supervisor is our parent: it does not leave us alone


def main() -> None:
    options = options_of()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        run(options)
    except HandfulError as error:
        if options["debug"]:
            raise
        Console(stderr=True).print(f"[red]error[/red] {error}", highlight=False)
        sys.exit(1)


def run(options: dict) -> None:  # type: ignore[type-arg]
    say_line = Console(stderr=True, highlight=False).print
    ranks = RanksAsked()

    def remote(layer: int, experts: Experts, layout: object) -> RemoteExperts:
        return RemoteExperts(ranks, layer, layout, activation=experts.activation, backend=experts.backend)  # type: ignore[arg-type]

    model, layout = load_without(
        options["model"], remote, file=options["pack"], quantize=options["quantize"], group=options["group"]
    )
    if isinstance(model, EncoderDecoder):
        raise ConfigError(f"{options['model']}: is an encoder-decoder: a decoder is needed")
    host, port = options["address"]
    control = Control((host, port), bytes.fromhex(options["secret"]), {"kind": "front"}, PATIENT)
    keeper = Keeper(
        model.config, ranks, awaited=options["ranks"], say=control.say, on_loss=options["on_loss"], told=say_line
    )

    def hear() -> None:
        for message in control.messages():
            keeper.heard(message)
        os._exit(1)  # whoever started us has gone, or does not know us any more

    settings = ServerSettings(**{**options["settings"], "origins": tuple(options["settings"]["origins"])})
    server = Server(
        model,
        settings,
        max_sequences=options["max_sequences"],
        cache_tokens=options["cache_tokens"],
        kv_cache_dtype=options["kv_cache_dtype"],
        speculate=options["speculate"],
        keeper=keeper,
        layout=layout,
    )
    http, links = (socket.socket(fileno=number) for number in options["fds"])
    links.setblocking(True)
    keeper.listen(links, bytes.fromhex(options["secret"]))
    threading.Thread(target=hear, name="handful-control", daemon=True).start()
    keeper.begun.wait()
    with contextlib.ExitStack() as stack:
        stack.callback(keeper.close)
        if options["measure"]:
            stack.callback(Measure(server.worker, keeper, model, options["model"]).close)
        if options["replace_every"]:
            threading.Thread(target=_replace, args=(keeper, options["replace_every"]), daemon=True).start()
        control.say({"ready": True})
        serve(server, http, say=say_line)


def _replace(keeper: Keeper, seconds: float) -> None:
    pause = threading.Event()
    while not pause.wait(seconds):
        with contextlib.suppress(HandfulError):
            keeper.replace()


if __name__ == "__main__":
    main()
