"""How near to memory's rate is attention of decoding, for each kind of cache and number of queries?

    python bench/attention.py [--context 32768] [--width 128] [--kv-heads 8] [--rounds 15]

One new token of one sequence looks at all of a context, through the kernel alone. Its keys and values are far more than
the processor's caches hold, and are read once: what they weigh, by the seconds, is beside the rate at which the same
call as `handful doctor`'s reads memory, just before and just after each case. Every round has all cases; medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
from timing import keep, show

from handful.kernels.extension import available
from handful.kv_rows import pack_rows

KINDS = ("bfloat16", "int8", "float32")
GROUPS = (1, 2, 4, 8)  # query heads of a head of keys
READ = 1 << 28  # bytes


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--groups", nargs="+", type=int, default=list(GROUPS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if not available():
        parser.error("the kernels are not there")
    J, d, context = asked.kv_heads, asked.width, asked.context
    torch.manual_seed(0)
    buffer = torch.ones(READ, dtype=torch.uint8)
    cos, sin = torch.ones(1, d // 2), torch.zeros(1, d // 2)
    k, v = torch.randn(2, 1, J * d).bfloat16().unbind()
    queries = {group: torch.randn(1, group * J * d).bfloat16() for group in asked.groups}
    held: dict[str, list[torch.Tensor]] = {}
    for kind in asked.kinds:
        drawn = [torch.randn(1, J, context + 1, d) for _ in range(2)]
        held[kind] = [pack_rows(t) if kind == "int8" else t.to(getattr(torch, kind)) for t in drawn]

    def read_rate() -> float:
        return float(torch.ops.handful.read_bandwidth(buffer, 3)[0])

    rates: dict[tuple[str, int], list[float]] = {}
    shares: dict[tuple[str, int], list[float]] = {}
    for turn in range(asked.rounds + 1):
        before = read_rate()
        for kind, (keys, values) in held.items():
            for group, q in queries.items():
                began = time.perf_counter()
                torch.ops.handful.decode_attention(
                    q, k, v, None, None, 1e-5, False, cos, sin, False, [keys], [values], [context], 0, d**-0.5, None
                )
                rate = (keys.nbytes + values.nbytes) / (time.perf_counter() - began)
                after = read_rate()
                if turn:
                    rates.setdefault((kind, group), []).append(rate)
                    shares.setdefault((kind, group), []).append(2 * rate / (before + after))
                before = after
    rows = [
        {
            "cache": kind, "queries of a head": group, "GB/s": statistics.median(rates[kind, group]) / 1e9,
            "of memory": f"{statistics.median(shares[kind, group]):.0%}",
            "quarters": " – ".join(f"{q:.0%}" for q in statistics.quantiles(shares[kind, group], n=4)[::2]),
        }
        for kind, group in rates
    ]  # fmt: skip
    show(rows)
    notes = {
        "context": context,
        "kv_heads": J,
        "width": d,
        "rounds": asked.rounds,
        "level": os.environ.get("HANDFUL_ISA"),
    }
    keep("-".join(["attention", *filter(None, [notes["level"]])]), rows, notes)


if __name__ == "__main__":
    main()
