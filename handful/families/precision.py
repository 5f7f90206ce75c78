"""How a published checkpoint stores its weights, from the `quantization_config` of its config.json: what is downloaded.

Each way of packing is a row: which bits a weight has, and what stands beside how many of them.

    quant_method        who writes it                    a weight           beside it
    mxfp4               gpt-oss                          4 bits             8 bits for 32 of a row
    fp8                 DeepSeek-V3, Qwen3, MiniMax-M2   8 bits             32 for a block of 128 × 128, or of a tensor
    fbgemm_fp8          Llama                            8 bits             32 for a row
    awq, gptq,          many                             2 to 8 bits        a scale of 16 and a zero for a group
    auto-round
    compressed-tensors  vLLM's llm-compressor            as it says         as it says
    bitsandbytes        many                             4 or 8 bits        32 (or 8) for 64 weights; 32 for a row
    modelopt            NVIDIA                           4 or 8 bits        8 for 16 of a row; 32 for a tensor
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from handful.cost import Precision
from handful.count import Part
from handful.families.config_fields import Values

__all__ = ["precision_from_hf"]

# Linear maps of the layers: what every method packs unless it is told not to. The router of experts is left alone by
# all of them, embeddings and the output layer too.
LINEAR: frozenset[Part] = frozenset({"attention", "routed_experts", "shared_experts", "dense_ffn", "state_space"})
# What a name in a list of modules that are not packed means; the first that it holds.
NAMES: tuple[tuple[str, tuple[Part, ...]], ...] = (
    ("shared_expert", ("shared_experts",)),
    ("experts", ("routed_experts",)),
    ("attn", ("attention",)),
    ("attention", ("attention",)),
    ("mamba", ("state_space",)),
    ("ssm", ("state_space",)),
    ("mlp", ("dense_ffn", "shared_experts", "routed_experts")),
    ("feed_forward", ("dense_ffn", "shared_experts", "routed_experts")),
)
FLOATS = {"float32": 4, "bfloat16": 2, "float16": 2}


def precision_from_hf(values: Values) -> Precision | None:
    """How the checkpoint of a config.json stores its weights; None where it says nothing that is known here.

    A `quantization_config` of another method, or one that is malformed, has `known = False`: its weights are then as in
    the dtype that the config names.
    """
    inner = values.get("text_config")
    if isinstance(inner, Mapping):
        values = {
            **values,
            **inner,
            **{k: values[k] for k in ("quantization_config", "compression_config") if k in values},
        }
    dtype = str(values.get("torch_dtype") or values.get("dtype") or "bfloat16").removeprefix("torch.")
    number = FLOATS.get(dtype, 2)
    found = values.get("quantization_config") or values.get("compression_config")
    if found is None:
        return Precision(name=dtype, number=number) if dtype in FLOATS else None
    if not isinstance(found, Mapping):
        return Precision(name="quantization_config", number=number, known=False)
    method = str(found.get("quant_method") or ("modelopt" if "quant_algo" in found else ""))
    read = METHODS.get(method)
    try:
        packed = None if read is None else read(found)
    except (TypeError, ValueError, KeyError, AttributeError):
        packed = None
    if packed is None:
        return Precision(name=method or "quantization_config", number=number, known=False)
    name, how = packed
    return Precision(name=name, number=number, **{"parts": LINEAR, **how}, **_left_out(found))


def _left_out(found: Values) -> dict[str, Any]:
    """Parts of all layers, and how many layers of a part, that are left as they are."""
    lists = (found.get(key) for key in ("modules_to_not_convert", "ignore", "ignored_layers", "llm_int8_skip_modules"))
    names = [str(name) for some in lists if isinstance(some, Sequence) and not isinstance(some, str) for name in some]
    whole: set[Part] = set()
    layers: dict[Part, set[str]] = {}
    for name in names:
        if re.search(r"(gate|router)\$?$", name):  # of experts: never packed
            continue
        parts = next((parts for word, parts in NAMES if word in name), ())
        number = re.search(r"layers\.(\d+)\.", name)
        if number is not None and len(parts) > 1:  # one layer's own network, or its experts would be named
            parts = parts[:1]
        for part in parts:
            if number is None:
                whole.add(part)
            else:
                layers.setdefault(part, set()).add(number[1])
    return {"without": frozenset(whole), "layers_without": {part: len(numbers) for part, numbers in layers.items()}}


def _mxfp4(found: Values) -> tuple[str, dict[str, Any]]:
    return "mxfp4", {"bits": 4, "block": (1, 32), "block_bits": 8, "parts": frozenset({"routed_experts"})}


def _fp8(found: Values) -> tuple[str, dict[str, Any]]:
    block = found.get("weight_block_size")
    if block is None:
        return "fp8", {"bits": 8, "tensor_bits": 32}
    rows, columns = (int(size) for size in block)
    return "fp8", {"bits": 8, "block": (rows, columns), "block_bits": 32}


def _fbgemm(found: Values) -> tuple[str, dict[str, Any]]:
    return "fp8", {"bits": 8, "block": (1, 0), "block_bits": 32}


def _grouped(found: Values) -> tuple[str, dict[str, Any]]:
    """AWQ and GPTQ: a scale of 16 bits and a zero of a weight's bits for each group; GPTQ numbers its inputs."""
    method = str(found["quant_method"])
    bits = int(found.get("bits", found.get("w_bit", 4)))
    group = int(found.get("group_size", found.get("q_group_size", 128)))
    named = f"{method} int{bits}" + (f"/{group}" if group > 0 else "")
    return named, {
        "bits": bits,
        "block": (1, max(group, 0)),
        "block_bits": 16 + bits,
        "input_bits": 32 if method == "gptq" else 0,
    }


def _compressed(found: Values) -> tuple[str, dict[str, Any]] | None:
    """The group that packs linear layers; of several, the one for the experts is not told apart from the others."""
    groups = [group for group in found["config_groups"].values() if isinstance(group.get("weights"), Mapping)]
    if len({str(group["weights"]) for group in groups}) != 1:
        return None  # layers of several precisions
    weights = groups[0]["weights"]
    bits, kind = int(weights["num_bits"]), str(weights.get("type", "int"))
    strategy, group = str(weights.get("strategy", "tensor")), int(weights.get("group_size") or 0)
    name = f"{'fp' if kind == 'float' else 'int'}{bits}" + (f"/{group}" if group > 0 else "")
    micro = kind == "float" and bits == 4  # NVFP4 and MXFP4: scales of 8 bits
    scale = (8 if micro else 16) + (0 if weights.get("symmetric", True) else bits)
    if strategy == "block":
        rows, columns = (int(size) for size in weights["block_structure"])
        return name, {"bits": bits, "block": (rows, columns), "block_bits": scale}
    if strategy == "tensor":
        return name, {"bits": bits, "tensor_bits": scale}
    return name, {"bits": bits, "block": (1, group if "group" in strategy else 0), "block_bits": scale}


def _bitsandbytes(found: Values) -> tuple[str, dict[str, Any]]:
    if found.get("load_in_8bit") or found.get("_load_in_8bit"):
        return "bitsandbytes int8", {"bits": 8, "block": (1, 0), "block_bits": 32}
    kind = str(found.get("bnb_4bit_quant_type", "fp4"))
    # Largest values of 64 weights: float32, or 8 bits with a float32 for 256 of them.
    return f"bitsandbytes {kind}", {
        "bits": 4,
        "block": (1, 64),
        "block_bits": 8 if found.get("bnb_4bit_use_double_quant") else 32,
    }


def _modelopt(found: Values) -> tuple[str, dict[str, Any]] | None:
    algorithm = str(found.get("quant_algo") or found.get("quantization", {}).get("quant_algo"))
    if algorithm == "NVFP4":
        return "nvfp4", {"bits": 4, "block": (1, 16), "block_bits": 8}
    return ("fp8", {"bits": 8, "tensor_bits": 32}) if algorithm == "FP8" else None


METHODS: dict[str, Callable[[Values], tuple[str, dict[str, Any]] | None]] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "awq": _grouped,
    "gptq": _grouped,
    "auto-round": _grouped,
    "compressed-tensors": _compressed,
    "bitsandbytes": _bitsandbytes,
    "modelopt": _modelopt,
}
