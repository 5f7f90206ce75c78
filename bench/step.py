"""What does a decoding step take beside its operation: Python, torch's dispatch, the drawn token?

    python bench/step.py [--layers 1 4 16] [--rounds 9]

A mixture of 8 experts of width 32, of which 2 are chosen, in layers of width 64, and its dense-active twin, each in an
engine of its own, greedy and without drafts, by turns. Microseconds: of a step, of its operation alone
(`decoder_step`), and what is left.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from timing import publish, rounds

from handful import fused
from handful.compare import twins
from handful.config import ModelConfig, RouterConfig
from handful.engine import Engine
from handful.model import Decoder
from handful.positions import KVCache
from handful.request import Request
from handful.sampling import Sampling

PROMPT, STEPS = 16, 200  # tokens that are read, and that are made in a round
US = 1e3 / STEPS  # microseconds of a step, from the milliseconds of a round


def config(layers: int) -> ModelConfig:
    return ModelConfig(
        vocab=512, width=64, layers=layers, heads=4, expert_width=32, qk_norm="head", context=PROMPT + STEPS + 4,
        router=RouterConfig(experts=8, top_k=2),
    )  # fmt: skip


class Steps:
    """A model's steps, and its operation alone."""

    def __init__(self, model: Decoder) -> None:
        self.engine = Engine(model, max_sequences=1, speculate=False)
        self.whole()
        cache = KVCache(model.config, 1, model.config.context)
        with torch.inference_mode():
            for token in range(3):
                model(torch.tensor([[token]]), cache)
            plan = fused._plans_of(model)[1]
            weights = plan.weights(model)
            assert weights is not None
            self.operands = plan.operands(cache.span(model.config, 1), weights)
        self.token = torch.tensor([[3]])

    def whole(self) -> None:
        """STEPS steps, one of which reads the prompt."""
        request = Request(prompt=list(range(PROMPT)), max_tokens=STEPS, sampling=Sampling(temperature=0))
        job = self.engine.submit(request)
        while job.finish is None:
            self.engine.step()

    @torch.inference_mode()
    def operation(self) -> None:
        for _ in range(STEPS):
            torch.ops.handful.decoder_step.default(self.token, *self.operands)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.manual_seed(0)
    cases: dict[str, Any] = {}
    for layers in given.layers:
        for name, one in (("mixture", config(layers)), ("dense", twins(config(layers))[0])):
            steps = Steps(Decoder(one).eval())
            cases[f"{layers} {name} step"], cases[f"{layers} {name} operation"] = steps.whole, steps.operation
    found = rounds(cases, given.rounds)
    rows = []
    for layers in given.layers:
        for name in ("mixture", "dense"):
            step, operation = (US * found[f"{layers} {name} {part}"]["median"] for part in ("step", "operation"))
            parts = {"step": step, "operation": operation, "rest": step - operation}
            rows.append({"layers": layers, "model": name, **parts})
    publish("step", rows, {"unit": "microseconds"})


if __name__ == "__main__":
    main()
