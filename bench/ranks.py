"""What do ranks cost on one computer, and what is gained where they are not on one?

    python bench/ranks.py step        a training step: on one process, on ranks with DDP, on ranks with FSDP2
    python bench/ranks.py levels      one-level beside two-level exchange: two hosts of two ranks, a slow link (root)
    python bench/ranks.py forecast    a forward pass of a whole model on ranks beside `handful plan`'s simulation of it

Ranks are processes over gloo. Hosts are network namespaces of this computer, joined by a pair of virtual Ethernet ends
whose rate (tc tbf) and, where the kernel has it, delay (tc netem) are limited; what ranks of one namespace send each
other does not pass them. All that is compared takes turns within one run; figures are medians. On two cores four ranks
compute no quicker than one: `step` is about what is added to the same sums, and not about what more computers would
gain.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from handful.ceilings import ceilings
from handful.config import BalanceConfig, ModelConfig, RouterConfig, TrainConfig
from handful.count import counted
from handful.deployment import Device, deploy
from handful.experts import Experts
from handful.experts.parallel import Layout, ParallelExperts, dealt
from handful.model import Decoder
from handful.placement import Link, Topology
from handful.ranks import ALONE, Ranks
from handful.routing import Routing
from handful.spread import own_experts, spread
from handful.train_ranks import Shared, _Loss
from handful.train_step import make_optimizer

RESULTS = Path(__file__).parent / "results" / "ranks.json"
MODEL = ModelConfig(
    vocab=2048, width=128, layers=4, heads=4, router=RouterConfig(experts=32, top_k=4), expert_width=64, qk_norm="head",
    context=256,
)  # fmt: skip
DEEP = ModelConfig(
    vocab=2048, width=512, layers=4, heads=8, router=RouterConfig(experts=16, top_k=2), expert_width=512, context=512,
    qk_norm="head",
)  # fmt: skip
WIDTH, HIDDEN, EXPERTS, TOP_K, TOKENS = 512, 256, 32, 8, 256  # of the layer of `levels`


def seconds(what: Callable[[], Any], ranks: Ranks, times: int) -> list[float]:
    found = []
    for _ in range(times):
        ranks.sum(torch.zeros(1))  # all begin together
        began = time.perf_counter()
        what()
        ranks.sum(torch.zeros(1))
        found.append(time.perf_counter() - began)
    return found


def turns(cases: dict[str, Callable[[], Any]], ranks: Ranks, rounds: int, times: int) -> dict[str, float]:
    """Median seconds of each case, one after another in every round."""
    for what in cases.values():
        what()
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, what in cases.items():
            found[name] += seconds(what, ranks, times)
    return {name: statistics.median(all_of_them) for name, all_of_them in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# On each rank.


def step(ranks: Ranks, rounds: int) -> dict[str, float]:
    """The other parameters by DDP and by FSDP2, of the same model; forward, backward and the optimizer's step."""
    settings = TrainConfig(
        steps=1, batch=16, context=256, lr=1e-3, dtype="float32", balance=BalanceConfig(loss="switch", weight=0.01)
    )
    tokens_BS = torch.randint(MODEL.vocab, (settings.batch, settings.context + 1))[ranks.share(settings.batch)]

    def stepping(loss: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def one() -> None:
            value, _ = loss(tokens_BS[:, :-1], tokens_BS[:, 1:], "float32")
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return one

    def made() -> Decoder:
        torch.manual_seed(0)
        model = Decoder(MODEL).train()
        if ranks.size > 1:
            spread(model, ranks)
        return model

    first = made()
    cases = {"ddp": stepping(Shared(first, ranks).loss, make_optimizer(first, settings))}
    if ranks.size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        second = made()
        names, mesh = own_experts(second), init_device_mesh("cpu", (ranks.size,))
        ignored = {p for name, p in second.named_parameters() if name in names}
        loss = _Loss(second)
        for block in second.layers:
            fully_shard(block, mesh=mesh, ignored_params=ignored)
        fully_shard(loss, mesh=mesh, ignored_params=ignored)
        trained = [p for p in second.parameters() if p.numel()]
        cases["fsdp2"] = stepping(loss, torch.optim.AdamW(trained, lr=1e-3, foreach=False))
    return turns(cases, ranks, rounds, 2)


def levels(ranks: Ranks, rounds: int) -> dict[str, Any]:
    """A layer's forward pass, one-level beside two-level."""
    torch.manual_seed(0)
    experts = Experts(EXPERTS, WIDTH, HIDDEN)
    torch.manual_seed(ranks.rank)
    x_TD, scores_TE = torch.randn(TOKENS, WIDTH), torch.rand(TOKENS, EXPERTS)
    weights_TK, experts_TK = scores_TE.topk(TOP_K)
    routing = Routing(scores_TE, scores_TE, experts_TK, weights_TK)
    modules = {}
    for name, two_level in (("one level", False), ("two levels", True)):
        own = Ranks(ranks.rank, ranks.hosts, two_level, ranks.group)
        modules[name] = ParallelExperts(
            Experts(EXPERTS, WIDTH, HIDDEN), Layout(EXPERTS, dealt(EXPERTS, ranks.size)), own
        )
        with torch.no_grad():
            for mine, whole in zip(modules[name].local.parameters(), experts.parameters(), strict=True):
                mine.copy_(whole[modules[name].numbers])
    away = [rank for rank, host in enumerate(ranks.hosts) if host != ranks.hosts[ranks.rank]]
    sent, outputs = {}, {}
    with torch.no_grad():
        for name, module in modules.items():
            outputs[name] = module(x_TD, routing)
            sent[name] = sum(module.ranks.sent_R[rank] for rank in away)
        found = turns({n: lambda m=m: m(x_TD, routing) for n, m in modules.items()}, ranks, rounds, 3)  # type: ignore[misc]
    assert torch.equal(*outputs.values())
    return {"seconds": found, "bytes to the other host": sent}


def forecast(ranks: Ranks, rounds: int) -> dict[str, float]:
    """A forward pass of 512 tokens on each rank, and what a message and a byte cost between two of them."""
    torch.manual_seed(0)
    model = Decoder(DEEP).eval()
    if ranks.size > 1:
        spread(model, ranks)
    tokens_BS = torch.randint(DEEP.vocab, (1, DEEP.context))
    with torch.no_grad():
        found = turns({"pass": lambda: model(tokens_BS)}, ranks, rounds, 3)
    if ranks.size > 1:
        for name, size in (("small", 1), ("large", 1 << 20)):
            rows = torch.zeros(ranks.size * size, 1, dtype=torch.uint8)
            counts = [size] * ranks.size
            found[name] = statistics.median(seconds(lambda: ranks.exchange(rows, counts, counts)(), ranks, 15))  # noqa: B023
        found["nothing"] = statistics.median(seconds(lambda: None, ranks, 15))
    return found


PARTS: dict[str, Callable[[Ranks, int], Any]] = {"step": step, "levels": levels, "forecast": forecast}


def worker(part: str, rank: int, hosts: list[int], address: str, rounds: int, queue: Any) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(hosts)))
    if len(hosts) == 1:
        queue.put(PARTS[part](ALONE, rounds))
        return
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(hosts))
    found = PARTS[part](Ranks(rank, tuple(hosts), False, dist.new_group()), rounds)
    if not rank:
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()


def run(part: str, ranks: int, rounds: int) -> Any:
    """On ranks of this computer."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    started = [
        context.Process(target=worker, args=(part, rank, [0] * ranks, address, rounds, queue)) for rank in range(ranks)
    ]
    for process in started:
        process.start()
    found = queue.get()
    for process in started:
        process.join()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Two hosts.


@contextmanager
def two_hosts(rate: str, delay: str) -> Iterator[tuple[list[str], bool]]:
    """Names of two network namespaces, 10.99.0.1 and 10.99.0.2, with a link that is so quick each way; and whether this
    kernel can delay it (netem)."""
    names = [f"handful-{os.getpid()}-{i}" for i in range(2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "wire0", "netns", names[0], "type", "veth", "peer", "name", "wire1", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.99.0.{i + 1}/24", "dev", f"wire{i}")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", f"wire{i}", "up")
            limit = ["tc", "-n", name, "qdisc", "add", "dev", f"wire{i}"]
            later = [*limit, "root", "handle", "1:", "netem", "delay", delay, "limit", "100000"]
            delayed = subprocess.run(later, capture_output=True).returncode == 0
            under = ["parent", "1:", "handle", "2:"] if delayed else ["root"]
            subprocess.run([*limit, *under, "tbf", "rate", rate, "burst", "256kb", "latency", "2s"], check=True)
        yield names, delayed
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def across(rate: str, delay: str, rounds: int) -> Any:
    hosts = [0, 0, 1, 1]
    with two_hosts(rate, delay) as (names, delayed):
        started = [
            subprocess.Popen(
                ["ip", "netns", "exec", names[host], sys.executable, __file__, "levels", "--rank", str(rank),
                 "--rounds", str(rounds)],
                env={**os.environ, "GLOO_SOCKET_IFNAME": f"wire{host}"}, stdout=subprocess.PIPE, text=True,
            )
            for rank, host in enumerate(hosts)
        ]  # fmt: skip
        said = [process.communicate()[0] for process in started]
    return {**json.loads(said[0]), "delayed": delayed}


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:  # in a namespace
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method="tcp://10.99.0.1:29400", rank=given.rank, world_size=4)
        found = levels(Ranks(given.rank, (0, 0, 1, 1), False, dist.new_group()), given.rounds)
        print(json.dumps(found) if not given.rank else "")
        dist.barrier()
        return
    table: dict[str, Any] = {}
    if given.part == "step":
        table = {f"{ranks} ranks": run("step", ranks, given.rounds) for ranks in (1, 2, 4)}
    elif given.part == "levels":
        for rate, delay in (("1gbit", "0.1ms"), ("200mbit", "1ms"), ("50mbit", "5ms")):
            table[f"{rate}, {delay} each way"] = across(rate, delay, given.rounds)
    else:
        device = ceilings(Path.cwd())
        for ranks in (1, 2, 4):
            found = run("forecast", ranks, given.rounds)
            table[f"{ranks} ranks"] = row = {"measured": found["pass"]}
            if ranks == 1:
                continue
            latency = max(found["small"] - found["nothing"], 1e-6)
            link = Link((1 << 20) * (ranks - 1) / max(found["large"] - found["small"], 1e-6), latency)
            topology = Topology.even(ranks, slots=DEEP.router.experts // ranks, link=link)  # type: ignore[union-attr]
            foreseen = deploy(
                counted(DEEP), Device.here(device, "float32", ranks), topology, dtype="float32", when="prefill",
                tokens=DEEP.context, context=DEEP.context,
            )  # fmt: skip
            row |= {
                "foreseen": foreseen.seconds,
                "exchange": foreseen.exchange,
                "link": [link.bytes_per_second, link.latency],
            }
    print(json.dumps(table, indent=2))
    whole = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**whole, given.part: table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
