"""Text to tokens and back: byte-level BPE, other people's tokenizers, and decoding one token at a time.

A tokenizer here is a `tokenizer.json` of the Hugging Face kind that can write any byte: byte-level BPE (GPT-2, OLMoE,
Qwen, DeepSeek, gpt-oss, and those trained here) or BPE with byte fallback (Mixtral). So no text is out of reach, and
the bytes that a token stands for can be counted. What is trained here gives every text back exactly. T5's kind, which
has no tokens for some characters, is taken where one says so.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from handful.checkpoint import write_file
from handful.errors import ConfigError, DataError

__all__ = ["END_OF_TEXT", "SMALLEST_VOCAB", "Stream", "Tokenizer", "load_tokenizer", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257  # one token per byte, and END_OF_TEXT

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
    return Tokenizer(inner, END_OF_TEXT)


def load_tokenizer(source: str | Path, *, any_text: bool = True) -> Tokenizer:
    """Load a tokenizer from a `tokenizer.json`, a folder that holds one, or a model `org/name` on the Hugging Face Hub.

    The end-of-text token is the `eos_token` of the `tokenizer_config.json` beside it, or else the first of the usual
    names that the tokenizer knows. DataError when there is no such file, it is malformed, or it cannot write any byte
    (with `any_text=False` it need not: T5's, which reads a character that it does not know as "<unk>").
    """
    path = Path(source)
    if os.path.exists(path):
        file = _tokenizer_file(path)
        settings: Path | None = file.with_name("tokenizer_config.json")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        file, settings = _download(str(source))
    else:
        raise DataError(f"tokenizer {str(source)!r}: no such file or folder, and not an org/name")
    try:
        inner = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        config = json.loads(settings.read_text(encoding="utf-8")) if settings and settings.is_file() else {}
        return Tokenizer(inner, _end_of_text(inner, config), any_text=any_text)
    except DataError as error:
        raise DataError(f"tokenizer {str(source)!r}: {error}") from None
    except OSError as error:
        raise DataError(f"tokenizer {str(source)!r}: {error.filename}: {error.strerror}") from None
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise DataError(f"tokenizer {str(source)!r}: malformed: {_first_line(error)}") from None


def _tokenizer_file(path: Path) -> Path:
    return path / "tokenizer.json" if path.is_dir() else path


def _download(repository: str) -> tuple[Path, Path | None]:
    """tokenizer.json of a model on the hub, and its tokenizer_config.json where it has one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = Path(hf_hub_download(repository, "tokenizer.json"))
    except (EntryNotFoundError, OSError, ValueError) as error:
        raise DataError(f"tokenizer {repository!r}: not a path, and from the hub: {_first_line(error)}") from None
    try:
        return file, Path(hf_hub_download(repository, "tokenizer_config.json"))
    except (EntryNotFoundError, OSError):
        return file, None


def _end_of_text(inner: tokenizers.Tokenizer, config: dict[str, Any]) -> str:
    named = config.get("eos_token")
    end = named["content"] if isinstance(named, dict) else named
    if end is None:
        end = next((name for name in _END_NAMES if inner.token_to_id(name) is not None), None)
    if end is None:
        raise DataError("no end-of-text token is known: name it as eos_token in tokenizer_config.json")
    if not isinstance(end, str) or inner.token_to_id(end) is None:
        raise DataError(f"eos_token = {end!r} in tokenizer_config.json: a token of tokenizer.json")
    return end


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _bytes_of_byte_level(token: str) -> bytes:
    alphabet = _byte_of_char()
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

    eos, eos_id    the token that ends every document, and stands between two of them.
    vocab_size     ids that a model must have rows for: the largest id + 1.
    fingerprint    a hash of the content and of eos: the same for the same tokenizer, wherever it was loaded from.
    """

    def __init__(self, inner: tokenizers.Tokenizer, eos: str, *, any_text: bool = True) -> None:
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

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, eos={self.eos!r}, fingerprint={self.fingerprint!r})"

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens of a text.

        special   read special tokens that the text spells (a rendered chat template), and add those that the
                  tokenizer's own template puts around a text (Mixtral's `<s>`). Without it, text is only text.
        """
        inner = self._template if special else self._plain
        return inner.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        # TOKENIZERS_PARALLELISM stays as it is: unset, the library uses all cores here and one in a forked child;
        # set to "true", a forked child would wait for ever for threads that the fork did not copy.
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
        return self._table[token] if 0 <= token < len(self._table) else b""

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

    def files(self) -> dict[str, str]:
        """What a checkpoint folder keeps of a tokenizer: file name -> content. transformers' AutoTokenizer reads it."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos,
            "clean_up_tokenization_spaces": False,
        }
        return {
            "tokenizer.json": self._template.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }

    def save(self, path: str | Path) -> None:
        """Write `path`, a tokenizer.json or a folder to put it in, and tokenizer_config.json beside it.

        Each appears whole or not at all.
        """
        file = _tokenizer_file(Path(path))
        content = self.files()
        write_file(file, content["tokenizer.json"])
        write_file(file.with_name("tokenizer_config.json"), content["tokenizer_config.json"])

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        added = self._template.get_added_tokens_decoder()
        return frozenset(token for token, value in added.items() if value.special)

    @functools.cached_property
    def _table(self) -> list[bytes]:
        added = self._template.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        for token, number in self._template.get_vocab(with_added_tokens=True).items():
            table[number] = added[number].content.encode() if number in added else self._to_bytes(token)
        return table


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
