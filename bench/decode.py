"""How quick is a whole model, beside transformers, llama.cpp and vLLM, and beside what memory and multipliers allow?

    python bench/decode.py [--models DIR] [--only olmoe-4l] [--formats bfloat16 int8 int4] [--rounds 3]
                           [--peers transformers llama.cpp vLLM] [--llama-bin DIR --gguf DIR] [--vllm PYTHON]
                           [--level avx2]
    python bench/decode.py --recording [--models DIR] [--only olmoe-4l] [--formats int4] [--rounds 9]

olmoe-4l      OLMoE's shape in 4 layers: D=2048, 64 experts of 1024, 8 of a token, 16 heads, 8192 tokens
mixtral-2l    Mixtral 8x7B's in 2 layers: D=4096, 8 experts of 14336, 2 of a token, 32 heads over 8

Random weights, written to DIR as Hugging Face checkpoints where they are not there yet (4 GB and 6 GB). All run on this
computer's cores, on prompts of the same lengths: prefill is a prompt of 512 tokens; decode goes from 16 tokens on, 64
steps, one sequence or 16. Each engine is a process of its own, one after the other, and every round has all of them.

llama.cpp     llama-bench (Q8_0 for int8, Q4_0 and Q4_K_M for int4) and llama-batched-bench, on DIR/NAME-FORMAT.gguf
vLLM          a Python with vllm; DIR/NAME, DIR/NAME-w8a8 and DIR/NAME-w4g128 for its formats

--level       the instructions that Handful and torch keep to, as HANDFUL_ISA names them. llama.cpp's are those of its
              build. Torch is held to AVX2 where the level is avx2 or avx_vnni.

"of memory" is active bytes a token, times tokens a second, beside the rate at which memory is read here, measured
just before; that rate is told before and after every engine. "of products" is 2 FLOPs for each active weight but the
output layer's, beside torch's best product, in float32 or bfloat16. Engines that are not given are left out, and all
but those that --peers names.

--recording   what decoding one sequence costs more when its routing is recorded: both, by turns.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "olmoe-4l": {"architecture": "Olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 4,
                 "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8},
    "mixtral-2l": {"architecture": "Mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
                   "num_experts_per_tok": 2},
}  # fmt: skip
VOCAB, PROMPT, START, STEPS, BATCH = 8192, 512, 16, 64, 16
GGUF = {"bfloat16": ["bf16"], "int8": ["Q8_0"], "int4": ["Q4_0", "Q4_K_M"]}
VLLM = {"bfloat16": "", "int8": "-w8a8", "int4": "-w4g128"}
PEERS = ("transformers", "llama.cpp", "vLLM")
WORK = ("prefill", "decode", f"decode x{BATCH}")


def make(folder: Path, shape: dict[str, Any]) -> None:
    """A checkpoint of random weights."""
    import torch
    import transformers

    values = {key: value for key, value in shape.items() if key != "architecture"}
    config = getattr(transformers, f"{shape['architecture']}Config")(
        vocab_size=VOCAB, tie_word_embeddings=False, **values
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{shape['architecture']}ForCausalLM")._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Engines. Each is a process that prints lines of JSON: {"work": ..., "tokens_per_second": ...}.


def tell(work: str, tokens: int, seconds: float) -> None:
    print(json.dumps({"work": work, "tokens_per_second": tokens / seconds}), flush=True)


def tell_all(prefill: Callable[[], float], decode: Callable[[int], float]) -> None:
    """Tell of a prompt and of 1 and BATCH sequences: the functions give seconds, of which the first do not count."""
    for work, run, tokens in (
        ("prefill", prefill, PROMPT),
        ("decode", lambda: decode(1), STEPS),
        (f"decode x{BATCH}", lambda: decode(BATCH), BATCH * STEPS),
    ):
        run()
        tell(work, tokens, statistics.median(run() for _ in range(3)))


def load_handful(folder: Path, form: str) -> Any:
    import torch

    from handful import load

    return load(folder, dtype=torch.bfloat16, quantize={"bfloat16": None, "int8": 8, "int4": 4}[form])


def handful_runs(model: Any) -> tuple[Callable[[], float], Callable[..., float]]:
    """Seconds of reading a prompt, and of decoding so many sequences."""
    import torch

    from handful.engine import Engine, Request
    from handful.sampling import Sampling

    greedy = Sampling(temperature=0)
    draw = torch.Generator().manual_seed(1)

    def requests(count: int, length: int, new: int) -> list[Request]:
        prompts = torch.randint(10, VOCAB, (count, length), generator=draw).tolist()
        return [Request(prompt=prompt, max_tokens=new, sampling=greedy) for prompt in prompts]

    def prefill() -> float:
        engine = Engine(model, chunk=PROMPT)
        engine.submit(requests(1, PROMPT, 2)[0])
        began = time.perf_counter()
        engine.step()
        return time.perf_counter() - began

    def decode(count: int, **options: Any) -> float:
        engine = Engine(model, chunk=count * START, max_sequences=count, speculate=False, **options)
        for request in requests(count, START, STEPS + 1):
            engine.submit(request)
        engine.step()
        began = time.perf_counter()
        while engine.busy:
            engine.step()
        return time.perf_counter() - began

    return prefill, decode


def run_handful(folder: Path, form: str) -> None:
    tell_all(*handful_runs(load_handful(folder, form)))


def recording(arguments: argparse.Namespace) -> None:
    """Decoding with its routing recorded, beside the same without."""
    from timing import keep, rounds, show

    from handful.observe import Recorder

    rows = []
    for name in arguments.only:
        for form in arguments.formats:
            _, decode = handful_runs(load_handful(arguments.models / name, form))
            recorder = Recorder()

            def recorded(decode: Any = decode, recorder: Recorder = recorder) -> float:
                return float(decode(1, on_routing=lambda *told: recorder.add(told[2])))

            cases = {"decode": lambda decode=decode: decode(1), "recorded": recorded}
            took = {case: found["median"] for case, found in rounds(cases, arguments.rounds).items()}
            rows.append({"model": name, "format": form, **took, "ratio": took["recorded"] / took["decode"]})
    show(rows)
    keep("recording", rows, {"rounds": arguments.rounds, "steps": STEPS})


def run_transformers(folder: Path, implementation: str) -> None:
    import importlib

    import torch

    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation=implementation
    ).eval()

    @torch.inference_mode()
    def prefill() -> float:
        tokens = torch.randint(10, VOCAB, (1, PROMPT))
        began = time.perf_counter()
        model(tokens, logits_to_keep=1)
        return time.perf_counter() - began

    @torch.inference_mode()
    def decode(count: int) -> float:
        past = model(torch.randint(10, VOCAB, (count, START)), use_cache=True).past_key_values
        began = time.perf_counter()
        for _ in range(STEPS):
            model(torch.randint(10, VOCAB, (count, 1)), past_key_values=past, use_cache=True)
        return time.perf_counter() - began

    tell_all(prefill, decode)


def run_llama(binaries: Path, gguf: Path) -> None:
    threads = str(len(os.sched_getaffinity(0)))
    common = ["-m", str(gguf), "-t", threads, "-ngl", "0"]
    single = [*common, "-p", str(PROMPT), "-n", str(STEPS), "-r", "3", "-o", "json"]
    out = subprocess.run([str(binaries / "llama-bench"), *single], capture_output=True, text=True, check=True).stdout
    for row in json.loads(out):
        work = "prefill" if row["n_prompt"] else "decode"
        print(json.dumps({"work": work, "tokens_per_second": row["avg_ts"]}), flush=True)
    many = [*common, "-c", "4096", "-b", "2048", "-npp", str(START), "-ntg", str(STEPS), "-npl", str(BATCH)]
    out = subprocess.run(
        [str(binaries / "llama-batched-bench"), *many], capture_output=True, text=True, check=True
    ).stdout
    # | PP | TG | B | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s | ...
    row = next(line for line in out.splitlines() if re.match(rf"\|\s*{START}\s*\|", line))
    rate = float(row.split("|")[8])
    print(json.dumps({"work": f"decode x{BATCH}", "tokens_per_second": rate}), flush=True)


def run_vllm(folder: Path) -> None:
    # Run by vLLM's own Python, which has no Handful: nothing of this repository is imported here.
    import random

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    llm = LLM(model=str(folder), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=BATCH,
              max_num_batched_tokens=8192, enable_prefix_caching=False)  # fmt: skip
    draw = random.Random(0)

    def seconds(count: int, length: int, new: int) -> float:
        prompts = [{"prompt_token_ids": [draw.randrange(10, VOCAB - 100) for _ in range(length)]} for _ in range(count)]
        settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        llm.generate(prompts, settings, use_tqdm=False)
        return time.perf_counter() - began

    def median(*of: int) -> float:
        seconds(*of)
        return statistics.median(seconds(*of) for _ in range(3))

    tell("prefill", PROMPT, median(1, PROMPT, 1))
    for work, count in (("decode", 1), (f"decode x{BATCH}", BATCH)):
        tell(work, count * STEPS, median(count, START, STEPS + 1) - median(count, START, 1))


# ---------------------------------------------------------------------------------------------------------------------


def engines(arguments: argparse.Namespace, name: str, form: str) -> Iterator[tuple[str, list[str]]]:
    """What runs a model in a format: a name and the command."""
    this, folder = [sys.executable, __file__, "--run"], arguments.models / name
    yield "Handful", [*this, "handful", str(folder), form]
    if form == "bfloat16" and "transformers" in arguments.peers:
        for implementation in ("eager", "grouped_mm"):
            yield f"transformers, {implementation}", [*this, "transformers", str(folder), implementation]
    if arguments.llama_bin is not None and "llama.cpp" in arguments.peers:
        for kind in GGUF[form]:
            file = arguments.gguf / f"{name}-{kind}.gguf"
            yield f"llama.cpp, {kind}", [*this, "llama", str(arguments.llama_bin), str(file)]
    if arguments.vllm is not None and "vLLM" in arguments.peers and Path(f"{folder}{VLLM[form]}").exists():
        yield "vLLM", [str(arguments.vllm), __file__, "--run", "vllm", f"{folder}{VLLM[form]}"]


def weights(folder: Path) -> tuple[int, dict[str, int]]:
    """Active weights but the output layer's, and active bytes of a decoded token in each format."""
    from handful import cost
    from handful.families.io import find_config

    config = find_config(folder)
    active = cost(config).active_parameters
    held = {}
    for form in ("bfloat16", "int8", "int4"):
        priced = cost(config, dtype=form)
        # All but the input embedding is read, and of the experts those that are used.
        share = active.excl_input_embedding / priced.total_parameters.excl_input_embedding
        held[form] = round(priced.weight_bytes * share)
    return active.excl_embeddings, held


def at_level(level: str | None) -> dict[str, str]:
    """The environment that holds Handful, and torch, to a level of instructions."""
    if level is None:
        return {}
    torch_too = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"} if level in ("avx2", "avx_vnni") else {}
    return {"HANDFUL_ISA": level, **torch_too}


def measure(arguments: argparse.Namespace) -> None:
    # Here and not above: vLLM's Python runs this file too, and has neither.
    from timing import keep, show

    from handful.machine import machine
    from handful.machine import measure as rates

    found: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    shares: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    reads: list[float] = []
    products: list[float] = []
    for turn in range(arguments.rounds):
        for name in arguments.only:
            for form in arguments.formats:
                for engine, command in engines(arguments, name, form):
                    now = rates()
                    reads.append(now.read_bytes_per_second)
                    products.append(max(now.float32_flops, now.bfloat16_flops))
                    told_of = f"round {turn + 1}: {name} {form} {engine}"
                    out = subprocess.run(
                        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                        env=os.environ | at_level(arguments.level),
                    )  # fmt: skip
                    after = rates().read_bytes_per_second
                    reads.append(after)
                    print(
                        f"{told_of}: memory {now.read_bytes_per_second / 1e9:.1f} GB/s, then {after / 1e9:.1f}",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
                    if out.returncode:
                        print(f"  failed: {' '.join(command)}", file=sys.stderr)
                    for line in out.stdout.splitlines():
                        if line.startswith('{"work"'):
                            told = json.loads(line)
                            rate = told["tokens_per_second"]
                            found[name, form, engine][told["work"]].append(rate)
                            if engine == "Handful" and told["work"] in WORK[:2]:
                                active, held = weights(arguments.models / name)
                                share = held[form] * rate / now.read_bytes_per_second
                                if told["work"] == "prefill":
                                    share = 2 * active * rate / products[-1]
                                shares[name, form][told["work"]].append(share)
    read, product = statistics.median(reads), statistics.median(products)
    rows = []
    for (name, form, engine), works in found.items():
        row: dict[str, Any] = {"model": name, "format": form, "engine": engine}
        for work in WORK:
            row[work] = round(statistics.median(works[work]), 1) if works.get(work) else "-"
        if engine == "Handful" and works:
            row["of memory"] = f"{statistics.median(shares[name, form]['decode']):.0%}"
            row["of products"] = f"{statistics.median(shares[name, form]['prefill']):.0%}"
        rows.append({"of memory": "", "of products": ""} | row)
    rows = [{key: row[key] for key in ("model", "format", "engine", *WORK, "of memory", "of products")} for row in rows]
    show(rows)
    level = arguments.level or " ".join(machine().isa)
    notes = {"level": level, "read_bytes_per_second": reads, "product_flops": products, "rounds": arguments.rounds}
    print(f"level: {level}")
    print(f"tokens/s; memory read at {read / 1e9:.1f} GB/s, products at {product / 1e9:.0f} GFLOP/s (medians)")
    keep("decode" if arguments.level is None else f"decode-{arguments.level}", rows, notes)


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        kind, *rest = sys.argv[2:]
        runs: dict[str, Any] = {
            "handful": lambda: run_handful(Path(rest[0]), rest[1]),
            "transformers": lambda: run_transformers(Path(rest[0]), rest[1]),
            "llama": lambda: run_llama(Path(rest[0]), Path(rest[1])),
            "vllm": lambda: run_vllm(Path(rest[0])),
        }
        runs[kind]()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/bench-models"))
    parser.add_argument("--only", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--formats", nargs="+", choices=list(VLLM), default=list(VLLM))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--level")
    parser.add_argument("--recording", action="store_true")
    parser.add_argument("--llama-bin", type=Path, help="where llama-bench and llama-batched-bench are")
    parser.add_argument("--gguf", type=Path, help="where NAME-FORMAT.gguf are")
    parser.add_argument("--vllm", type=Path, help="a Python that has vllm")
    arguments = parser.parse_args()
    if (arguments.llama_bin is None) != (arguments.gguf is None):
        parser.error("--llama-bin and --gguf go together")
    for name in arguments.only:
        if not (arguments.models / name / "config.json").exists():
            make(arguments.models / name, SHAPES[name])
    (recording if arguments.recording else measure)(arguments)


if __name__ == "__main__":
    main()
