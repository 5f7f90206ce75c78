"""Which peak learning rate is best for each team of the comparison? The same rates for all, everything else equal.

    python bench/lr_sweep.py [--teams dense-active moe dense-total] [--rates 0.004 …] [--seeds 0]
    python bench/lr_sweep.py --rates                 # nothing new: the table of the log

One line a run is added to bench/logs/lr_sweep.jsonl, and at the end the log's table is printed: held-out loss after
`handful compare`'s default training, and its spread (highest - lowest) where there are several seeds. The best rates
are `LEARNING_RATES` in handful/compare.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from handful.compare import LABELS, teams
from handful.data import load_data
from handful.presets import small_model, small_training
from handful.train import train

LOG = Path(__file__).parent / "logs" / "lr_sweep.jsonl"
RATES = [0.004, 0.008, 0.016, 0.032]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teams", nargs="+", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--rates", nargs="*", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    asked = parser.parse_args()
    data = load_data(None, progress=lambda line: print(line, file=sys.stderr))
    model = small_model(data.tokenizer.vocab_size)
    for rate in asked.rates:
        for team in teams(model, small_training(eval_every=0), dict.fromkeys(LABELS, rate)):
            if team.name not in asked.teams:
                continue
            for seed in asked.seeds:
                settings = replace(team.settings, seed=seed)
                *_, end = train(team.model, settings, data)
                row = {"team": team.name, "lr": rate, "seed": seed, "steps": settings.steps, "loss": end["loss"]}
                print(row, file=sys.stderr, flush=True)
                with LOG.open("a") as log:
                    log.write(json.dumps(row) + "\n")
    show()


def show() -> None:
    rows = [json.loads(line) for line in LOG.read_text().splitlines()]
    rates = sorted({row["lr"] for row in rows})
    print("| held-out loss at peak rate | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
    print("|---" * (len(rates) + 1) + "|")
    for name in LABELS:
        cells = []
        for rate in rates:
            losses = [row["loss"] for row in rows if (row["team"], row["lr"]) == (name, rate)]
            mean = f"{sum(losses) / len(losses):.4f}" if losses else ""
            spread = f" (spread {max(losses) - min(losses):.4f}, {len(losses)} seeds)" if len(losses) > 1 else ""
            cells.append(mean + spread)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
