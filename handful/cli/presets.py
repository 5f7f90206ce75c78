"""`handful presets`: the routers and models that have a name here."""

from __future__ import annotations

from handful.cli.shared import Json, print_json

EXAMPLE = "handful presets --json"


def run(as_json: Json = False) -> None:
    """The published routers that --router takes, and the models that cost and plan know by name."""
    from dataclasses import asdict

    from handful.console import presets_table
    from handful.cost import cost
    from handful.presets import PRESETS
    from handful.width import show

    prices = {name: None if preset.model is None else cost(preset.model) for name, preset in PRESETS.items()}
    if as_json:
        print_json(
            [
                {
                    "name": name,
                    "source": preset.source,
                    "router": asdict(preset.router),
                    "balance": asdict(preset.balance),
                    "total_parameters": None if price is None else price.total,
                    "active_parameters": None if price is None else price.active,
                }
                for (name, preset), price in zip(PRESETS.items(), prices.values(), strict=True)
            ]
        )
        return
    show(presets_table(PRESETS, prices))
