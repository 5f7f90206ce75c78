"""The files of a tokenizer: which there are, what they say, and how they become one of the `tokenizers` library.

    read_files(folder)       name -> bytes of all that belongs to a tokenizer, which a checkpoint hands on unchanged
    build(files)             tokenizer.json, or tiktoken.model (Kimi-K2, Moonlight), as a `tokenizers.Tokenizer`
    named_tokens(files)      bos_token, eos_token, … as tokenizer_config.json or special_tokens_map.json names them
    chat_templates(files)    the chat templates by name
    guarded(what)            whatever the library does about a malformed file, as one DataError

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
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from handful.errors import DataError, first_line

__all__ = [
    "VOCABULARIES",
    "build",
    "byte_of_char",
    "chat_templates",
    "guarded",
    "has_tokenizer",
    "named_tokens",
    "read_files",
    "read_settings",
]

# What a tokenizer can be made from; the first that is there is taken.
VOCABULARIES = ("tokenizer.json", "tiktoken.model")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
# Other forms of the same vocabulary, which other programs read: handed on, and not read here.
BESIDE = ("tokenizer.model", "vocab.json", "merges.txt", "chat_template.json", "tekken.json")

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
    return any((folder / name).is_file() for name in VOCABULARIES)


def read_files(path: Path) -> dict[str, bytes]:
    """A tokenizer's files in a folder, or beside a tokenizer.json (which may have another name). OSError if the
    vocabulary is not there, DataError for a file of absurd size."""
    if path.is_dir():
        name = next((name for name in VOCABULARIES if (path / name).is_file()), VOCABULARIES[0])
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
        return tokenizers.Tokenizer.from_str(files[VOCABULARIES[0]].decode("utf-8"))
    return _from_tiktoken(files)


def _from_tiktoken(files: Mapping[str, bytes]) -> tokenizers.Tokenizer:
    """tiktoken.model: a line for each token, its bytes in base64 and its rank. The pair of neighbours whose bytes
    together have the lowest rank is merged first, which is what a list of merges in the order of ranks says.

    Special tokens, which the file leaves out, are named by tokenizer_config.json.
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
    special = _added(files, set(ranks.values()))
    vocab = {name(token): rank for token, rank in ranks.items()}
    # A piece of text that is a token as it stands is taken whole, as tiktoken does.
    inner = tokenizers.Tokenizer(models.BPE(vocab | special, merges, ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(KIMI_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    _frame(inner, files)
    return inner


def _added(files: Mapping[str, bytes], taken: set[int]) -> dict[str, int]:
    """The special tokens that tokenizer_config.json gives their numbers, none of them a number of the vocabulary's."""
    found: dict[str, int] = {}
    table = read_settings(files).get("added_tokens_decoder", {})
    for number, value in table.items() if isinstance(table, dict) else [("", table)]:
        text = value.get("content") if isinstance(value, dict) else None
        if not isinstance(text, str) or not number.isdecimal() or int(number) > LIMIT:
            raise DataError("added_tokens_decoder in tokenizer_config.json: numbers of tokens and their contents")
        if int(number) not in taken:
            found[text] = int(number)
    return found


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
