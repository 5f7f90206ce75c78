"""Whatever stands in a tokenizer's files or in generation_config.json, reading gives a tokenizer that reads text, or
one line that names the file: no other exception, no panic of the library, nothing else on stderr."""

from __future__ import annotations

import base64
import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import moe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from public_tokenizers import KIMI, KIMI_SETTINGS, PUBLIC

from handful.chat import render
from handful.errors import CheckpointError, ConfigError, DataError
from handful.families.io import load_decoder, save
from handful.model import Decoder
from handful.origin import read_origin
from handful.text import Tokenizer, load_tokenizer
from handful.tokenizer_files import VOCABULARIES, guarded

quick = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, -1, 0, 1, 2.5, 2**31, 2**32, 2**63, 2**64, 10**400, "", "a", "<|endoftext|>", "Ġ", "▁", "☃", [], {},
     ["a", "b"], {"a": 0}, {"type": "ByteLevel"}, {"content": 3}, "(a", "\ud800"]
)  # fmt: skip
TEXTS = ["", "the cat sat", "naïve ☃ 漢字 😀\n\n  12345 ﬁ", "<|endoftext|>a</s>"]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document; of long lists and tables the first ones."""
    yield path
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items[:12]:
        yield from places(inner, (*path, key))


def changed(data: st.DataObject, document: Any, times: int = 2) -> Any:
    """The document with some values changed, taken out, cut or added."""
    document = json.loads(json.dumps(document))
    for _ in range(data.draw(st.integers(1, times))):
        *outer, last = data.draw(st.sampled_from([path for path in places(document) if path]))
        holder = document
        for key in outer:
            holder = holder[key]
        what = data.draw(st.sampled_from(["put", "put", "drop", "cut", "add"]))
        if what == "drop":
            del holder[last]
        elif what == "cut" and isinstance(holder[last], str | list):
            holder[last] = holder[last][: data.draw(st.integers(0, 3))]
        elif what == "add" and isinstance(holder, list):
            holder.append(copy.deepcopy(data.draw(VALUES)))
        else:
            holder[last] = copy.deepcopy(data.draw(VALUES))
    return document


def said(call: Callable[[], object]) -> str:
    """What is said against a file, "" for nothing. It is one line."""
    try:
        call()
    except (DataError, CheckpointError, ConfigError) as error:
        text = str(error)
    else:
        return ""
    assert text
    assert text.isprintable()
    return text


def reads_or_says(folder: Path) -> str:
    """What is said against a tokenizer, "" for nothing: it reads texts then."""

    def every() -> None:
        tokenizer = load_tokenizer(folder)
        for text in TEXTS:
            tokenizer.decode(tokenizer.encode(text))
            tokenizer.encode(text, special=True)
            tokenizer.encode_batch([text])
        name = next(name for name in VOCABULARIES if (folder / name).exists())
        assert tokenizer.files()[name] == (folder / name).read_bytes()
        assert len(tokenizer.frame) == 3

    return said(every)


DOCUMENTS = []
for _name in ("mixtral", "qwen3", "glm-4.5"):
    _inner = PUBLIC[_name].inner
    assert _inner is not None
    _document = json.loads(_inner.to_str())
    # Their vocabularies are long, and a change to one token of many says little.
    DOCUMENTS.append((_document, PUBLIC[_name].settings))


@quick
@given(st.data())
def test_a_changed_tokenizer(tmp_path: Path, capfd: pytest.CaptureFixture[str], data: st.DataObject) -> None:
    document, named = data.draw(st.sampled_from(DOCUMENTS))
    if data.draw(st.booleans()):
        document = {
            **document,
            "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 2},
        }
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(data, document)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(changed(data, dict(named))))
    reads_or_says(tmp_path)
    assert capfd.readouterr().err == ""


def charsmap(content: bytes) -> dict[str, Any]:
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}}


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"continuing_subword_prefix": "##########"}},
        charsmap(b"\x04\0\0\0abcdzz"),
        charsmap(b"\0\0\0\0"),
        {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                            "pair": [], "special_tokens": {}}},
    ],
    ids=["a prefix longer than tokens", "a table too short", "an empty table", "a token without a number"],
)  # fmt: skip
def test_a_panic_of_the_library_is_one_line(
    change: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    document, _ = DOCUMENTS[1]
    model = {**document["model"], **change.get("model", {})}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**document, **change, "model": model}))
    assert reads_or_says(tmp_path).startswith(f"tokenizer {str(tmp_path)!r}: malformed: ")
    assert capfd.readouterr().err == ""


def test_a_panic_at_a_later_text_is_one_line_too() -> None:
    """A table may panic at one character alone."""
    inner = PUBLIC["qwen3"].inner
    assert inner is not None

    class Panicking:
        def encode(self, *_: object, **__: object) -> None:
            raise type("PanicException", (BaseException,), {})("index out of bounds\nand where")

        encode_batch_fast = encode

    tokenizer = Tokenizer(inner, "<|im_end|>")
    tokenizer._plain = Panicking()  # type: ignore[assignment]
    for call in (lambda: tokenizer.encode("x"), lambda: tokenizer.encode_batch(["x"])):
        with pytest.raises(DataError, match=r"^tokenizer: malformed: index out of bounds$"):
            call()

    class Leaving:
        def encode(self, *_: object, **__: object) -> None:
            raise KeyboardInterrupt

    tokenizer._plain = Leaving()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("x")


def test_what_a_library_says_while_it_reads_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is held back is a panic's own report alone."""
    with guarded("x"):
        os.write(2, b"a warning\n")
    assert capfd.readouterr().err == "a warning\n"


SETTINGS_FILES: dict[str, Any] = {
    "tokenizer_config.json": {
        **PUBLIC["qwen3"].settings,
        "pad_token": "<|endoftext|>",
        "chat_template": "{{ messages }}",
    },
    "special_tokens_map.json": {"eos_token": "<|im_end|>", "unk_token": {"content": "<|endoftext|>", "lstrip": False}},
    "config.json": {"model_type": "qwen3_moe", "eos_token_id": 3},
}


@quick
@given(st.data())
def test_changed_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str], data: st.DataObject) -> None:
    PUBLIC["qwen3"].write(tmp_path)
    for name, document in SETTINGS_FILES.items():
        text = json.dumps(changed(data, document))
        cut = data.draw(st.one_of(st.just(len(text)), st.integers(0, len(text))))
        (tmp_path / name).write_text(data.draw(st.sampled_from([text[:cut], text, "[]", "null", '"x"', "\ufeff{}"])))
    reads_or_says(tmp_path)
    assert capfd.readouterr().err == ""


@quick
@given(st.data())
def test_a_changed_tiktoken_file(tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(changed(data, KIMI_SETTINGS)))
    content = bytearray(KIMI.encode())
    for _ in range(data.draw(st.integers(0, 2))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.sampled_from([0, 10, 32, 48, 57, 65, 255]))
    (tmp_path / "tiktoken.model").write_bytes(content)
    reads_or_says(tmp_path)


@quick
@given(st.data())
def test_changed_merges(tmp_path: Path, data: st.DataObject) -> None:
    public = PUBLIC["qwen2 without tokenizer.json"]
    public.write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(changed(data, dict(public.settings))))
    (tmp_path / "added_tokens.json").write_text(json.dumps(changed(data, {"<a>": 290, "<b>": 291})))
    vocab = json.loads(public.files["vocab.json"])
    (tmp_path / "vocab.json").write_text(json.dumps(changed(data, vocab)))
    lines = public.files["merges.txt"].splitlines()
    lines[data.draw(st.integers(0, len(lines) - 1))] = data.draw(st.sampled_from(["", "a", "a b c", "t h", "☃ ☃", " "]))
    (tmp_path / "merges.txt").write_text("\n".join(lines))
    reads_or_says(tmp_path)


@quick
@given(st.data())
def test_a_changed_generation_config(tmp_path: Path, data: st.DataObject) -> None:
    document = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1,
                "repetition_penalty": 1.1, "eos_token_id": [1, 2], "bos_token_id": 0}  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps(changed(data, document, times=3)))
    config = changed(data, {"eos_token_id": [1, 2], "router_aux_loss_coef": 0.01})

    def read() -> None:
        found = read_origin(tmp_path, config)
        assert all(type(token) is int for token in found.stop_ids)

    text = said(read)
    assert not text or "generation_config.json" in text or "config.json: eos_token_id" in text


@quick
@given(st.data())
def test_any_template_renders_or_says_why(tmp_path: Path, data: st.DataObject) -> None:
    source = data.draw(
        st.lists(
            st.sampled_from(["{{", "}}", "{%", "%}", " messages ", " for m in ", "endfor", " if ", "endif", "'x'", "|",
                             "[0]", ".role", " tojson ", "(", ")", "\n", "set x = ", "- ", "1", "%", "*", "{#"]),
            max_size=14,
        )
    )  # fmt: skip
    inner = PUBLIC["qwen3"].inner
    assert inner is not None
    tokenizer = Tokenizer(inner, "<|im_end|>")
    said(lambda: render(tokenizer, [{"role": "user", "content": "x"}], template="".join(source)))


def test_a_model_with_a_malformed_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    save(Decoder(moe(vocab=400)), tmp_path)
    document, _ = DOCUMENTS[1]
    (tmp_path / "tokenizer.json").write_text(json.dumps({**document, **charsmap(b"\0\0\0\0")}))
    with pytest.raises(DataError, match=r"^tokenizer .*: malformed: "):
        load_decoder(tmp_path)
