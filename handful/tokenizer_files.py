"""The files of a tokenizer: which there are, what they say, and how they become one of the `tokenizers` library.

    read_tokenizer_files(folder)   name -> bytes of all that belongs to a tokenizer, which a checkpoint hands on
                                   unchanged
    build(files)                   tokenizer.json, tiktoken.model (Kimi-K2, Moonlight) or vocab.json and merges.txt
                                   (GPT-2, Qwen2), as a `tokenizers.Tokenizer`
    named_tokens(files)            bos_token, eos_token, … by tokenizer_config.json or special_tokens_map.json
    chat_templates(files)          the chat templates by name
    guarded(what)                  whatever the library does about a malformed file, as one DataError

No code of a checkpoint is run.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from handful.errors import DataError, first_line

__all__ = [
    "VOCABULARIES",
    "build",
    "byte_of_char",
    "chat_templates",
    "guarded",
    "has_tokenizer",
    "named_tokens",
    "read_settings",
    "read_tokenizer_files",
]

# What a tokenizer can be made from; the first that is there is taken.
VOCABULARIES = ("tokenizer.json", "tiktoken.model", "vocab.json")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
# Other forms of the same vocabulary, which other programs read: handed on, and not read here.
BESIDE = ("tokenizer.model", "spiece.model", "merges.txt", "chat_template.json", "tekken.json")

# How Qwen's tokenizer cuts a text before it merges bytes: digits one by one.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How Kimi's tokenizer cuts a text before it merges bytes: Han characters apart, digits by threes.
KIMI_WORDS = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
PANIC = "PanicException"  # pyo3's, which derives from BaseException and can be imported from nowhere
LIMIT = 1 << 28  # bytes of a file: the largest published ones have some 35 million


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer that can be read."""
    return _vocabulary(folder) is not None


def _vocabulary(folder: Path) -> str | None:
    """The file that a folder's tokenizer is made from: vocab.json alone, without merges.txt, makes none."""
    found = (name for name in VOCABULARIES if (folder / name).is_file())
    return next((name for name in found if name != "vocab.json" or (folder / "merges.txt").is_file()), None)


def read_tokenizer_files(path: Path) -> dict[str, bytes]:
    """A tokenizer's files in a folder, or beside a tokenizer.json (which may have another name). OSError if the
    vocabulary is not there, DataError for a file of absurd size."""
    if path.is_dir():
        name = _vocabulary(path) or VOCABULARIES[0]
        folder, vocabulary = path, path / name
    else:
        name = path.name if path.name in VOCABULARIES else VOCABULARIES[0]
        folder, vocabulary = path.parent, path
    found = {name: _read(vocabulary)}
    for other in (*VOCABULARIES, *SETTINGS, TEMPLATE, *BESIDE):
        if other not in found and (folder / other).is_file():
            found[other] = _read(folder / other)
    for template in sorted((folder / TEMPLATES).glob("*.jinja")):
        found[f"{TEMPLATES}/{template.name}"] = _read(template)
    return found


def _read(file: Path) -> bytes:
    if file.stat().st_size > LIMIT:
        raise DataError(f"{file}: longer than {LIMIT} bytes")
    return file.read_bytes()


def read_settings(files: Mapping[str, bytes], name: str = "tokenizer_config.json") -> dict[str, Any]:
    """A JSON file's object; {} where there is no such file. DataError if it is malformed."""
    try:
        found = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"malformed: {name}: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise DataError(f"malformed: {name}: must hold a JSON object")
    return found


def named_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """The tokens that have a role (bos_token, eos_token, pad_token, …), which chat templates know by it. What
    tokenizer_config.json says goes before special_tokens_map.json. DataError for one that is no text."""
    found = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_settings(files, file).items():
            if not key.endswith("_token") or value is None or isinstance(value, bool):  # add_bos_token is a switch
                continue
            text = value.get("content") if isinstance(value, dict) else value
            if not isinstance(text, str):
                raise DataError(f"{key} = {value!r} in {file}: a token's text")
            found[key] = text
    return found


def special_texts(files: Mapping[str, bytes]) -> list[str]:
    """The tokens that the settings call special: those with a role, and the lists of others."""
    found = list(named_tokens(files).values())
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            others = read_settings(files, file).get(key)
            for one in others if isinstance(others, list) else others.values() if isinstance(others, dict) else ():
                text = one.get("content") if isinstance(one, dict) else one
                found += [text] if isinstance(text, str) else []
    return list(dict.fromkeys(found))


def chat_templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """Jinja templates by name, the usual one "default". A file of its own goes before tokenizer_config.json's, as in
    transformers. DataError for one that is no text."""
    named: Any = read_settings(files).get("chat_template") or {}
    if isinstance(named, str):
        named = {"default": named}
    if isinstance(named, list) and all(isinstance(one, dict) for one in named):  # before there were files of their own
        named = {str(one.get("name")): one.get("template") for one in named}
    if not isinstance(named, dict) or not all(isinstance(text, str) for text in named.values()):
        raise DataError("chat_template in tokenizer_config.json: a template, or a list of templates with names")
    own = {}
    for file, content in files.items():
        if file == TEMPLATE or file.startswith(f"{TEMPLATES}/"):
            try:
                own["default" if file == TEMPLATE else Path(file).stem] = content.decode()
            except UnicodeDecodeError:
                raise DataError(f"{file}: not UTF-8") from None
    return own or named


def build(files: Mapping[str, bytes]) -> tokenizers.Tokenizer:
    """The tokenizer that the files describe. Exceptions of many kinds for malformed ones: see `guarded`."""
    if VOCABULARIES[0] in files:
        inner = tokenizers.Tokenizer.from_str(files[VOCABULARIES[0]].decode("utf-8"))
        # A token with a role is special, also where the vocabulary has it as any other.
        known = {value.content for value in inner.get_added_tokens_decoder().values()}
        plain = [text for text in special_texts(files) if text not in known and inner.token_to_id(text) is not None]
        inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in plain])
        return inner
    inner, added = _from_tiktoken(files) if "tiktoken.model" in files else _from_merges(files)
    for text, special in added.items():
        token = AddedToken(text, special=special, normalized=False)
        (inner.add_special_tokens if special else inner.add_tokens)([token])
    _frame(inner, files)
    return inner


def _from_merges(files: Mapping[str, bytes]) -> tuple[tokenizers.Tokenizer, dict[str, bool]]:
    """vocab.json and merges.txt, as GPT-2's and Qwen2's tokenizers were saved before there was a tokenizer.json; and
    its added tokens, with whether they are special."""
    kind = str(read_settings(files).get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if kind not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        raise DataError(
            f"tokenizer_class = {kind!r}: of vocab.json and merges.txt GPT2Tokenizer and Qwen2Tokenizer are read"
        )
    vocab = read_settings(files, "vocab.json")
    numbers, added = _added(files, vocab)
    lines = files["merges.txt"].decode("utf-8").split("\n")
    merges = [(a, b) for a, _, b in (line.partition(" ") for line in lines if line and not line.startswith("#version"))]
    inner = tokenizers.Tokenizer(models.BPE(vocab | numbers, merges))
    if kind == "Qwen2Tokenizer":
        inner.normalizer = normalizers.NFC()
        inner.pre_tokenizer = _words(QWEN_WORDS)
    else:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=read_settings(files).get("add_prefix_space") is True
        )
    inner.decoder = decoders.ByteLevel()
    named = {text: True for text in named_tokens(files).values() if text in vocab}
    return inner, {"<|endoftext|>": True, **named, **added} if "<|endoftext|>" in vocab else {**named, **added}


def _words(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Cut a text by a pattern, and write each piece's bytes in GPT-2's alphabet."""
    found = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert isinstance(found, pre_tokenizers.PreTokenizer)
    return found


def _from_tiktoken(files: Mapping[str, bytes]) -> tuple[tokenizers.Tokenizer, dict[str, bool]]:
    """tiktoken.model: a line for each token, its bytes in base64 and its rank. The pair of neighbours whose bytes
    together have the lowest rank is merged first, which is what a list of merges in the order of ranks says.

    Added tokens, which the file leaves out, are named by tokenizer_config.json.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(files["tiktoken.model"].splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"tiktoken.model: line {number}: a token in base64 and its rank") from None
    if len(set(ranks.values())) != len(ranks) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise DataError("tiktoken.model: a rank of its own for every token, and all 256 bytes among them")
    char_of = {byte: char for char, byte in byte_of_char().items()}

    def name(token: bytes) -> str:
        return "".join(char_of[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(a, b) for a, b in halves if a in ranks and b in ranks]
        merges += [(name(a), name(b)) for a, b in sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    vocab = {name(token): rank for token, rank in ranks.items()}
    numbers, added = _added(files, vocab)
    # A piece of text that is a token as it stands is taken whole, as tiktoken does.
    inner = tokenizers.Tokenizer(models.BPE(vocab | numbers, merges, ignore_merges=True))
    inner.pre_tokenizer = _words(KIMI_WORDS)
    inner.decoder = decoders.ByteLevel()
    return inner, added


def _added(files: Mapping[str, bytes], vocab: Mapping[str, int]) -> tuple[dict[str, int], dict[str, bool]]:
    """The tokens that are added to a vocabulary: their numbers, where it has none for them, and whether each is
    special. tokenizer_config.json has both, and added_tokens.json, which is older, the numbers."""
    numbers, special = {}, {}
    table = read_settings(files).get("added_tokens_decoder", {})
    for number, value in table.items() if isinstance(table, dict) else [("", table)]:
        text = value.get("content") if isinstance(value, dict) else None
        if not isinstance(text, str) or not number.isdecimal() or int(number) > LIMIT:
            raise DataError("added_tokens_decoder in tokenizer_config.json: numbers of tokens and their contents")
        numbers[text], special[text] = int(number), value.get("special", True) is not False
    for text, value in read_settings(files, "added_tokens.json").items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LIMIT:
            raise DataError("added_tokens.json: tokens and their numbers")
        numbers.setdefault(text, value)
        special.setdefault(text, text in named_tokens(files).values())
    taken = set(vocab.values())
    new = {text: number for text, number in numbers.items() if text not in vocab and number not in taken}
    return new, {text: flag for text, flag in special.items() if text in vocab or text in new}


def _frame(inner: tokenizers.Tokenizer, files: Mapping[str, bytes]) -> None:
    """What add_bos_token and add_eos_token say: it counts where no tokenizer.json says it."""
    settings, names = read_settings(files), named_tokens(files)
    bos, eos = (
        names.get(f"{end}_token", "") if settings.get(f"add_{end}_token") is True else "" for end in ("bos", "eos")
    )
    tokens = [(token, number) for token in (bos, eos) if token and (number := inner.token_to_id(token)) is not None]
    if tokens:
        inner.post_processor = processors.TemplateProcessing(
            single=[part for part in (bos, "$A", eos) if part], special_tokens=tokens
        )


@functools.cache
def byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


@contextlib.contextmanager
def guarded(what: str, *, quiet: bool = True) -> Iterator[None]:
    """One DataError for whatever is wrong with a tokenizer's files. The tokenizers library raises bare Exceptions, and
    at places it panics: a BaseException, and a report of its own on stderr, which `quiet` keeps from people."""
    try:
        with _quiet() if quiet else contextlib.nullcontext():
            yield
    except DataError as error:
        raise DataError(f"{what}: {error}") from None
    except OSError as error:
        raise DataError(f"{what}: {error.filename}: {error.strerror}") from None
    except Exception as error:
        raise DataError(f"{what}: malformed: {first_line(error)}") from None
    except BaseException as error:
        if type(error).__name__ != PANIC:
            raise
        raise DataError(f"{what}: malformed: {first_line(error)}") from None


_TURN = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold stderr back while a file is read: what came on it is shown, unless the library panicked."""
    with _TURN, tempfile.TemporaryFile() as held:
        try:
            sys.stderr.flush()
            kept = os.dup(2)
        except (AttributeError, OSError, ValueError):  # there is no stderr
            yield
            return
        os.dup2(held.fileno(), 2)
        shown = True
        try:
            yield
        except BaseException as error:
            shown = type(error).__name__ != PANIC
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            if shown and (said := held.read()):
                os.write(2, said)
