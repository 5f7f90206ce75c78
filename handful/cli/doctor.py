"""`handful doctor`: what this computer can do."""

from __future__ import annotations

from handful import __version__
from handful.cli.shared import Json, print_json

EXAMPLE = "handful doctor --json"


def run(as_json: Json = False) -> None:
    """What this computer can do, and which expert backend it gets."""
    from dataclasses import asdict

    import torch

    from handful.console import backend_table, facts
    from handful.experts.selection import choose, time_backends
    from handful.machine import machine, measure
    from handful.units import si, size
    from handful.width import show

    found, rates = machine(), measure()
    choices = {str(dtype)[6:]: choose("cpu", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    timed = time_backends()
    if as_json:
        print_json(
            {
                "handful": __version__,
                "machine": vars(found),
                "measured": vars(rates),
                "experts": {dtype: asdict(choice) for dtype, choice in choices.items()},
                "timed": [asdict(row) for row in timed],
            }
        )
        return
    rows = [
        ("handful", __version__),
        ("torch", found.torch),
        ("processor", f"{found.cpu}, {found.cores} cores, {found.threads} threads"),
        ("vector instructions", " ".join(found.isa) or "none known"),
        ("memory", f"{size(found.memory_bytes)}, {size(found.memory_available_bytes)} available"),
        ("GPU", ", ".join(found.gpus) or "none"),
        ("native extension", found.native_error or "loaded"),
        ("memory read", f"{size(rates.read_bytes_per_second)}/s"),
        ("products, float32", si(rates.float32_flops, "FLOP/s")),
        ("products, bfloat16", si(rates.bfloat16_flops, "FLOP/s")),
        *((f"experts, {dtype}", f"{choice.backend}: {choice.reason}") for dtype, choice in choices.items()),
    ]
    show(facts("This machine", rows), backend_table(timed))
