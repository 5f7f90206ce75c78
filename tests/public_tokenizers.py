"""Tokenizers with the structure of public ones, and what each puts before a text, each made in a moment."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = ["the cat sat on the mat and the dog ran to the man with a hat"] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(specials: Sequence[str], before: Sequence[str] = (), after: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """Byte-level BPE (Qwen, DeepSeek, OLMoE, gpt-oss, GLM), with what its post-processor puts around a text."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False))
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return framed(inner, before, after)


def sentencepiece(before: Sequence[str] = ("<s>",), after: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """BPE with byte fallback (Mixtral, Llama 2)."""
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *BYTES]
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False))
    return framed(inner, before, after)


def framed(inner: tokenizers.Tokenizer, before: Sequence[str], after: Sequence[str]) -> tokenizers.Tokenizer:
    if before or after:
        named = [(name, inner.token_to_id(name)) for name in dict.fromkeys((*before, *after))]
        inner.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=named)
    return inner


@dataclass(frozen=True)
class Public:
    """A tokenizer's folder: what its files hold, and the tokens that stand before a text."""

    inner: tokenizers.Tokenizer | None
    settings: Mapping[str, Any]
    before: tuple[str, ...] = ()
    model_type: str = "mixtral"
    files: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if self.inner is not None:
            self.inner.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(self.settings))
        for name, content in self.files.items():
            (folder / name).write_text(content)
        if not (folder / "config.json").exists():
            (folder / "config.json").write_text(json.dumps({"model_type": self.model_type}))
        return folder


def added(name: str) -> dict[str, Any]:
    """A token as transformers 4 wrote it."""
    return {"__type": "AddedToken", "content": name, "lstrip": False, "normalized": True, "rstrip": False}


def settings(bos: Any, eos: Any, kind: str = "PreTrainedTokenizerFast", **more: Any) -> dict[str, Any]:
    return {"tokenizer_class": kind, "bos_token": bos, "eos_token": eos, **more}


RANKS = [
    *(bytes([byte]) for byte in range(256)),
    b"th",
    b"the",
    b" c",
    b"at",
    b" cat",
    b" t",
    b"\xe6\xbc",
    b"\xe6\xbc\xa2",
]
KIMI = "\n".join(f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(RANKS)) + "\n"
KIMI_SPECIALS = {len(RANKS): "[BOS]", len(RANKS) + 1: "[EOS]", len(RANKS) + 2: "<|im_end|>", len(RANKS) + 7: "[PAD]"}
KIMI_SETTINGS = settings(
    "[BOS]", "[EOS]", "TikTokenTokenizer",
    added_tokens_decoder={str(n): {"content": name, "special": True} for n, name in KIMI_SPECIALS.items()},
)  # fmt: skip


def merges_of(inner: tokenizers.Tokenizer) -> dict[str, str]:
    """A byte-level tokenizer as vocab.json and merges.txt, without what was added to it."""
    model = json.loads(inner.to_str())["model"]
    lines = "".join(f"{a} {b}\n" for a, b in model["merges"])
    return {"vocab.json": json.dumps(model["vocab"]), "merges.txt": f"#version: 0.2\n{lines}"}


SLOW = byte_level([])
ADDED = {"280": {"content": "<|endoftext|>", "special": True}, "281": {"content": "<|im_end|>", "special": True},
         "282": {"content": "<tool_call>", "special": False}}  # fmt: skip


def unmarked(inner: tokenizers.Tokenizer, names: Sequence[str]) -> tokenizers.Tokenizer:
    """With these tokens in its vocabulary as any others, so that the settings alone call them special."""
    document = json.loads(inner.to_str())
    document["added_tokens"] = [one for one in document["added_tokens"] if one["content"] not in names]
    document["model"]["vocab"] |= {name: inner.token_to_id(name) for name in names}
    return tokenizers.Tokenizer.from_str(json.dumps(document))


PUBLIC: dict[str, Public] = {
    "mixtral": Public(
        sentencepiece(), settings("<s>", "</s>", "LlamaTokenizer", add_bos_token=True, add_eos_token=False), ("<s>",)
    ),
    # The switches of transformers 4, where the file says another thing: the file is what counts.
    "mixtral, switched off": Public(
        sentencepiece(), settings("<s>", "</s>", "LlamaTokenizerFast", add_bos_token=False), ("<s>",)
    ),
    "an old file, switched on": Public(
        sentencepiece(before=()), settings("<s>", "</s>", "LlamaTokenizer", add_bos_token=True, add_eos_token=True)
    ),
    "qwen3": Public(
        byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        settings(None, "<|im_end|>", "Qwen2Tokenizer", add_bos_token=False), model_type="qwen3_moe",
    ),
    "gpt-oss": Public(
        byte_level(["<|startoftext|>", "<|endoftext|>", "<|return|>"]), settings("<|startoftext|>", "<|return|>"),
        model_type="gpt_oss",
    ),
    "deepseek-v3": Public(
        byte_level(["<bos>", "<eos>"], before=["<bos>"]),
        settings(added("<bos>"), added("<eos>"), "LlamaTokenizerFast", add_bos_token=True),
        ("<bos>",), model_type="deepseek_v3",
    ),
    "olmoe": Public(
        byte_level(["<|endoftext|>", "|||IP_ADDRESS|||"]),
        settings("|||IP_ADDRESS|||", "|||IP_ADDRESS|||", "GPTNeoXTokenizer", add_bos_token=False), model_type="olmoe",
    ),
    "glm-4.5": Public(
        byte_level(["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>"], before=["[gMASK]", "<sop>"]),
        settings(None, "<|endoftext|>"), ("[gMASK]", "<sop>"), model_type="glm4_moe",
    ),
    "gpt-2, switched on": Public(
        byte_level(["<|endoftext|>"]), settings("<|endoftext|>", "<|endoftext|>", "GPT2Tokenizer", add_bos_token=True)
    ),
    "special by its settings alone": Public(
        unmarked(byte_level(["<s>", "<|im_end|>", "<tool>"], before=["<s>"]), ["<s>", "<|im_end|>", "<tool>"]),
        settings("<s>", "<|im_end|>", additional_special_tokens=["<tool>", added("<nowhere>")]), ("<s>",),
    ),
    "both ends": Public(
        byte_level(["<s>", "</s>"], before=["<s>"], after=["</s>"]), settings("<s>", "</s>"), ("<s>",)
    ),
    "gpt-2 without tokenizer.json": Public(
        None, settings("<|endoftext|>", "<|endoftext|>", "GPT2Tokenizer", added_tokens_decoder=ADDED),
        model_type="gpt2", files=merges_of(SLOW),
    ),
    "gpt-2 without tokenizer.json, switched on": Public(
        None, settings("<|endoftext|>", "<|im_end|>", "GPT2Tokenizer", added_tokens_decoder=ADDED, add_bos_token=True,
                       add_eos_token=True),
        ("<|endoftext|>",), model_type="gpt2", files=merges_of(SLOW),
    ),
    "qwen2 without tokenizer.json": Public(
        None, settings(None, "<|im_end|>", "Qwen2Tokenizer", added_tokens_decoder=ADDED, add_prefix_space=False),
        model_type="qwen2_moe", files=merges_of(SLOW),
    ),
    "kimi-k2": Public(None, KIMI_SETTINGS, model_type="kimi_k2", files={"tiktoken.model": KIMI}),
}  # fmt: skip
