"""Text to tokens and back: byte-level BPE, other people's tokenizers, and decoding one token at a time.

A tokenizer here is a `tokenizer.json` of the Hugging Face kind that can write any byte: byte-level BPE (GPT-2, OLMoE,
Qwen, DeepSeek, gpt-oss, and those trained here; Kimi's `tiktoken.model` becomes one) or BPE with byte fallback
(Mixtral). So no text is out of reach, and the bytes that a token stands for can be counted. What is trained here gives
every text back exactly. T5's kind, which has no tokens for some characters, is taken where one says so.

What stands around a text is the tokenizer's own affair, said by its post-processor: `<s>` before it (Mixtral), nothing
(Qwen, gpt-oss), `[gMASK]<sop>` (GLM-4.5), and END_OF_TEXT in those trained here.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from handful.checkpoint import write_file
from handful.errors import CheckpointError, ConfigError, DataError
from handful.hub import TOKENIZER_FILES, fetch, repository
from handful.tokenizer_files import build, byte_of_char, chat_templates, guarded, named_tokens, read_tokenizer_files

__all__ = ["END_OF_TEXT", "SMALLEST_VOCAB", "Stream", "Tokenizer", "load_tokenizer", "train_tokenizer", "trained"]

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257  # one token per byte, and END_OF_TEXT

# Some malformed files are found out by a first text alone: one of many kinds of characters.
_PROBE = "a ﬁrst Text,\n\tof 1234 ½ kinds: é e\u0301 ☃ 漢字 😀 \u200d\ufffd  <s>"

# What public tokenizers call the token that ends a text, where no tokenizer_config.json says it.
_END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>")


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016, on bytes with GPT-2's word pattern).

    texts   the training texts, and nothing held out.
    vocab   tokens to end with: END_OF_TEXT (id 0), the 256 bytes, and merges of pairs seen at least twice. Little
            text has few such pairs, so the result may be smaller: ask its `vocab_size`.

    The same texts in the same order give the same tokenizer, byte for byte. ConfigError for a vocab below 257.
    """
    if vocab < SMALLEST_VOCAB:
        raise ConfigError(f"vocab = {vocab}: at least {SMALLEST_VOCAB}, the 256 bytes and {END_OF_TEXT}")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return trained(inner)


def trained(inner: tokenizers.Tokenizer, eos: str = END_OF_TEXT) -> Tokenizer:
    """A tokenizer of ours: it says itself that a text begins after the end-of-text token, as in our training."""
    number = inner.token_to_id(eos)
    inner.post_processor = processors.TemplateProcessing(single=[eos, "$A"], special_tokens=[(eos, number)])
    return Tokenizer(inner, eos)


def load_tokenizer(source: str | Path, *, any_text: bool = True) -> Tokenizer:
    """Load a tokenizer from a `tokenizer.json`, a folder that holds one (or Kimi's `tiktoken.model`), or a model
    `org/name` on the Hugging Face Hub, which may name a revision: `org/name@revision`.

    The end-of-text token is the `eos_token` of the `tokenizer_config.json` or `special_tokens_map.json` beside it, or
    else the first of the usual names that the tokenizer knows, or the one whose id the `config.json` gives. DataError
    when there is no such file, one is malformed, or the tokenizer cannot write any byte (with `any_text=False` it need
    not: T5's, which reads a character that it does not know as "<unk>").
    """
    path = Path(source)
    if not os.path.exists(path):
        if repository(str(source)) is None:
            raise DataError(f"tokenizer {str(source)!r}: no such file or folder, and not an org/name")
        try:
            path = fetch(str(source), TOKENIZER_FILES)
        except CheckpointError as error:
            raise DataError(f"tokenizer {error}") from None
    with guarded(f"tokenizer {str(source)!r}"):
        files = read_tokenizer_files(path)
        inner = build(files)
        tokenizer = Tokenizer(inner, _end_of_text(inner, files, path), any_text=any_text, files=files)
        tokenizer.encode_batch([_PROBE])
        tokenizer.encode(_PROBE, special=True)
        return tokenizer


def _end_of_text(inner: tokenizers.Tokenizer, files: Mapping[str, bytes], path: Path) -> str:
    end = named_tokens(files).get("eos_token")
    if end is None:
        end = next((name for name in _END_NAMES if inner.token_to_id(name) is not None), None)
    config = path / "config.json"
    if end is None and config.is_file():
        number = json.loads(config.read_bytes()).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        end = inner.id_to_token(number) if isinstance(number, int) and number >= 0 else None
    if end is None:
        raise DataError("no end-of-text token is known: name it as eos_token in tokenizer_config.json")
    if inner.token_to_id(end) is None:
        raise DataError(f"eos_token = {end!r} in tokenizer_config.json: a token of tokenizer.json")
    return end


def _bytes_of_byte_level(token: str) -> bytes:
    alphabet = byte_of_char()
    return bytes(alphabet[char] for char in token) if alphabet.keys() >= set(token) else token.encode()


def _bytes_of_byte_fallback(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _decoding(inner: tokenizers.Tokenizer, any_text: bool) -> tuple[Callable[[str], bytes], int]:
    """How a token's name becomes its bytes, and how many spaces at the start of a text the decoder takes away."""
    decoder = json.loads(inner.to_str())["decoder"] or {"type": None}
    steps: list[dict[str, Any]] = decoder.get("decoders", [decoder])
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return _bytes_of_byte_level, 0
    if "ByteFallback" in kinds:
        # SentencePiece puts a space before a text, and this takes it away again.
        return _bytes_of_byte_fallback, sum(step["start"] for step in steps if step["type"] == "Strip")
    if kinds == ["Metaspace"] and not any_text:
        return _bytes_of_byte_fallback, 1
    raise DataError(f"decoder {kinds}: a byte-level or byte-fallback one is needed, which can write any text")


class Tokenizer:
    """A tokenizer.json with the few things that a language model asks of it.

    eos, eos_id      the token that ends a document.
    prefix, suffix   the tokens that the tokenizer itself puts before and after a text; () for none.
    named            the tokens that have a role, by it: {"bos_token": "<s>", "eos_token": "</s>", …}.
    chat_templates   Jinja templates by name, the usual one "default" (`chat.py` renders them).
    vocab_size       ids that a model must have rows for: the largest id + 1.
    fingerprint      a hash of the content and of eos: the same for the same tokenizer, wherever it was loaded from.

    files   what it was read from, which a checkpoint hands on unchanged.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, eos: str, *, any_text: bool = True, files: Mapping[str, bytes] | None = None
    ) -> None:
        # A file may carry the cutting and padding of the work it was last used for. Here a text is always whole.
        inner.no_truncation()
        inner.no_padding()
        self._template = inner
        # A second one reads text as nothing but text: a document that spells "<|endoftext|>" does not end there.
        self._plain = tokenizers.Tokenizer.from_str(inner.to_str())
        self._plain.encode_special_tokens = True
        eos_id = inner.token_to_id(eos)
        assert eos_id is not None, f"{eos!r} is not in the vocabulary"
        self.eos = eos
        self.eos_id: int = eos_id
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = hashlib.sha256(f"{eos}\n{inner.to_str()}".encode()).hexdigest()[:32]
        self._to_bytes, self._strip = _decoding(inner, any_text)
        around = inner.encode("a", add_special_tokens=True)
        text = [at for at, added in enumerate(around.special_tokens_mask) if not added] or [len(around.ids)]
        self.prefix = tuple(around.ids[: text[0]])
        self.suffix = tuple(around.ids[text[-1] + 1 :])
        self._files = dict(files or {})
        self.named = {**self._own_names(), **named_tokens(self._files)}
        self.chat_templates = chat_templates(self._files)

    def _own_names(self) -> dict[str, str]:
        bos = self._template.id_to_token(self.prefix[0]) if len(self.prefix) == 1 else None
        return {**({"bos_token": bos} if bos is not None else {}), "eos_token": self.eos}

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, eos={self.eos!r}, fingerprint={self.fingerprint!r})"

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens of a text.

        special   read special tokens that the text spells (a rendered chat template), and put the tokenizer's own
                  prefix and suffix around it, unless it spells them itself. Without it, text is only text.
        """
        if not special:
            return self._ids(text, self._plain)
        ids = self.encode_prompt(text)
        suffix = list(self.suffix)
        return ids if ids[len(ids) - len(suffix) :] == suffix else [*ids, *suffix]

    def encode_prompt(self, text: str) -> list[int]:
        """The tokens of a text to go on from: the tokenizer's prefix, unless the text spells it, and the text, with
        the special tokens that it spells. No suffix, which would end it."""
        ids, prefix = self.encode_rendered(text), list(self.prefix)
        return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]

    def encode_rendered(self, text: str) -> list[int]:
        """The tokens of a text that spells all of its special tokens itself: what a chat template rendered."""
        return self._ids(text, self._template)

    def _ids(self, text: str, inner: tokenizers.Tokenizer) -> list[int]:
        with guarded("tokenizer", quiet=False):
            return inner.encode(text, add_special_tokens=False).ids

    def special_id(self, text: str) -> int | None:
        """The special token that a text is; None if it is anything else."""
        token = self._template.token_to_id(text)
        return token if token in self._special else None

    @property
    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """How documents stand in a row: (tokens before the first, before each, after each).

        As the tokenizer has a text, and an end-of-text token after it. Where a text begins with no token of its own,
        or with the end-of-text token, the one that ended the document before stands there already.
        """
        eos = (self.eos_id,)
        before = () if self.prefix in ((), eos) else self.prefix
        return (() if before else eos), before, (self.suffix if self.suffix[-1:] == eos else (*self.suffix, *eos))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        # TOKENIZERS_PARALLELISM stays as it is: unset, the library uses all cores here and one in a forked child;
        # set to "true", a forked child would wait for ever for threads that the fork did not copy.
        with guarded("tokenizer", quiet=False):
            return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of tokens; special tokens are shown only with `special`. Bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream(special=special)
        return "".join(map(stream.push, ids)) + stream.finish()

    def token_bytes(self, token: int, *, special: bool = True) -> bytes:
        """The UTF-8 bytes that a token stands for: b"" for an id without a token, or a special one without `special`.

        A token may hold a part of a character only.
        """
        if not special and token in self._special:
            return b""
        return self._table.get(token, b"")

    def stream(self, after: Iterable[int] = (), *, special: bool = False) -> Stream:
        """A `Stream` that decodes the tokens which follow `after`."""
        return Stream(self, after, special=special)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The text of each token, for display: joined, they are `decode(ids, special=True)`.

        A character whose bytes are spread over several tokens stands at the last of them.
        """
        stream = self.stream(special=True)
        pieces = [stream.push(token) for token in ids]
        rest = stream.finish()
        if pieces:
            pieces[-1] += rest
        return pieces

    def to_str(self) -> str:
        """The content of a tokenizer.json, on one line."""
        return self._template.to_str()

    def files(self) -> dict[str, bytes]:
        """What a checkpoint folder keeps of a tokenizer, name -> content: the files that it was read from, unchanged,
        or those that make it. transformers' AutoTokenizer reads them."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._own_names(),
            "clean_up_tokenization_spaces": False,
        }
        own = {"tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}
        return {**own, **(self._files or {"tokenizer.json": self._template.to_str(pretty=True).encode()})}

    def save(self, path: str | Path) -> None:
        """Write `path`, a tokenizer.json or a folder to put it in, and the other files beside it.

        Each appears whole or not at all.
        """
        path = Path(path)
        folder, vocabulary = (path.parent, path.name) if path.suffix == ".json" else (path, "tokenizer.json")
        for name, content in self.files().items():
            write_file(folder / (vocabulary if name == "tokenizer.json" else name), content)

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        added = self._template.get_added_tokens_decoder()
        return frozenset(token for token, value in added.items() if value.special)

    @functools.cached_property
    def _table(self) -> dict[int, bytes]:
        added = self._template.get_added_tokens_decoder()
        return {
            number: added[number].content.encode() if number in added else self._to_bytes(token)
            for token, number in self._template.get_vocab(with_added_tokens=True).items()
        }


class Stream:
    """Decode tokens as they come. What `push` and `finish` return, joined, is the `decode` of all the tokens.

    Bytes of an unfinished character are held back until the character is complete. `after` are the tokens that the
    reader has already seen (a prompt): they finish a character that they began, and keep the space of a first word.
    """

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = (), *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer._strip
        for token in after:
            self.push(token)

    def push(self, token: int) -> str:
        """The text that this token completes: maybe none."""
        return self._show(self._decoder.decode(self._tokenizer.token_bytes(token, special=self._special)))

    def finish(self) -> str:
        """What is still held back: U+FFFD for a character that never became complete."""
        return self._show(self._decoder.decode(b"", final=True))

    def _show(self, text: str) -> str:
        while text and self._strip:
            if text[0] == " ":
                text, self._strip = text[1:], self._strip - 1
            else:
                self._strip = 0
        return text
