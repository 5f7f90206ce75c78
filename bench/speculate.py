"""Do drafts pay, and do they stop where they do not? Decoding with them and without, by turns.

    python bench/speculate.py [--models DIR] [--only olmoe-4l] [--formats bfloat16 int8 int4] [--sequences 1 4]
                              [--rounds 5]

The models are those of bench/decode.py, of random weights, which are written to DIR where they are not there yet. What
attention finds is multiplied by 0, at full price: so a token depends on the one before it alone, and the argmax goes
round in a circle of some tens of tokens. Each sequence gets 192 tokens after a prompt of 512.

repeats       the argmax, after a prompt that the model made so: a circle
partly        drawn, prompt and answer, at a temperature at which a token leaves the circle now and then
does not      a prompt of noise, drawn at temperature 1, of which random weights make noise

Tokens a second are medians of the rounds, of decoding alone; "×" is the median of the rounds' own quotients, "worst"
the smallest of them; "draft" is how many drafted tokens a step passed, "accepted" how many of them were made. The text
of one sequence must be the same with and without.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from decode import SHAPES, VOCAB, load_handful, make
from timing import publish

from handful.engine import Engine, Request
from handful.experts.quantized import QuantizedLinear
from handful.model import Decoder
from handful.sampling import Sampling

PROMPT, MADE = 512, 192
PARTLY = 0.02  # temperature


def run(model: Decoder, requests: Sequence[Request], speculate: bool) -> tuple[list[list[int]], dict[str, float]]:
    """Decoding of some requests: what is made, tokens a second, and what became of drafts."""
    engine = Engine(model, max_sequences=len(requests), chunk=1 << 16, speculate=speculate)
    jobs = [engine.submit(request) for request in requests]
    engine.step()
    began, steps = time.perf_counter(), 0
    while engine.busy:
        engine.step()
        steps += 1
    seconds = time.perf_counter() - began
    stats = engine.stats()
    assert all(len(job.made) == MADE for job in jobs)
    return [job.made for job in jobs], {
        "rate": (stats.made_tokens - len(jobs)) / seconds,
        "draft": stats.draft_tokens / steps,
        "accepted": stats.accepted_tokens / max(1, stats.draft_tokens),
    }


def compare(model: Decoder, requests: Sequence[Request], rounds: int) -> dict[str, Any]:
    """With drafts and without, by turns; the first round does not count."""
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    texts = []
    for turn in range(rounds + 1):
        for speculate in (turn % 2 == 0, turn % 2 == 1):
            made, told = run(model, requests, speculate)
            texts.append(made)
            if turn:
                found[speculate].append(told)
    if len(requests) == 1:  # beside others, a token's bits are those of the pass that it is in
        assert all(made == texts[0] for made in texts), "drafts changed the text"
    drafted, plain = found[True], found[False]
    quotients = [one["rate"] / other["rate"] for one, other in zip(drafted, plain, strict=True)]
    return {
        "without": statistics.median(one["rate"] for one in plain),
        "with": statistics.median(one["rate"] for one in drafted),
        "×": statistics.median(quotients),
        "worst": min(quotients),
        "draft": statistics.median(one["draft"] for one in drafted),
        "accepted": f"{statistics.median(one['accepted'] for one in drafted):.0%}",
    }


@torch.no_grad()
def forget(model: Decoder) -> None:
    """What attention finds counts nothing from now on. It is computed as before."""
    for block in model.layers:
        o: Any = block.attn.o  # type: ignore[union-attr]
        (o.packed.scales if isinstance(o, QuantizedLinear) else o.weight).zero_()


def texts_of(model: Decoder, sequences: int) -> dict[str, list[Request]]:
    """The requests of each kind of text."""
    draw = random.Random(1)
    noise = [[draw.randrange(10, VOCAB) for _ in range(PROMPT)] for _ in range(sequences)]

    def asked(prompts: Sequence[Sequence[int]], temperature: float, made: int) -> list[Request]:
        drawn = [Sampling(temperature=temperature, top_p=1.0, seed=draw.randrange(1 << 30)) for _ in prompts]
        together = zip(prompts, drawn, strict=True)
        return [Request(prompt=prompt, max_tokens=made, sampling=sampling) for prompt, sampling in together]

    def own(temperature: float) -> list[Request]:
        begun = asked([prompt[:1] for prompt in noise], temperature, PROMPT - 1)
        jobs = Engine(model, max_sequences=sequences, speculate=False).run(begun)
        return asked([[*job.request.prompt, *job.made] for job in jobs], temperature, MADE)

    return {"repeats": own(0.0), "partly": own(PARTLY), "does not": asked(noise, 1.0, MADE)}


def main() -> None:
    forms = ["bfloat16", "int8", "int4"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/bench-models"))
    parser.add_argument("--only", nargs="+", choices=sorted(SHAPES), default=["olmoe-4l"])
    parser.add_argument("--formats", nargs="+", choices=forms, default=forms)
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only:
        if not (arguments.models / name / "config.json").exists():
            make(arguments.models / name, SHAPES[name])
        for form in arguments.formats:
            model = load_handful(arguments.models / name, form)
            forget(model)
            for sequences in arguments.sequences:
                for text, requests in texts_of(model, sequences).items():
                    print(f"{name} {form} × {sequences}: {text}", file=sys.stderr, flush=True)
                    told = compare(model, requests, arguments.rounds)
                    rows.append({"model": name, "format": form, "sequences": sequences, "text": text, **told})
    publish("speculate", rows, {"rounds": arguments.rounds, "prompt": PROMPT, "made": MADE})


if __name__ == "__main__":
    main()
