"""What it costs to answer without some experts: nats per token of a text that was held out, with all and without them,
by requests of the served model's own engine, while nobody else asks for much."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from handful.cluster.keeper import Keeper
from handful.cluster.members import lacking
from handful.engine import Request
from handful.errors import HandfulError
from handful.families.io import find_folder
from handful.inspection.texts import held_out, windows
from handful.model import Decoder
from handful.routing_options import MissingLoss, RoutingOptions
from handful.runs import text_behind
from handful.server.worker import Worker

__all__ = ["Measure", "held_out_tokens"]

TOKENS, WINDOW = 2048, 256  # of the text, and of it in one request
LOOK = 0.5  # seconds between two looks at what there is to measure
PATIENCE = 60.0  # seconds that one request may take
WAITED = 20.0  # seconds that one of ours waits while others ask
CALM = 5.0  # seconds since the last other placement, before what is not missing is measured


def held_out_tokens(model: Decoder, name: str) -> list[tuple[int, ...]]:
    """Windows of a text that the model was not trained on, if it is one of our runs; else of the default text."""
    if model.tokenizer is None:
        return []
    behind = text_behind(name, find_folder(name)) or {}
    _, documents, _ = held_out(behind.get("source"), behind.get("column"))
    _, found = windows(documents, model.tokenizer, min(WINDOW, model.config.context - 1), TOKENS, seed=0)
    return [window.tokens for window in found if len(window.tokens) > 1]


class Measure:
    """Measures in a thread what `keeper.losses` does not know yet: first what is missing now, then what would be
    missing without each rank, so that it is known when one goes. `close` ends it."""

    def __init__(self, worker: Worker, keeper: Keeper, model: Decoder, name: str) -> None:
        self.worker, self.keeper, self.model, self.name = worker, keeper, model, name
        self._closed = threading.Event()
        self._whole: float | None = None
        self._thread = threading.Thread(target=self._run, name="handful-measure", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        try:
            texts = held_out_tokens(self.model, self.name)
        except HandfulError:  # such as a text that is not there any more
            return
        while texts and not self._closed.wait(LOOK):
            lost = self._next()
            if lost is None:
                continue
            try:
                if self._whole is None:
                    self._whole = self._nats(texts, {})
                without = self._nats(texts, lost)
            except (HandfulError, TimeoutError):
                continue
            tokens = sum(len(text) - 1 for text in texts)
            self.keeper.know(lacking(lost), MissingLoss(without=without, whole=self._whole, tokens=tokens))

    def _next(self) -> Mapping[int, tuple[int, ...]] | None:
        current = self.keeper.missing
        calm = time.monotonic() - self.keeper.mapped > CALM
        wanted = [] if current is None else [current.experts]
        for lost in wanted + (self.keeper.would_lack() if calm else []):
            if lost and self._possible(lost) and lacking(lost) not in self.keeper.losses:
                return lost
        return None

    def _possible(self, lost: Mapping[int, tuple[int, ...]]) -> bool:
        router = self.model.config.router
        assert router is not None
        return all(router.experts - len(own) >= router.top_k for own in lost.values())

    def _nats(self, texts: list[tuple[int, ...]], lost: Mapping[int, tuple[int, ...]]) -> float:
        total = 0.0
        for text in texts:
            self._quiet()
            options = RoutingOptions(experts_off=lost, whole=True)
            job = self._made(Request(prompt=text, max_tokens=0, prompt_logprobs=0, routing=options)).result(PATIENCE)
            total -= sum(seen.token for seen in job.prompt_logprobs if seen is not None)
        return total / sum(len(text) - 1 for text in texts)

    def _quiet(self) -> None:
        """Wait until nobody else asks for something, but not for ever."""
        end = time.monotonic() + WAITED
        while self.worker.open and time.monotonic() < end and not self._closed.wait(LOOK / 5):
            pass

    def _made(self, request: Request) -> Future[Any]:
        if self._closed.is_set() or not self.worker.alive:
            raise HandfulError("the server is about to end")
        return self.worker.run(request)
