"""A rank as a process: `python -m handful.cluster.rank`, started by `handful serve --ranks` or `handful join`.

It holds experts of a pack within a budget, joins whoever supervises, computes for the front, and joins again whenever
it finds itself left out: when it was stopped and wakes, or when the network was away.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from typing import Any

from handful.cluster.children import options_of
from handful.cluster.control import Control, connect
from handful.errors import HandfulError
from handful.experts.link import Link, LinkError
from handful.experts.rank import answer_calls
from handful.experts.store import Store

__all__ = ["Rank", "main"]

AGAIN = 0.2  # seconds before another attempt to join


class Rank:
    """Joins a supervisor with a store, and answers the front; `run` until `stop`.

    index   that it had before, or is to have; None: a new one.
    """

    def __init__(
        self,
        store: Store,
        address: tuple[str, int],
        secret: bytes,
        *,
        activation: str,
        backend: str = "auto",
        index: int | None = None,
    ) -> None:
        self.store, self.address, self.secret = store, address, secret
        self.activation, self.backend, self.index = activation, backend, index
        self._stopping = threading.Event()
        self._control: Control | None = None
        self._computing = threading.Lock()  # a link that is being left may still compute its last call

    def run(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(OSError, LinkError):
                self._member()
            # Not all at once, where many were cut off together.
            self._stopping.wait(AGAIN * random.uniform(0.5, 1.5))

    def stop(self) -> None:
        self._stopping.set()
        if self._control is not None:
            self._control.close()

    def _member(self) -> None:
        """From joining to being left out."""
        layout = self.store.layout
        about = {
            "kind": "rank",
            "index": self.index,
            "source": layout.source,
            "format": layout.format,
            "holdable": self.store.holdable,
            "slots": self.store.slots,
        }
        self._control = control = Control(self.address, self.secret, about)
        linked: threading.Thread | None = None
        try:
            for message in control.messages():
                if "refused" in message:
                    raise HandfulError(str(message["refused"]))
                if "number" in message:
                    self.index = message["index"]
                    where = control.sock.getpeername()[0], message["link_port"]
                    arguments = control, where, message["number"]
                    linked = threading.Thread(target=self._link, args=arguments, daemon=True)
                    linked.start()
                elif "hold" in message:
                    self._hold(control, message)
        finally:
            control.close()
            if linked is not None:
                linked.join()

    def _hold(self, control: Control, message: dict[str, Any]) -> None:
        """Begin to hold what is asked for, and tell when it is there."""
        experts = [(layer, expert) for layer, own in enumerate(message["hold"]) for expert in own]
        said = {"to": "front", "held": message["version"]}
        try:
            self.store.hold(experts)
        except HandfulError as error:
            control.say({**said, "all": False, "error": str(error)})
            return

        def wait() -> None:
            control.say({**said, "all": self.store.wait_held()})

        threading.Thread(target=wait, daemon=True).start()

    def _link(self, control: Control, where: tuple[str, int], number: int) -> None:
        """Answer the front, and the next one when it has gone, while we are a member."""
        while not control.closed:
            link: Link | None = None
            try:
                link = Link(connect(where, self.secret, number, seconds=5.0))
                # Who is left out leaves its link too.
                threading.Thread(target=_close_after, args=(control, link), daemon=True).start()
                with self._computing:
                    answer_calls(link, self.store, activation=self.activation, backend=self.backend)
            except (OSError, LinkError):
                time.sleep(AGAIN)
            finally:
                if link is not None:
                    link.close()


def _close_after(control: Control, link: Link) -> None:
    while not link.gone and not control.closed:
        control.wait_closed(0.5)
    link.close()


def main() -> None:
    options = options_of()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    from handful.memory import open_pack
    from handful.model import Decoder

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        model, pack = open_pack(
            options["model"], file=options["pack"], quantize=options["quantize"], group=options["group"]
        )
        assert isinstance(model, Decoder)
        assert model.config.router is not None
        store = Store(pack, options["memory"], top_k=model.config.router.top_k, read_ahead=False)
    except HandfulError as error:
        print(f"error {error}", file=sys.stderr)
        sys.exit(1)
    host, port = options["address"]
    rank = Rank(
        store,
        (host, port),
        bytes.fromhex(options["secret"]),
        activation=model.moe_layers[0].experts.activation,
        index=options["index"],
    )
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        rank.run()
    except HandfulError as error:
        print(f"error {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
