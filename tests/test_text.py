"""The tokenizer: training, other people's files, exact round trips, and decoding one token at a time."""

from __future__ import annotations

import json
from pathlib import Path

import fresh
import huggingface_hub
import pytest
import tokenizers
from huggingface_hub.errors import EntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from handful.errors import ConfigError, DataError
from handful.text import END_OF_TEXT, Tokenizer, load_tokenizer, train_tokenizer

TEXTS = ["def f(x):\n    return x + 1\n", "def g(x):\n    return f(x) * 2  # naïve ☃ 😀\n"] * 20


def byte_fallback() -> tokenizers.Tokenizer:
    """A small one of Mixtral's kind: ▁ for spaces, one put before the text, <0xNN> for bytes, <s> by template."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    vocab = {name: number for number, name in enumerate(names)}
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return inner


BYTE_LEVEL = train_tokenizer(TEXTS, 300)
BYTE_FALLBACK = Tokenizer(byte_fallback(), "</s>")
# SentencePiece writes a space as ▁, and cannot tell it from a ▁ of the text.
WITHOUT_MARK = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="▁"))
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])


def test_training_by_hand() -> None:
    # Words "abab" and " abab": a+b occurs four times, and is merged first; ab+ab twice; " "+abab once: too rare.
    tokenizer = train_tokenizer(["abab abab"], 300)
    assert tokenizer.vocab_size == 259
    assert (tokenizer.eos, tokenizer.eos_id) == (END_OF_TEXT, 0)
    assert [tokenizer.token_bytes(token) for token in (257, 258)] == [b"ab", b"abab"]
    assert tokenizer.encode("ababab") == [258, 257]


def test_training_is_deterministic() -> None:
    first, second = (train_tokenizer(TEXTS, 280) for _ in range(2))
    assert first.files() == second.files()
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 280
    assert first.fingerprint != train_tokenizer(TEXTS, 281).fingerprint


def test_too_small_a_vocabulary() -> None:
    assert train_tokenizer(TEXTS, 257).vocab_size == 257
    with pytest.raises(ConfigError, match=r"vocab = 256: at least 257"):
        train_tokenizer(TEXTS, 256)


@BOTH
@given(text=WITHOUT_MARK)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "a"]) == [ids, tokenizer.encode("a")]
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@given(text=st.text())
def test_token_bytes_are_the_bytes_of_the_text(text: str) -> None:
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text
    assert b"".join(map(BYTE_LEVEL.token_bytes, BYTE_LEVEL.encode(text))) == text.encode()


@given(ids=st.lists(st.integers(0, 299)))
def test_stream_of_any_tokens_is_what_the_library_decodes(ids: list[int]) -> None:
    library = tokenizers.Tokenizer.from_str(BYTE_LEVEL.to_str())
    for special in (False, True):
        stream = BYTE_LEVEL.stream(special=special)
        shown = "".join(stream.push(token) for token in ids) + stream.finish()
        assert shown == library.decode(ids, skip_special_tokens=not special)
        assert shown == BYTE_LEVEL.decode(ids, special=special)


@given(text=st.text(alphabet=st.sampled_from("ab é😀▁"), max_size=30))
def test_byte_fallback_is_what_the_library_decodes(text: str) -> None:
    ids = BYTE_FALLBACK.encode(text)
    assert BYTE_FALLBACK.decode(ids) == byte_fallback().decode(ids)


@BOTH
@given(text=WITHOUT_MARK, cut=st.integers(0, 100))
def test_stream_after_a_prompt_continues_it(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text)
    before, stream = tokenizer.stream(), tokenizer.stream(after=ids[:cut])
    prompt = "".join(map(before.push, ids[:cut]))
    assert prompt + "".join(map(stream.push, ids[cut:])) + stream.finish() == text


def test_unfinished_characters_are_held_back() -> None:
    ids = [BYTE_LEVEL.encode("a")[0], *train_tokenizer(["x"], 257).encode("😀")]
    assert len(ids) == 5
    stream = BYTE_LEVEL.stream()
    assert [stream.push(token) for token in ids] == ["a", "", "", "", "😀"]
    stream = BYTE_LEVEL.stream()
    assert [stream.push(token) for token in ids[:3]] == ["a", "", ""]
    assert stream.finish() == "\ufffd"
    assert BYTE_LEVEL.pieces(ids) == ["a", "", "", "", "😀"]
    assert BYTE_LEVEL.pieces(ids[:3]) == ["a", "", "\ufffd"]
    assert BYTE_LEVEL.pieces([]) == []
    # A prompt that ends within a character: the first new token shows the whole of it.
    assert BYTE_LEVEL.stream(after=ids[:4]).push(ids[4]) == "😀"


@given(ids=st.lists(st.integers(0, 299)))
def test_pieces_join_to_the_text(ids: list[int]) -> None:
    pieces = BYTE_LEVEL.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == BYTE_LEVEL.decode(ids, special=True)


def test_a_text_that_spells_a_special_token_is_text() -> None:
    text = f"a{END_OF_TEXT}b"
    plain = BYTE_LEVEL.encode(text)
    assert BYTE_LEVEL.eos_id not in plain
    assert BYTE_LEVEL.decode(plain) == text
    assert BYTE_LEVEL.encode_batch([text]) == [plain]
    read = BYTE_LEVEL.encode(text, special=True)
    end, a, b = BYTE_LEVEL.eos_id, BYTE_LEVEL.encode("a"), BYTE_LEVEL.encode("b")
    assert read == [end, *a, end, *b]  # what stands before any text, and the text
    assert BYTE_LEVEL.encode_rendered(text) == read[1:]
    assert BYTE_LEVEL.decode(read) == "ab"
    assert BYTE_LEVEL.decode(read, special=True) == END_OF_TEXT + text


def test_byte_fallback_by_hand() -> None:
    vocab = byte_fallback().get_vocab()
    ab, a, space = vocab["▁ab"], vocab["a"], vocab["▁"]
    assert BYTE_FALLBACK.encode("ab é") == [ab, space, 3 + 0xC3, 3 + 0xA9]
    assert BYTE_FALLBACK.encode("ab", special=True) == [1, ab]
    assert BYTE_FALLBACK.token_bytes(ab) == b" ab"
    # Only the space that was put before the text is taken away, and not in the middle of it.
    assert BYTE_FALLBACK.decode([space, ab]) == " ab"
    assert BYTE_FALLBACK.stream(after=[a]).push(ab) == " ab"


def test_tokens_outside_the_byte_alphabet_stand_for_their_names() -> None:
    inner = tokenizers.Tokenizer.from_str(BYTE_LEVEL.to_str())
    inner.add_tokens(["éé"])
    added = Tokenizer(inner, END_OF_TEXT)
    assert added.encode("aéé") == [*added.encode("a"), 290]
    assert added.decode([290]) == "éé"  # the characters, not the bytes that they stand for in GPT-2's alphabet
    inner = tokenizers.Tokenizer(models.BPE({"☃": 0, END_OF_TEXT: 1, "Ġ": 2}, []))
    inner.decoder = decoders.ByteLevel()
    assert Tokenizer(inner, END_OF_TEXT).decode([2, 0]) == inner.decode([2, 0]) == " ☃"


def test_ids_without_a_token_are_nothing() -> None:
    assert BYTE_LEVEL.decode([300, 10**6]) == ""
    assert BYTE_LEVEL.token_bytes(-1) == b""
    assert BYTE_LEVEL.token_bytes(0) == END_OF_TEXT.encode()
    assert BYTE_LEVEL.token_bytes(0, special=False) == b""


@pytest.mark.parametrize("as_folder", [True, False])
def test_save_and_load(tmp_path: Path, as_folder: bool) -> None:
    path = tmp_path if as_folder else tmp_path / "tokenizer.json"
    BYTE_LEVEL.save(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == BYTE_LEVEL.files()
    again = load_tokenizer(path)
    assert again.fingerprint == BYTE_LEVEL.fingerprint
    assert again.files() == BYTE_LEVEL.files()
    assert again.encode(TEXTS[1]) == BYTE_LEVEL.encode(TEXTS[1])


def test_transformers_reads_the_same_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    # A model type whose own tokenizer class would cut words otherwise, were the saved settings not to say which to use.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    BYTE_LEVEL.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = TEXTS[1] + " , 12345 !\r\n\r\n" + END_OF_TEXT
    assert theirs(text).input_ids == BYTE_LEVEL.encode(text, special=True)
    assert theirs.eos_token_id == BYTE_LEVEL.eos_id
    assert theirs.decode(theirs(text).input_ids) == END_OF_TEXT + text


def test_a_file_that_cuts_and_pads_is_read_whole(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_str(BYTE_LEVEL.to_str())
    inner.enable_truncation(3)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(TEXTS[0]) == BYTE_LEVEL.encode(TEXTS[0])


def test_the_end_of_text_token(tmp_path: Path) -> None:
    byte_fallback().save(str(tmp_path / "tokenizer.json"))
    settings = tmp_path / "tokenizer_config.json"
    assert load_tokenizer(tmp_path).eos == "</s>"  # by its usual name
    for named in ("<s>", {"content": "<s>", "lstrip": False}):
        settings.write_text(json.dumps({"eos_token": named}))
        assert (load_tokenizer(tmp_path).eos, load_tokenizer(tmp_path).eos_id) == ("<s>", 1)
    assert load_tokenizer(tmp_path).fingerprint != BYTE_FALLBACK.fingerprint
    settings.write_text(json.dumps({"eos_token": "<nope>"}))
    with pytest.raises(DataError, match=r"eos_token = '<nope>' in tokenizer_config\.json: a token of tokenizer\.json"):
        load_tokenizer(tmp_path)
    inner = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    inner.decoder = decoders.ByteLevel()
    inner.save(str(tmp_path / "tokenizer.json"))
    settings.unlink()
    with pytest.raises(DataError, match="no end-of-text token is known"):
        load_tokenizer(tmp_path)


def test_what_cannot_be_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'nowhere': no such file or folder"):
        load_tokenizer("nowhere")
    with pytest.raises(DataError, match=r"tokenizer\.json: No such file"):
        load_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    for content in (b"{", b"{}", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(DataError, match="malformed"):
            load_tokenizer(file)
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, END_OF_TEXT: 1}))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(file))
    with pytest.raises(DataError, match="a byte-level or byte-fallback one is needed"):
        load_tokenizer(file)


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    BYTE_LEVEL.save(tmp_path)
    asked: list[tuple[str, str | None]] = []

    def download(
        repository: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        asked.append((repository, revision))
        if not list(tmp_path.iterdir()):
            raise EntryNotFoundError("it is not there\nand more lines")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name in ("org/name", "org/name@v1.0", "org/name@refs/pr/3"):
        assert load_tokenizer(name).fingerprint == BYTE_LEVEL.fingerprint
        assert capsys.readouterr().err.startswith(f"{name}: no such folder here; looking for it ")
    assert asked == [("org/name", None), ("org/name", "v1.0"), ("org/name", "refs/pr/3")]
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"^tokenizer org/name: no such folder, and it .* downloaded: it is not there$"):
        load_tokenizer("org/name")


def test_the_hub_is_imported_only_when_asked_for() -> None:
    code = "import sys, handful.text; sys.exit('huggingface_hub' in sys.modules)"
    assert fresh.python("-c", code).returncode == 0
