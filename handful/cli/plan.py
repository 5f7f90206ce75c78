"""`handful plan`: whether a model runs on this computer, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from handful.cli.answers import KvCacheOption
from handful.cli.shared import Json, config_of, open_screen, precision_of, print_json
from handful.errors import ConfigError

if TYPE_CHECKING:
    from handful.deployment import Deployed, Device
    from handful.placement import Link

EXAMPLE = "handful plan qwen3 --quant int4 --memory 8GB"


def run(
    model: Annotated[str, typer.Argument(help="A preset, a config.json, a run or checkpoint folder, or org/name.")],
    memory: Annotated[
        str | None, typer.Option(help="What the weights may take, such as 4GB. Default: what is free.")
    ] = None,
    quant: Annotated[str | None, typer.Option(help="float32, bfloat16, int8 or int4. Default: the last three.")] = None,
    kv_cache_dtype: KvCacheOption = "auto",
    context: Annotated[int | None, typer.Option(min=1, help="Tokens in a sequence. Default: at most 4096.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that decode together.")] = 1,
    trace: Annotated[
        Path | None, typer.Option(help="A routing that generate --routing wrote: its hit rates are used.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Instead: how fast on so many devices, experts and tokens on each.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Hosts that these stand on.")] = 1,
    link: Annotated[str | None, typer.Option(help="Of a device within its node: 450GB/s,2us.")] = None,
    node_link: Annotated[str | None, typer.Option(help="Of a device to other nodes: 50GB/s,10us.")] = None,
    rates: Annotated[
        str | None,
        typer.Option(help="What a device reads and multiplies a second: 3TB/s,800T. Default: as this computer."),
    ] = None,
    load: Annotated[
        str | None,
        typer.Option(help="What routers choose by: zipf:1.0, or a file as of handful place. Default: even."),
    ] = None,
    copies: Annotated[int, typer.Option(min=0, help="Experts of a layer that a device has beside E / ranks.")] = 0,
    placement: Annotated[Path | None, typer.Option(help="Of experts, that handful place wrote.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this computer again.")] = False,
    as_json: Json = False,
) -> None:
    """Whether a model runs on this computer, and how fast, from its config alone: nothing else is downloaded. Or how
    fast it would be on many devices."""
    from dataclasses import asdict

    from handful.cache_replay import check_recording, replay
    from handful.ceilings import ceilings
    from handful.console import deployment_table, plan_line, plan_tables
    from handful.cost import cost as price
    from handful.observe import Recording
    from handful.plan import plan
    from handful.units import parse_bytes
    from handful.width import show

    screen = open_screen()
    if ranks is not None:
        given = {"memory": memory, "trace": trace}
        wrong = next((name for name, value in given.items() if value is not None), None)
        if wrong:
            raise ConfigError(f"{wrong}: not with --ranks, where all experts are in memory")
        if kv_cache_dtype != "auto":
            raise ConfigError(f"kv-cache-dtype = {kv_cache_dtype!r}: not with --ranks, which counts it in the dtype")
        places = _places(ranks, nodes, link, node_link)
        steps = _deployments(
            model, places, rates, load, copies, placement, quant or "bfloat16", context, batch, measure
        )
        if as_json:
            print_json({"model": model, **{when: _plain(one) for when, one in steps.items()}})
        else:
            show(deployment_table(model, steps))
        return
    budget = None if memory is None else parse_bytes(memory)
    config, notes = config_of(model)
    recording = None if trace is None else Recording.read(trace)
    if recording is not None:
        check_recording(recording, config, str(trace))
    folder, there = _checkpoint_place(model)
    published, unknown = precision_of(model)
    notes += unknown
    priced = price(config, context=1, published=published).bytes
    checkpoint = priced.weights if priced.published is None else priced.published
    download = 0 if there else checkpoint
    machine = ceilings(folder, fresh=measure)
    formats = ("bfloat16", "int8", "int4") if quant is None else (quant,)
    plans = [
        plan(
            config,
            machine,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            memory=budget,
            context=context,
            batch=batch,
            download=download,
        )
        for dtype in formats
    ]
    replays = [
        replay(recording, found.slots) if recording is not None and found.slots < found.experts else None
        for found in plans
    ]
    for note in notes:
        screen.print(note, style="dim")
    if as_json:
        documents = []
        for found, played in zip(plans, replays, strict=True):
            rate = None if played is None else found.decode_tokens_per_second(played.hit_rate)
            traced = None if played is None else {**asdict(played), "decode_tokens_per_second": rate}
            documents.append({**found.to_dict(), "trace": traced})
        print_json({"model": model, "note": "; ".join(notes) or None, "machine": asdict(machine), "plans": documents})
        return
    show(*plan_tables(model, machine, plans, replays))
    print()
    for found in plans:
        print(plan_line(found))
    if plans[0].unforecast and not plans[0].lacks:
        screen.print(f"no speed is forecast: {plans[0].unforecast}", style="dim")


def _checkpoint_place(model: str) -> tuple[Path, bool]:
    """The folder that a model's checkpoint and the pack of its experts lie in, or would; and whether it is there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from handful.families.io import find_folder
    from handful.presets import PRESETS

    if model in PRESETS:
        return Path(HF_HUB_CACHE), False
    path = Path(model)
    folder = path.parent if path.is_file() else find_folder(model, only="config.json")
    return folder, any(folder.glob("*.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# On many devices.


def _places(ranks: int, nodes: int, link: str | None, node_link: str | None) -> tuple[int, int, Link, Link | None]:
    from handful.placement import parse_link

    if link is None:
        raise ConfigError("link: what a device sends a second, such as 50GB/s,10us; --ranks needs it")
    return ranks, nodes, parse_link(link), None if node_link is None else parse_link(node_link, "node-link")


def _deployments(
    model: str,
    places: tuple[int, int, Link, Link | None],
    rates: str | None,
    load: str | None,
    copies: int,
    placement: Path | None,
    dtype: str,
    context: int | None,
    batch: int,
    measure: bool,
) -> dict[str, Deployed]:
    """A step of decoding `batch` sequences on each device, and of reading a prompt on each."""
    from handful.count import counted
    from handful.deployment import deploy, zipf
    from handful.placement import Topology, read_load, read_placements, read_tokens
    from handful.plan import CONTEXT

    found = counted(config_of(model)[0])
    ranks, nodes, link, node_link = places
    experts = 0 if found.router is None else found.router.experts
    if not experts:
        raise ConfigError("ranks: a model without experts has nothing to be spread over them")
    # As many as there are, dealt out; a device that has one less has a slot that stays empty.
    slots = -(-experts // ranks) + copies
    topology = Topology.even(ranks, nodes, slots=slots, link=link, node_link=node_link)
    made = None if placement is None else read_placements(placement, "placement")
    loads, tokens = None, None
    if load is not None and load.startswith("zipf:"):
        loads = zipf(experts, _number(load.removeprefix("zipf:"), load), layers=1 if made is None else len(made))
    elif load is not None:
        loads, tokens = read_load(load), read_tokens(load)
    context = min(found.context or CONTEXT, CONTEXT) if context is None else context
    device = _device(rates, dtype, measure)

    def simulated(when: Literal["decode", "prefill"], each: int) -> Deployed:
        return deploy(
            found,
            device,
            topology,
            dtype=dtype,
            when=when,
            tokens=each,
            context=context,
            loads=loads,
            recorded=tokens,
            placements=made,
        )

    return {"decode": simulated("decode", batch), "prefill": simulated("prefill", context)}


def _device(rates: str | None, dtype: str, measure: bool) -> Device:
    from huggingface_hub.constants import HF_HUB_CACHE

    from handful.ceilings import ceilings
    from handful.deployment import Device
    from handful.placement import parse_link
    from handful.units import parse_bytes

    if rates is None:
        return Device.here(ceilings(Path(HF_HUB_CACHE), fresh=measure), dtype)
    read, _, product = rates.partition(",")
    return Device.alike(parse_link(read, "rates").bytes_per_second, parse_bytes(product, "rates"))


def _number(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 10:
        raise ConfigError(f"load = {whole!r}: zipf: and an exponent from 0 to 10")
    return value


def _plain(found: Deployed) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(found), "seconds": found.seconds, "overlapped": found.overlapped, "tokens_per_second": found.rate}
