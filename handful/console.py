"""What people read in the terminal: tables, and numbers in sentences. `progress.py` has what moves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from handful.cost import Cost
from handful.finding import describe_balance, late_routing, mixtures_of, team_balance, team_experts
from handful.presets import Preset
from handful.units import duration, short_time, si, size

if TYPE_CHECKING:  # both need torch, which takes seconds, and most tables do not
    from handful.cache_replay import Replay
    from handful.ceilings import Ceilings
    from handful.deployment import Deployed
    from handful.experts.selection import Timed
    from handful.placement import Placed, PlacedModel
    from handful.plan import Plan
    from handful.upcycle import Report
    from handful.verify import Verification

__all__ = [
    "backend_table",
    "comparison_table",
    "cost_sentence",
    "cost_tables",
    "deployment_table",
    "facts",
    "inspection_table",
    "memory_line",
    "move_lines",
    "placement_table",
    "plan_line",
    "plan_tables",
    "presets_table",
    "scores_table",
    "traffic_table",
    "upcycle_table",
    "verification_table",
]


MANY_FILES = 30  # rows of a table of files, at most


def facts(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """A two-column table of names and values."""
    # A table that is narrower than its title would break the title.
    least = max(map(len, title.splitlines() or [""]))
    table = Table(
        title=Text(title), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0), min_width=least
    )
    for name, value in rows:
        table.add_row(Text(name, style="dim"), Text(value))
    return table


def backend_table(timed: Sequence[Timed]) -> Table:
    """How quick each experts backend is, a row per use and dtype; the one that "auto" picks is bold."""
    table = Table(
        title=Text('\nA layer\'s experts, milliseconds; bold: what "auto" picks'), title_justify="left", box=None
    )
    backends = list(timed[0].milliseconds)
    for name in ("use", "shape", "dtype"):
        table.add_column(name)
    for backend in backends:
        table.add_column(backend, justify="right")
    for row in timed:
        times = [Text(f"{row.milliseconds[b]:.3g}", style="bold" if b == row.picked else "") for b in backends]
        table.add_row(row.use, row.shape, row.dtype, *times)
    return table


def verification_table(found: Verification) -> Table:
    """The worst errors, a row per backend, level and format."""

    def error(value: float | None, of: str | None = None) -> str:
        return "" if value is None else f"{value:.1e} {of or ''}".rstrip()

    title = f"Worst errors against the plain loop in float64, seed {found.seed}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("backend", "level", "format", "cases", "output", "bound", "worst gradient", "bound", ""):
        table.add_column(name, justify="right" if name == "cases" else "left", no_wrap=True)
    for row in found.rows:
        table.add_row(
            *(row.backend, row.level, row.format, str(row.cases + row.checks)),
            *(error(row.output_error), error(row.output_bound)),
            *(error(row.gradient_error, row.gradient_of), error(row.gradient_bound)),
            Text("ok", "green") if row.ok else Text("no", "red"),
        )
    return table


def upcycle_table(name: str, found: Report) -> Table:
    """A dense model beside the mixture that was made from it."""
    table = Table(title=Text(f"{name}: {found.written_as}"), title_justify="left")
    for heading in ("", "dense", "mixture"):
        table.add_column(heading, justify="right" if heading else "left")
    sides = (found.before, found.after)
    table.add_row("total parameters", *(si(side.total_parameters) for side in sides))
    table.add_row("active parameters", *(si(side.active_parameters) for side in sides))
    for words, attribute in (("held-out loss, nats a token", "loss"), ("held-out bits a byte", "bits_per_byte")):
        values = [getattr(side, attribute) for side in sides]
        if None not in values:
            table.add_row(words, *(f"{value:.4f}" for value in values))
    return table


def inspection_table(side: Mapping[str, Any]) -> Table:
    """What a model's experts do on a text, a row per layer; beside a value, what chance gives."""
    title = f"{side['model']} on {side['text']}, {side['tokens']:,} tokens; / is what chance gives"
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    tested = [kind["kind"] for kind in side["kinds"] if not kind["why_not"]]
    heads = ["MaxVio", "same first", "dead", *tested, *(["cost"] if side["ablation"] else [])]
    table.add_column("layer")
    for heading in heads:
        table.add_column(Text(heading), justify="right")
    for layer in side["layers"]:
        experts, repeats = layer["experts"], layer["repeats"]
        cells = [
            f"{layer['max_vio']['value']:.2f} / {layer['max_vio']['chance']:.2f}",
            f"{repeats['rate']:.1%} / {repeats['within_documents']:.1%}",
            f"{layer['dead']['value']}",
        ]
        for kind in tested:
            found = [expert[kind] for expert in experts if expert[kind] is not None]
            cells.append(f"{sum(one['follows'] for one in found)} of {len(found)}")
        if side["ablation"]:
            costs = [expert["ablation"] for expert in experts if expert["ablation"]["cost"] is not None]
            cells.append(f"{sum(one['beyond'] and one['cost'] > 0 for one in costs)} of {len(costs)}")
        table.add_row(str(layer["layer"]), *cells)
    return table


def placement_table(layers: Sequence[Placed]) -> Table:
    """What the busiest device has, beside the mean, by ways to place a layer's experts; a row per layer."""
    table = Table(title=Text("the busiest device beside the mean; 1 is even"), title_justify="left", box=None)
    heads = ["layer", "as they come", "published", "ours", "ours, split", "bound", "copies"]
    for heading in [*heads, *(["moved"] if layers[0].moved is not None else [])]:
        table.add_column(heading, justify="right")
    for number, layer in enumerate(layers):
        ratios = (layer.as_they_come, layer.published, layer.equal, layer.split, layer.bound)
        copies = sum(map(len, layer.experts)) - len({expert for own in layer.experts for expert in own})
        cells = ["" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
        moved = [] if layer.moved is None else [f"{layer.moved}"]
        table.add_row(str(number), *cells, str(copies), *moved)
    return table


def traffic_table(layers: Sequence[Placed], sizes: tuple[int, int, int] | None) -> Table:
    """What a recorded token sends in the mean, a row per layer: experts as they come, placed by load alone, as placed.

    sizes   a token's numbers, the bytes of one, experts per token: for the bytes; None: not known.
    """
    title = Text("sent by a token to others: experts as they come / by load alone / as placed")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ["layer", "devices", "nodes", *([] if sizes is None else ["bytes"])]:
        table.add_column(heading, justify="right")
    for number, layer in enumerate(layers):
        if layer.crossings is None:
            continue
        cells = [[f"{one.devices:.2f}" for one in layer.crossings], [f"{one.nodes:.2f}" for one in layer.crossings]]
        if sizes is not None:
            cells.append([size(one.bytes(*sizes)[0]) for one in layer.crossings])
        table.add_row(str(number), *(" / ".join(each) for each in cells))
    return table


def move_lines(made: PlacedModel) -> list[str]:
    """What coming from another placement costs, and whether it pays; nothing if there was none."""
    found = made.moves
    if found is None:
        return []
    moved = f"{found.experts:,} experts move"
    if found.bytes_DD is not None:
        moved += f", {size(float(found.bytes_DD.sum()))}, of which {size(found.node_bytes or 0)} between nodes"
    if found.seconds is not None:
        moved += f", in {short_time(found.seconds)}"
    lines = [moved]
    if found.unheld:
        lines.append(f"{found.unheld:,} of them no living device has: they come from the checkpoint")
    kept = sum(layer.stays for layer in made.layers)
    if kept:
        lines.append(f"{kept} of {len(made.layers)} layers stay as they were: no placement found is less busy")
    if made.pays is not None and made.pays.steps is None:
        lines.append("moving never pays: a step would be no shorter")
    elif made.pays is not None:
        lines.append(f"a step is {short_time(made.pays.saved)} shorter: it has paid after {made.pays.steps:,} steps")
    return lines


def comparison_table(document: Mapping[str, Any]) -> Table:
    """The comparison's table: a column per team."""
    teams = document["teams"]
    table = Table(title=Text(document["title"]), title_justify="left")
    table.add_column("")
    for team in teams:
        table.add_column(Text(team["label"].replace(" · ", "\n")), justify="right", no_wrap=True)

    def spread(value: Mapping[str, Any], digits: int) -> str:
        if len(value["values"]) < 2:
            return f"{value['mean']:.{digits}f}"
        return f"{value['mean']:.{digits}f}\nspread {value['spread']:.{digits}f}"

    def reached(team: Mapping[str, Any], axis: str, shown: Any) -> str:
        if not team["reached"]:
            return "not reached"
        return f"{'≤ ' if team['reached'].get('at_most') else ''}{shown(team['reached'][axis])}"

    def speed(rate: float | None, span: Sequence[float] | None) -> str:
        if rate is None:
            return "not measured"
        return f"{rate:,.0f}" + (f"\n{span[0]:,.0f}–{span[1]:,.0f}" if span else "")

    rows: list[tuple[str, Any]] = []
    several = len(mixtures_of(document)) > 1
    if several:
        rows += [
            ("experts", lambda t: team_experts(t) or ""),
            ("balance", lambda t: (team_balance(t) or "").replace(", ", "\n")),
            ("", None),
        ]
    rows += [
        ("total parameters", lambda t: si(t["parameters"]["total"])),
        ("active parameters", lambda t: si(t["parameters"]["active"])),
        ("training FLOPs a token", lambda t: si(t["train_flops_per_token"])),
        ("weight memory", lambda t: size(t["weight_bytes"])),
        ("", None),
        ("held-out loss, nats a token", lambda t: spread(t["heldout_loss"], 4)),
        ("held-out bits a byte", lambda t: spread(t["bits_per_byte"], 4)),
        ("", None),
        ("training tokens/s", lambda t: speed(t["train_tokens_per_second"], t["train_range"])),
        ("decode tokens/s", lambda t: speed(t["decode_tokens_per_second"], t["decode_range"])),
        ("training time", lambda t: duration(t["train_seconds"])),
    ]
    if several:

        def late(name: str) -> Any:
            return lambda t: "" if late_routing(t, name) is None else f"{late_routing(t, name):.2f}"

        rows += [("", None), ("MaxVio at the end", late("max_vio")), ("dead experts at the end", late("dead"))]
    if any(team["name"] == "dense-active" for team in teams):
        rows += [
            ("", None),
            ("the small dense loss after: tokens", lambda t: reached(t, "tokens", si)),
            ("FLOPs", lambda t: reached(t, "flops", si)),
            ("training time", lambda t: reached(t, "seconds", duration)),
        ]
    for name, shown in rows:
        if shown is None:
            table.add_section()
        else:
            table.add_row(name, *(shown(team) for team in teams))
    return table


def cost_sentence(price: Cost) -> str:
    """What people want to hear first: "computes like a 12.9 B dense model, holds like a 46.7 B one"."""

    def billions(parameters: int) -> str:
        return f"{parameters / 1e9:.3g} B" if parameters >= 9.995e8 else si(parameters, short=True)

    if price.active == price.total:
        return f"a dense model of {billions(price.total)} parameters: every token uses all of them"
    active, total = (f"{_article(words)} {words}" for words in (billions(price.active), billions(price.total)))
    return f"computes like {active} dense model, holds like {total} one"


def _article(number: str) -> str:
    """ "an" before eight, eleven and eighteen."""
    whole = number.split()[0].partition(".")[0]
    return "an" if whole[0] == "8" or whole in ("11", "18") else "a"


def scores_table(models: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    """What models make of files: nats a token and bits a byte, and of two how far they are apart."""
    letters = "AB"[: len(models)] if len(models) > 1 else [""]
    title = "\n".join(f"{letter}  {model}".strip() for letter, model in zip(letters, models, strict=True))
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for letter in letters:
        for what in ("nats\na token", "bits\na byte"):
            table.add_column(f"{letter}\n{what}".strip(), justify="right")
    if len(models) > 1:
        table.add_column("B − A,\nbits\na byte", justify="right")
    shown = list(rows)
    if len(shown) > MANY_FILES:  # the largest of them, in their order, and the last row, which is all of them
        largest = sorted(shown[:-1], key=lambda row: -int(row["bytes"]))[: MANY_FILES - 1]
        shown = [row for row in shown[:-1] if row in largest] + shown[-1:]
    for row in shown:
        cells = [f"{row['bytes']:,}"]
        for found in row["models"]:
            cells += [f"{found['loss']:.4f}", f"{found['bits_per_byte']:.4f}"]
        if row["difference"] is not None:
            error = row["difference"]["error"]
            spread = "" if error is None else f" ± {error:.4f}"
            cells.append(f"{row['difference']['bits_per_byte']:+.4f}{spread}")
        table.add_row(Text(row["file"]), *cells)
    if len(shown) < len(rows):
        table.caption = f"the largest of {len(rows) - 1:,} files; --json tells all"
    return table


def presets_table(presets: Mapping[str, Preset], prices: Mapping[str, Cost | None]) -> Table:
    """The presets: who they are, how they choose, what keeps their experts busy."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("name", "experts", "balance", "parameters", "from"):
        table.add_column(heading)
    for name, preset in presets.items():
        router, price = preset.router, prices[name]
        size_of = "" if price is None else f"{si(price.total)}, {si(price.active)} active"
        balance = describe_balance(vars(preset.balance))
        table.add_row(name, f"{router.experts}, {router.top_k} a token", balance, size_of, Text(preset.source))
    return table


def cost_tables(name: str, price: Cost) -> list[Table]:
    """What a model costs, as tables."""
    total, active = price.total_parameters, price.active_parameters
    counts = Table(title=Text(f"{name}: parameters"), title_justify="left")
    counts.add_column("")
    counts.add_column("total", justify="right")
    counts.add_column("active", justify="right")
    for field, words in (
        ("incl_all_embeddings", "with all embeddings"),
        ("excl_input_embedding", "without the input embedding"),
        ("excl_embeddings", "without any embeddings"),
    ):
        counts.add_row(words, f"{getattr(total, field):,}", f"{getattr(active, field):,}")
    counts.add_section()
    for part, held in vars(total.parts).items():
        if held:
            counts.add_row(part.replace("_", " "), f"{held:,}", f"{getattr(active.parts, part):,}")
    work = facts(
        f"per token, at a context of {price.context:,}",
        [
            ("prefill", si(price.flops.prefill, "FLOP")),
            ("decode", si(price.flops.decode, "FLOP")),
            ("training", si(price.flops.training, "FLOP")),
        ],
    )
    stored = price.bytes.published
    published = [] if stored is None else [(f"checkpoint, {price.published}", size(stored))]
    state = [("state of a sequence of any length", size(price.bytes.state))] if price.bytes.state else []
    held = facts(
        "memory",
        [
            (f"weights, {price.dtype}", size(price.bytes.weights)),
            *published,
            ("KV cache per token", size(price.bytes.cache_per_token)),
            (f"KV cache of {price.context:,} tokens", size(price.bytes.cache)),
            *state,
            ("training with AdamW, float32", size(price.bytes.training)),
        ],
    )
    tables = [counts, work, held]
    if price.ranks > 1 and price.communication.moe_layers:
        traffic = price.communication
        crossing = []
        if traffic.between_hosts.layer:
            both = f"{size(traffic.between_hosts.forward)}, {size(traffic.between_hosts.training)}"
            crossing.append(("of that between hosts, forward and training", both))
        tables.append(
            facts(
                f"sent between {price.ranks} ranks per token",
                [
                    ("to every expert's rank, forward", size(traffic.per_assignment.forward)),
                    ("once to every rank, forward", size(traffic.per_rank.forward)),
                    ("as Handful's ranks do it, forward", size(traffic.exchange.forward)),
                    ("to every expert's rank, training", size(traffic.per_assignment.training)),
                    ("once to every rank, training", size(traffic.per_rank.training)),
                    ("as Handful's ranks do it, training", size(traffic.exchange.training)),
                    *crossing,
                    ("ranks that a token's experts stand on", f"{traffic.ranks_per_token:.2f}"),
                ],
            )
        )
    return tables


def plan_tables(name: str, machine: Ceilings, plans: Sequence[Plan], replays: Sequence[Replay | None]) -> list[Table]:
    """What a model would be on a computer, as tables: one of the computer, one with a column for each format."""
    disk, hours = machine.disk_bytes_per_second, (time.time() - machine.measured_at) / 3600
    age = f"{hours / 24:.0f} days ago" if hours >= 48 else f"{hours:.0f} hours ago" if hours >= 2 else "just now"
    rates = [
        ("memory", f"{size(machine.memory_bytes)} free, read at {size(machine.read_bytes_per_second)}/s"),
        ("products", f"{si(machine.bfloat16_flops, 'FLOP/s')} in bfloat16, {si(machine.float32_flops)} in float32"),
        ("disk", f"{size(machine.disk_free_bytes)} free, " + (f"read at {size(disk)}/s" if disk else "not measured")),
        ("GPU", ", ".join(f"{gpu}, {size(held)}" for gpu, held in machine.gpus) or "none"),
        ("measured", f"{age}; --measure does it again"),
    ]
    first = plans[0]
    sequences = f"{first.batch} × {first.context:,}" if first.batch > 1 else f"{first.context:,}"
    rows: list[tuple[str, Any]] = [
        ("to download", lambda p: size(p.download) if p.download else "it is there"),
        ("all weights, held", lambda p: size(p.weights)),
        (f"KV cache, {sequences} tokens", lambda p: size(p.cache)),
        ("to work with", lambda p: size(p.working)),
    ]
    if first.experts:
        rows += [("one expert", lambda p: size(p.expert)), ("least --memory", lambda p: size(p.least))]
    if any(p.memory is not None for p in plans):
        rows += [
            ("--memory", lambda p: "not needed" if p.memory is None else size(p.memory)),
            ("experts in memory", lambda p: f"{100 * p.held_share:.0f} %"),
            ("pack on disk", lambda p: size(p.pack)),
        ]
    if machine.gpus:
        rows.append(("fits the GPU", lambda p: "yes" if p.fits_gpu else "no"))
    table = Table(title=Text(name), title_justify="left")
    table.add_column("")
    for plan in plans:
        table.add_column(plan.dtype, justify="right")
    for words, show in rows:
        table.add_row(words, *(show(plan) for plan in plans))
    table.add_section()
    runs = [plan.verdict in ("fits", "fits with memory") for plan in plans]
    if any(runs) and not first.unforecast:

        def add(words: str, values: Sequence[str]) -> None:
            table.add_row(words, *(value if good else "–" for value, good in zip(values, runs, strict=True)))

        add("prefill tokens/s", [_rate(plan.prefill_tokens_per_second()) for plan in plans])
        add("decode tokens/s", [_rate(plan.decode_tokens_per_second()) for plan in plans])
        if any(plan.hit_rate < 1 for plan in plans):
            add("  with hits, chosen evenly", [f"{100 * plan.hit_rate:.0f} %" for plan in plans])
        if any(replays):
            traced = [(plan, found.hit_rate if found else 1.0) for plan, found in zip(plans, replays, strict=True)]
            add("decode tokens/s, as traced", [_rate(plan.decode_tokens_per_second(hits)) for plan, hits in traced])
            add("  hits", [f"{100 * r.hit_rate:.0f} %" if r else "100 %" for r in replays])
            add("  hits at best", [f"{100 * r.best:.0f} %" if r else "100 %" for r in replays])
    return [facts("This machine", rates), table]


def deployment_table(name: str, steps: Mapping[str, Deployed]) -> Table:
    """A step on many devices, part by part; a column for each kind."""
    first = next(iter(steps.values()))
    table = Table(title=Text(f"{name} on {first.ranks:,} devices, {size(first.held)} of weights on each"))
    table.title_justify = "left"
    table.add_column("")
    for when in steps:
        table.add_column(when, justify="right")
    parts = ("matrices", "attention", "experts", "waiting", "exchange", "overhead", "seconds")
    words = {"waiting": "waiting for the busiest", "seconds": "a step", "matrices": "other matrices"}
    for part in parts:
        table.add_row(words.get(part, part), *(short_time(getattr(one, part)) for one in steps.values()))
    table.add_section()
    rows: dict[str, Callable[[Deployed], str]] = {
        "tokens in a step": lambda one: f"{one.tokens:,}",
        "busiest device beside the mean": lambda one: f"{one.busiest:.2f}",
        "sent by a token": lambda one: size(one.sent),
        "  between nodes": lambda one: size(one.crossing),
        "tokens/s": lambda one: _rate(one.rate),
        "  a device": lambda one: _rate(one.rate / one.ranks),
        "  if exchanges were hidden": lambda one: _rate(one.tokens / one.overlapped),
    }
    for title, told in rows.items():
        table.add_row(title, *map(told, steps.values()))
    return table


def _rate(tokens_per_second: float | None) -> str:
    if tokens_per_second is None:
        return "not known"
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.3g}"


def plan_line(plan: Plan) -> str:
    """Whether a format fits, in one line."""
    if plan.verdict != "fits with memory":
        return f"{plan.dtype}: {plan.verdict}: {plan.reason}"
    assert plan.memory is not None
    # As it is typed, and exact: in GB or MB if three digits behind the point will do.
    unit, name = (10**9, "GB") if plan.memory >= 10**9 and plan.memory % 10**6 == 0 else (10**6, "MB")
    exact = plan.memory % (unit // 1000) == 0
    budget = f"{plan.memory / unit:.3f}".rstrip("0").rstrip(".") + name if exact else str(plan.memory)
    return f"{plan.dtype}: fits with --memory {budget}: {plan.reason}"


def memory_line(within: Mapping[str, Any]) -> str:
    """What a memory budget did, in a line; with the forecast, if there is one."""
    held = f"{within['slots']:,} of {within['experts']:,} experts in memory"
    forecast = within["forecast_tokens_per_second"]
    told = "" if forecast is None else f"; forecast {forecast:,.0f} tokens/s with these hits"
    waited = f"{within['wait_seconds']:.1f} s waited"
    return f"{held}, {within['hit_rate']:.0%} of uses found there, {size(within['bytes_read'])} read, {waited}{told}"
