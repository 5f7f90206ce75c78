"""How quickly is a model loaded, and how much memory does it take on the way?

A small mixture of about a gigabyte is saved once, and each way of reading it runs in a process of its own, alternately:
a plain read of the file's bytes into memory, safetensors' own `load_file` (every tensor copied out of its map, as a
model that is trained or moved needs it), transformers' `from_pretrained`, and `handful.load`, as it is, turned to
float32 and packed to 4 bits. The file is in the page cache for all of them, so that the way is measured and not the
disk. Peak memory is VmHWM, less what the process held after its imports.

    python bench/load.py --gigabytes 0.5 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import importlib, json, resource, sys, time, torch
way, folder = sys.argv[1:]
torch.set_num_threads(1)
file = folder + "/model.safetensors"

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

def plain():
    out = torch.empty(__import__("os").path.getsize(file), dtype=torch.uint8)
    with open(file, "rb", buffering=0) as f:
        view, done = memoryview(out.numpy()), 0
        while done < len(view):
            done += f.readinto(view[done:])
    return out

def library():
    from safetensors import torch as st
    return {name: t.clone() for name, t in st.load_file(file).items()}

def peer():
    return t.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

import handful
from handful.families.io import load
import safetensors.torch
if way == "transformers":
    t = importlib.import_module("transformers")
    t.utils.logging.set_verbosity_error()
    t.utils.logging.disable_progress_bar()
    importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
ways = {
    "plain read": plain,
    "safetensors load_file": library,
    "transformers": peer,
    "handful": lambda: load(folder),
    "handful, to float32": lambda: load(folder, dtype=torch.float32),
    "handful, to 4 bits": lambda: load(folder, quantize=4),
}
before = status("VmRSS")
began = time.perf_counter()
held = ways[way]()
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "peak": status("VmHWM") - before}))
"""
WAYS = (
    "plain read",
    "safetensors load_file",
    "transformers",
    "handful",
    "handful, to float32",
    "handful, to 4 bits",
)


def make(folder: Path, gigabytes: float) -> int:
    """Save a mixture of about that size in bfloat16; returns the bytes of its tensors' file."""
    import torch

    import handful
    from handful import ModelConfig, RouterConfig
    from handful.model import Decoder

    layer = 32 * 3 * 1024 * 512 * 2  # bytes of a layer's experts
    router = RouterConfig(experts=32, top_k=4)
    layers = max(1, round(gigabytes * 1e9 / layer))
    config = ModelConfig(
        vocab=8192, width=1024, layers=layers, heads=8, router=router, expert_width=512, qk_norm="head", tied=True
    )
    torch.manual_seed(0)
    handful.save(Decoder(config).to(torch.bfloat16), folder, max_shard_bytes=1 << 50)
    return (folder / "model.safetensors").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        size = make(folder, arguments.gigabytes)
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(arguments.repeats):
            for way in WAYS:
                command = [sys.executable, "-c", CHILD, way, str(folder)]
                run = subprocess.run(command, capture_output=True, text=True, check=True)
                found[way].append(json.loads(run.stdout.splitlines()[-1]))
        print(f"{size / 1e9:.2f} GB in one file; medians of {arguments.repeats}, one thread\n")
        print(f"{'':24}{'seconds':>9}{'GB/s':>8}{'peak, of the file':>20}")
        for way, rows in found.items():
            seconds = statistics.median(row["seconds"] for row in rows)
            peak = statistics.median(row["peak"] for row in rows)
            print(f"{way:24}{seconds:9.2f}{size / 1e9 / seconds:8.2f}{peak / size:20.2f}")


if __name__ == "__main__":
    main()
