"""`handful place`: which expert on which device, from a recorded load."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handful.cli.shared import Json, config_of, open_screen, print_json
from handful.errors import ConfigError

if TYPE_CHECKING:
    from handful.placement import PlacedModel, Topology

EXAMPLE = "handful place runs/inspect/inspect.json --devices 8 --slots 10 --out placement.json"


def run(
    load: Annotated[
        Path,
        typer.Argument(
            help="inspect.json of handful inspect, a routing of generate --routing, or JSON: a list for each layer, "
            "of every expert's load."
        ),
    ],
    devices: Annotated[int | None, typer.Option(min=1, help="How many there are.")] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Experts of a layer that a device has room for, copies too.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Instead of slots: what a device has for experts, such as 60GB; with --model.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Hosts that the devices are dealt to in order.")] = 1,
    link: Annotated[
        str | None, typer.Option(help="Of a device within its node: bytes a second, latency: 450GB/s,2us.")
    ] = None,
    node_link: Annotated[str | None, typer.Option(help="Of a device to other nodes: 50GB/s,10us.")] = None,
    topology: Annotated[
        Path | None, typer.Option(help="All of these from a TOML or JSON file, for nodes that are not alike.")
    ] = None,
    dead: Annotated[list[int] | None, typer.Option(help="A device that is gone; may be given several times.")] = None,
    dead_node: Annotated[list[int] | None, typer.Option(help="A node that is gone; also several times.")] = None,
    near: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Put experts that tokens use together near each other, as a routing has them, the busiest device at "
            "most this share busier: 0.02.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A preset, config.json, folder or org/name: for bytes of experts and tokens.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the experts' weights and of what is sent.")] = "bfloat16",
    before: Annotated[Path | None, typer.Option(help="A placement that this command wrote: few experts move.")] = None,
    step_time: Annotated[
        float | None,
        typer.Option(help="Seconds that a step's experts take as they were before: says when moving has paid."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the placement is written, as JSON.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Place experts on devices by their load, with copies of the busy ones, so that the busiest device has least."""
    from dataclasses import asdict

    from handful.checkpoint import write_file
    from handful.console import move_lines, placement_table, traffic_table
    from handful.placement import place_layers, read_load, read_placements, read_tokens
    from handful.width import show

    screen = open_screen()
    loads, tokens = read_load(load), read_tokens(load)
    sizes = None if model is None else _Sizes.of(model, dtype, len(loads), len(loads[0]))
    room = {"devices": devices, "slots": slots, "memory": memory, "link": link, "node_link": node_link}
    cluster = _cluster(topology, nodes, room).without(dead or (), dead_node or ())
    if near is not None and tokens is None:
        raise ConfigError(f"near = {near}: a routing of generate --routing says which experts tokens use together")
    if step_time is not None and not 0 < step_time < float("inf"):
        raise ConfigError(f"step-time = {step_time}: seconds, above 0")
    made = place_layers(
        loads,
        cluster,
        None if before is None else read_placements(before),
        tokens,
        worse=near,
        expert_bytes=None if sizes is None else sizes.expert,
        step_seconds=step_time,
    )
    document: dict[str, Any] = {
        "devices": cluster.devices,
        "nodes": list(cluster.nodes),
        "slots": cluster.room(None if sizes is None else sizes.expert * len(loads)),
        "layers": [asdict(one) for one in made.layers],
        "moves": _moves(made, cluster),
    }
    if out is not None:
        write_file(out, json.dumps(document, indent=2) + "\n")
    if as_json:
        print_json(document)
        return
    show(placement_table(made.layers))
    if tokens is not None:
        show(traffic_table(made.layers, None if sizes is None else (sizes.width, sizes.itemsize, tokens[0].shape[1])))
    for line in move_lines(made):
        print(line)
    if out is not None:
        screen.print(f"{out} has every device's experts and their shares")


@dataclass(frozen=True)
class _Sizes:
    """Bytes of an expert of a layer; a token's numbers that are sent, and the bytes of one."""

    expert: int
    width: int
    itemsize: int

    @staticmethod
    def of(model: str, dtype: str, layers: int, experts: int) -> _Sizes:
        from handful.cost import BYTES, expert_bytes
        from handful.count import counted

        found = counted(config_of(model)[0])
        if dtype not in BYTES:
            raise ConfigError(f"dtype = {dtype!r}: one of {', '.join(BYTES)}")
        has = 0 if found.router is None else found.router.experts
        if (found.moe_layers, has) != (layers, experts):
            raise ConfigError(
                f"model = {model!r}: {found.moe_layers} layers of {has} experts; the load has {layers} of {experts}"
            )
        return _Sizes(expert_bytes(found, dtype), found.sent, BYTES[dtype])


def _cluster(file: Path | None, nodes: int, given: dict[str, Any]) -> Topology:
    """The devices, from options or from a file."""
    from handful.placement import Topology, parse_link, read_topology
    from handful.units import parse_bytes

    if file is not None:
        twice = [name for name, value in given.items() if value is not None] + (["nodes"] if nodes > 1 else [])
        if twice:
            raise ConfigError(f"{twice[0].replace('_', '-')}: the file of --topology says that")
        return read_topology(file)
    if given["devices"] is None:
        raise ConfigError("devices: how many there are, or --topology")
    return Topology.even(
        given["devices"],
        nodes,
        slots=given["slots"],
        memory=None if given["memory"] is None else parse_bytes(given["memory"]),
        link=None if given["link"] is None else parse_link(given["link"]),
        node_link=None if given["node_link"] is None else parse_link(given["node_link"], "node-link"),
    )


def _moves(made: PlacedModel, cluster: Topology) -> dict[str, Any] | None:
    """What moving costs, as plain values: by pairs of devices that send anything."""
    import numpy as np

    found = made.moves
    if found is None:
        return None
    links = [
        {
            "from": source,
            "to": device,
            "experts": int(found.experts_DD[source, device]),
            "between_nodes": cluster.nodes[source] != cluster.nodes[device],
        }
        for source, device in np.argwhere(found.experts_DD).tolist()
    ]
    return {
        "experts": found.experts,
        "unheld": found.unheld,
        "bytes": None if found.bytes_DD is None else float(found.bytes_DD.sum()),
        "node_bytes": found.node_bytes,
        "seconds": found.seconds,
        "saved_per_step": None if made.pays is None else made.pays.saved,
        "steps": None if made.pays is None else made.pays.steps,
        "links": links,
    }
