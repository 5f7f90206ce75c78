"""What Prometheus reads.

The stems are vLLM's, so that a dashboard made for it works after a change of prefix. Beside them stands what a mixture
of experts has: for every MoE layer how even the load is, and under a memory budget what became of its experts. Labels
are layers, never experts.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from handful.cluster.keeper import Keeper
from handful.engine import Engine
from handful.experts.store import Store
from handful.observe import dead, entropy, max_vio
from handful.server.load import LoadWatch
from handful.server.worker import Made

__all__ = ["TEXT", "Metrics"]

# Whatever a scrape would rather have: of the other formats the library turns colons in names into underscores.
TEXT = "text/plain; version=0.0.4; charset=utf-8"

PREFIX = "handful:"
LABEL = ["model_name"]
SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
FINISHED = {"stop": "stop", "length": "length", "cancelled": "abort", "failed": "error"}
ENOUGH = 100  # assignments an expert, on average, before one that has less than a hundredth of them is called dead


class Metrics:
    """Counts what is made, and asks engine, load and store when it is read."""

    def __init__(
        self, name: str, engine: Engine, load: LoadWatch, store: Store | None, keeper: Keeper | None = None
    ) -> None:
        self.name, self.engine, self.load, self.store, self.keeper = name, engine, load, store, keeper
        self._registry = CollectorRegistry()
        self._registry.register(self)
        finished = Counter(
            f"{PREFIX}request_success", "Requests that ended, by why.", [*LABEL, "finished_reason"],
            registry=self._registry,
        )  # fmt: skip
        self._finished = {own: finished.labels(name, theirs) for own, theirs in FINISHED.items()}
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._between = self._histogram("inter_token_latency_seconds", "From a token to the next of its request.")
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the end.")
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first step.")
        self._last: dict[int, float] = {}  # when the last token of a job came, by its number

    def _histogram(self, name: str, what: str) -> Histogram:
        found = Histogram(f"{PREFIX}{name}", what, LABEL, buckets=SECONDS, registry=self._registry)
        return found.labels(self.name)

    def told(self, made: Made) -> None:
        """A delta, on the event loop."""
        job, delta = made.delta.job, made.delta
        if delta.token is not None:
            last = self._last.get(job.number)
            if last is None:
                self._first.observe(made.at - job.submitted)
            else:
                self._between.observe(made.at - last)
            self._last[job.number] = made.at
        if delta.finish is not None:
            self._last.pop(job.number, None)
            self._finished[delta.finish].inc()
            self._whole.observe(made.at - job.submitted)
            self._queue.observe((job.admitted or made.at) - job.submitted)

    def page(self) -> bytes:
        """What a scrape is answered, of type `TEXT`. Not on the event loop: it counts the load."""
        return generate_latest(self._registry)

    # -----------------------------------------------------------------------------------------------------------------
    # Asked for when it is read.

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats()
        yield self._gauge("num_requests_running", "Requests that share the engine's steps.", stats.running)
        yield self._gauge("num_requests_waiting", "Requests that wait for room.", stats.waiting)
        usage = stats.cached_tokens / stats.cache_tokens
        yield self._gauge("kv_cache_usage_perc", "Room of the KV caches that is taken, from 0 to 1.", usage)
        yield self._counter("prompt_tokens", "Prompt tokens that were read or found.", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens that were made.", stats.made_tokens)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked for in memory.", stats.prefix_tokens)
        yield self._counter("prefix_cache_hits", "Prompt tokens found in memory, and not computed.", stats.prefix_hits)
        yield self._counter("spec_decode_num_draft_tokens", "Tokens that passed as drafts.", stats.draft_tokens)
        accepted = stats.accepted_tokens
        yield self._counter("spec_decode_num_accepted_tokens", "Tokens of drafts that were made.", accepted)
        yield from self._of_load()
        if self.store is not None:
            yield from self._of_store(self.store)
        if self.keeper is not None:
            yield from self._of_ranks(self.keeper)

    def _of_load(self) -> Iterator[Metric]:
        recent = "over the last some ten thousand tokens"
        vio = self._per_layer(
            "expert_load_max_vio", f"(Max load - mean load) / mean load {recent}: 0 is even (MaxVio)."
        )
        spread = self._per_layer("expert_load_entropy", f"Entropy of the load {recent}, of an even load's: 1 is even.")
        idle = self._per_layer("dead_experts", f"Experts with less than 1 % of an even share {recent}.")
        for layer, counts_E in self.load.counts().items():
            if float(counts_E.sum()) == 0:
                continue
            vio.add_metric([self.name, str(layer)], max_vio(counts_E))
            spread.add_metric([self.name, str(layer)], entropy(counts_E))
            if float(counts_E.mean()) >= ENOUGH:
                idle.add_metric([self.name, str(layer)], dead(counts_E))
        yield from (vio, spread, idle)

    def _of_store(self, store: Store) -> Iterator[Metric]:
        stats = store.stats()
        yield self._gauge("expert_slots", "Experts that fit in memory.", stats.slots)
        yield self._gauge("experts", "Experts of all layers.", stats.experts)
        for field, name, what in (
            ("hits", "expert_cache_hits", "Times that a needed expert was in memory."),
            ("misses", "expert_cache_misses", "Times that a needed expert was not."),
            ("bytes_read", "expert_read_bytes", "Bytes of experts that were read from disk."),
            ("wait_seconds", "expert_wait_seconds", "Seconds that the computation waited for experts."),
        ):
            found = CounterMetricFamily(f"{PREFIX}{name}", what, labels=[*LABEL, "layer"])
            for layer, counts in zip(self.load.layers, stats.layers.values(), strict=True):
                found.add_metric([self.name, str(layer)], float(getattr(counts, field)))
            yield found

    def _of_ranks(self, keeper: Keeper) -> Iterator[Metric]:
        state, missing = keeper.state(), keeper.missing
        linked = [rank for rank in state["ranks"] if rank["linked"]]
        yield self._gauge("ranks_alive", "Ranks that compute experts.", len(linked))
        lacks = 0 if missing is None else missing.count
        yield self._gauge("experts_missing", "Experts that answers are made without.", lacks)
        yield self._counter("rank_outages", "Times that a rank was lost.", keeper.lost)
        yield self._counter("placements", "Times that experts were placed anew by their load.", keeper.replacements)
        last = state["outages"][-1]["whole_seconds"] if state["outages"] else None
        if last is not None:
            what = "Of the last one, from the loss until all experts were to be had again."
            yield self._gauge("rank_outage_seconds", what, last)
        for field, name, what in (
            ("assignments", "rank_assignments", "Assignments that the rank computed."),
            ("bytes_sent", "rank_sent_bytes", "Bytes sent to the rank."),
            ("bytes_received", "rank_received_bytes", "Bytes received from the rank."),
            ("waited_seconds", "rank_wait_seconds", "Seconds that the front stood still for the rank's rows."),
            ("computed_seconds", "rank_compute_seconds", "Seconds that the rank computed."),
        ):
            found = CounterMetricFamily(f"{PREFIX}{name}", what, labels=[*LABEL, "rank"])
            for rank in linked:
                found.add_metric([self.name, str(rank["rank"])], float(rank[field]))
            yield found

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        found = GaugeMetricFamily(f"{PREFIX}{name}", what, labels=LABEL)
        found.add_metric([self.name], value)
        return found

    def _counter(self, name: str, what: str, value: float) -> Metric:
        found = CounterMetricFamily(f"{PREFIX}{name}", what, labels=LABEL)
        found.add_metric([self.name], value)
        return found

    def _per_layer(self, name: str, what: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"{PREFIX}{name}", what, labels=[*LABEL, "layer"])
