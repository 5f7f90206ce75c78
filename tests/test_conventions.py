"""What public models' own files say of prompts, ends and sampling: followed to the token, as transformers does, and
handed on unchanged when a model is saved, trained on or upcycled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from builders import dense, moe, training, write_text
from hypothesis import given
from hypothesis import strategies as st
from public_tokenizers import KIMI_SETTINGS, KIMI_SPECIALS, PUBLIC, RANKS, Public, byte_level, framed

from handful import checkpoint
from handful.config import BalanceConfig
from handful.data import load_data
from handful.engine import Engine, Request
from handful.errors import CheckpointError, DataError, HandfulError
from handful.families.io import load, load_decoder, save
from handful.generate import sampling_of, stop_ids, text_request
from handful.model import Decoder
from handful.sampling import Sampler, Sampling
from handful.settings import training_settings
from handful.text import END_OF_TEXT, Tokenizer, load_tokenizer, train_tokenizer
from handful.tokenizer_files import KIMI_WORDS
from handful.train import train
from handful.upcycle import upcycle

ALL = pytest.mark.parametrize("name", PUBLIC)


def model_of(public: Public, folder: Path, **generation: Any) -> Decoder:
    """A small model in a folder with that tokenizer."""
    save(Decoder(moe(vocab=400)), folder)
    public.write(folder)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_decoder(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Before and after a text.


@ALL
def test_a_prompt_is_what_transformers_makes_of_it(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    public = PUBLIC[name]
    theirs, model = AutoTokenizer.from_pretrained(public.write(tmp_path / "t")), model_of(public, tmp_path / "m")
    tokenizer = model.tokenizer
    assert tokenizer is not None
    for text in ("the cat", "", "the cat sat\n", "naïve ☃ 1234", "the<|im_end|>cat <tool_call> on<tool>"):
        right = theirs(text).input_ids
        assert tokenizer.encode(text, special=True) == right
        without = right[: len(right) - len(tokenizer.suffix)]
        assert tokenizer.encode_prompt(text) == without  # an end after it would end it
        if without:
            assert text_request(model, text).prompt == without
    first = tokenizer.encode_prompt("the cat")
    named = [tokenizer.token_bytes(token).decode() for token in first[: len(public.before)]]
    assert tuple(named) == public.before
    assert tokenizer.named["eos_token"] == theirs.eos_token
    assert tokenizer.named.get("bos_token") == theirs.bos_token


@ALL
def test_what_begins_a_text_is_not_said_twice(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(PUBLIC[name].write(tmp_path))
    spelled = "".join(PUBLIC[name].before)
    once = tokenizer.encode_prompt("the cat")
    again = tokenizer.encode_prompt(spelled + "the cat")
    assert again[: len(tokenizer.prefix)] == list(tokenizer.prefix)
    for token in tokenizer.prefix:
        assert again.count(token) == once.count(token) == 1
    assert tokenizer.encode_rendered(spelled) == list(tokenizer.prefix)


@given(
    before=st.lists(st.sampled_from(["<a>", "<b>", "<eos>"]), max_size=3),
    after=st.lists(st.sampled_from(["<a>", "<eos>"]), max_size=2),
)
def test_any_template_is_read_as_the_library_applies_it(before: list[str], after: list[str]) -> None:
    inner = framed(byte_level(["<a>", "<b>", "<eos>"]), before, after)
    tokenizer = Tokenizer(inner, "<eos>")
    assert tokenizer.encode("the cat", special=True) == inner.encode("the cat").ids
    number = inner.token_to_id
    assert tokenizer.prefix == tuple(map(number, before))
    assert tokenizer.suffix == tuple(map(number, after))
    first, opening, closing = tokenizer.frame
    eos = (tokenizer.eos_id,)
    assert closing[-1:] == eos  # a document ends
    assert opening in ((), tokenizer.prefix)
    assert (*first, *opening) != ()  # its first token follows something
    assert first in ((), eos)


def test_documents_are_framed_as_the_tokenizer_says(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", documents=6)
    rows = {}
    for name in ("mixtral", "qwen3", "glm-4.5"):
        folder = PUBLIC[name].write(tmp_path / name)
        data = load_data(str(text), tokenizer=str(folder), cache=tmp_path / "cache")
        tokens, tokenizer = data.heldout.tolist(), data.tokenizer
        ends = [at for at, token in enumerate(tokens) if token == tokenizer.eos_id]
        rows[name] = (tokens, tokenizer, ends)
        assert ends[-1] == len(tokens) - 1
    tokens, tokenizer, ends = rows["mixtral"]
    begins = [at for at, token in enumerate(tokens) if token == tokenizer.prefix[0]]
    assert begins == [0, *(at + 1 for at in ends[:-1])]
    tokens, tokenizer, ends = rows["glm-4.5"]
    assert tokens[:2] == list(tokenizer.prefix)
    assert tokens[ends[0] + 1 : ends[0] + 3] == list(tokenizer.prefix) or ends[0] == len(tokens) - 1
    tokens, tokenizer, ends = rows["qwen3"]
    assert ends[0] == 0  # the first document follows an end, as all others do


def test_ours_begin_after_the_end_of_text(tmp_path: Path) -> None:
    ours = train_tokenizer(["def f(x):\n    return x\n"] * 3, 300)
    assert ours.prefix == (ours.eos_id,)
    assert ours.encode_prompt("def") == [ours.eos_id, *ours.encode("def")]
    assert ours.frame == ((ours.eos_id,), (), (ours.eos_id,))
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.prefix, again.frame, again.named) == (ours.prefix, ours.frame, ours.named)
    assert again.named == {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}


def test_special_tokens_map_is_read(tmp_path: Path) -> None:
    public = PUBLIC["qwen3"]
    public.write(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_start|>"}, "pad_token": "<|endoftext|>"})
    )
    assert load_tokenizer(tmp_path).named["eos_token"] == "<|im_end|>"  # tokenizer_config.json goes before it
    assert load_tokenizer(tmp_path).named["pad_token"] == "<|endoftext|>"
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).eos == "<|im_start|>"


def test_the_end_of_text_by_its_number(tmp_path: Path) -> None:
    """No file of the tokenizer names it, and config.json has its id."""
    inner = byte_level(["<fin>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no end-of-text token is known"):
        load_tokenizer(tmp_path)
    for named in (inner.token_to_id("<fin>"), [inner.token_to_id("<fin>"), 3]):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": named}))
        assert load_tokenizer(tmp_path).eos == "<fin>"


# ---------------------------------------------------------------------------------------------------------------------
# Kimi's vocabulary, beside tiktoken itself.


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, tiktoken.Encoding]:
    folder = PUBLIC["kimi-k2"].write(tmp_path_factory.mktemp("kimi"))
    ranks = {token: rank for rank, token in enumerate(RANKS)}
    specials = {name: number for number, name in KIMI_SPECIALS.items()}
    library = tiktoken.Encoding("kimi", pat_str=KIMI_WORDS, mergeable_ranks=ranks, special_tokens=specials)
    return load_tokenizer(folder), library


@given(text=st.text(alphabet=st.sampled_from("the catTHE'slD 漢字ñ☃😀\n\r\t 0123456789.,!#")) | st.text())
def test_kimi_is_what_tiktoken_makes_of_a_text(kimi: tuple[Tokenizer, tiktoken.Encoding], text: str) -> None:
    ours, library = kimi
    assert ours.encode(text) == library.encode(text, disallowed_special=())
    assert ours.encode_rendered(f"{text}<|im_end|>") == library.encode(f"{text}<|im_end|>", allowed_special="all")
    assert ours.decode(ours.encode(text)) == text


def test_kimi_by_hand(kimi: tuple[Tokenizer, tiktoken.Encoding], tmp_path: Path) -> None:
    ours, _ = kimi
    number = {token: rank for rank, token in enumerate(RANKS)}
    assert ours.encode("the cat") == [number[b"the"], number[b" cat"]]
    assert (ours.eos, ours.eos_id, ours.prefix) == ("[EOS]", len(RANKS) + 1, ())
    assert ours.vocab_size == len(RANKS) + 8  # the largest number that is named
    public = PUBLIC["kimi-k2"]
    framing = Public(None, {**KIMI_SETTINGS, "add_bos_token": True}, files=public.files)
    assert load_tokenizer(framing.write(tmp_path / "bos")).prefix == (len(RANKS),)
    for number_of_line, content in enumerate(("dGhl", "dGhl x", "!! 3", "dGhl 1\ndGg= 1"), 1):
        broken = Public(None, KIMI_SETTINGS, files={"tiktoken.model": content})
        with pytest.raises(DataError, match=r"tiktoken\.model: (line 1|a rank of its own)"):
            load_tokenizer(broken.write(tmp_path / str(number_of_line)))
    broken = Public(None, {**KIMI_SETTINGS, "added_tokens_decoder": {"x": 1}}, files=public.files)
    with pytest.raises(DataError, match="added_tokens_decoder"):
        load_tokenizer(broken.write(tmp_path / "table"))


# ---------------------------------------------------------------------------------------------------------------------
# Ends and sampling.


QWEN = PUBLIC["qwen3"]


def test_an_answer_ends_with_any_of_the_tokens_that_are_named(tmp_path: Path) -> None:
    model = model_of(QWEN, tmp_path, eos_token_id=[7, 8])
    assert model.tokenizer is not None
    values = json.loads((tmp_path / "config.json").read_text())
    for named, also in ((9, [9]), ([9, 8], [9, 8]), (None, []), (-1, [])):
        (tmp_path / "config.json").write_text(json.dumps({**values, "eos_token_id": named}))
        found = load_decoder(tmp_path)
        assert set(stop_ids(found)) == {model.tokenizer.eos_id, *also, 7, 8}
        assert set(text_request(found, "the").stop_tokens) == set(stop_ids(found))
    for wrong in ("</s>", [1, "2"], True, 1.5, "\ud800"):
        (tmp_path / "config.json").write_text(json.dumps({**values, "eos_token_id": wrong}))
        with pytest.raises(CheckpointError, match=r"^config\.json: eos_token_id = .*: a token's number, or") as caught:
            load(tmp_path)
        assert str(caught.value).isprintable()


def says(model: Decoder, token: int) -> None:
    """Make a model say one token, whatever it reads."""
    with torch.no_grad():
        model.embed.weight.fill_(0.01)
        model.embed.weight[token] = 1.0
        model.norm.weight.fill_(1.0)
        for name, parameter in model.named_parameters():
            if name.startswith("layers."):
                parameter.zero_()


@pytest.mark.parametrize("word", ["<|im_start|>", "<|endoftext|>"])
def test_a_stop_text_that_is_a_special_token(word: str, tmp_path: Path) -> None:
    """Its text is never shown, and so never seen: the token itself is what stops."""
    model = model_of(QWEN, tmp_path)
    assert model.tokenizer is not None
    token = model.tokenizer.special_id(word)
    assert token is not None
    assert model.tokenizer.special_id("the") is None
    says(model, token)
    prompt = model.tokenizer.encode_prompt("the cat")
    greedy = Sampling(temperature=0)
    (without, stopped, by_number) = Engine(model).run(
        [
            Request(prompt=prompt, max_tokens=3, sampling=greedy),
            Request(prompt=prompt, max_tokens=3, sampling=greedy, stop=["never", word]),
            Request(prompt=prompt, max_tokens=3, sampling=greedy, stop_tokens=[token]),
        ]
    )
    assert (without.made, without.finish) == ([token] * 3, "length")
    for job in (stopped, by_number):
        assert (job.made, job.finish) == ([], "stop")


@pytest.mark.parametrize(
    ("asked", "right"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
         Sampling(temperature=0.6, top_k=20, top_p=0.95)),
        ({"do_sample": True}, Sampling(temperature=1.0, top_p=1.0)),
        ({"temperature": 1}, Sampling(temperature=1.0, top_p=1.0)),
        ({"do_sample": False, "temperature": 0.7}, Sampling(temperature=0.0, top_p=1.0)),
        ({"do_sample": True, "repetition_penalty": 1.05, "min_p": 0.1, "top_k": None},
         Sampling(temperature=1.0, top_p=1.0, min_p=0.1, repetition_penalty=1.05)),
        ({"_from_model_config": True, "eos_token_id": 2, "transformers_version": "4.36"}, Sampling()),
    ],
)  # fmt: skip
def test_sampling_as_the_checkpoint_asks(asked: dict[str, Any], right: Sampling, tmp_path: Path) -> None:
    model = model_of(QWEN, tmp_path, **asked)
    assert sampling_of(model) == right
    assert text_request(model, "the").sampling == right
    mine = Sampling(temperature=0)
    assert text_request(model, "the", sampling=mine).sampling == mine


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"temperature": "hot"}, "temperature = 'hot': a number"),
        ({"top_k": 2.5}, "top_k = 2.5: a number"),
        ({"top_p": 0}, "top_p = 0: above 0, at most 1"),
        ({"temperature": True}, "temperature = True: a number"),
        ({"eos_token_id": {}}, r"eos_token_id = \{\}: a token's number, or a list of them"),
    ],
)
def test_a_malformed_generation_config(asked: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^generation_config\.json: {message}"):
        model_of(QWEN, tmp_path, **asked)


def test_no_penalty_for_what_stands_before_and_what_ends() -> None:
    logits_V = torch.tensor([2.0, 2.0, 1.9, 0.0])
    sampling = Sampling(temperature=0, repetition_penalty=2.0)
    device = torch.device("cpu")
    assert Sampler(sampling, [0, 1], device)(logits_V) == 2
    assert Sampler(sampling, [0, 1], device, spared=[0])(logits_V) == 0
    drawn = Sampler(sampling, [], device, spared=[0])
    assert [drawn(logits_V) for _ in range(3)] == [0, 0, 0]  # an end that did not end it may come again
    assert Sampler(sampling, [0], device, spared=[0])(logits_V) == 0


def test_penalties_are_those_of_transformers(tmp_path: Path) -> None:
    """Of every token that came, where none stands before a text."""
    from transformers import AutoModelForCausalLM

    model = model_of(QWEN, tmp_path)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = [5, 6, 7, 5]
    made = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False, repetition_penalty=1.4, eos_token_id=None
    )
    asked = Request(prompt=prompt, max_tokens=8, sampling=Sampling(temperature=0, repetition_penalty=1.4))
    assert Engine(model).run([asked])[0].made == made[0, 4:].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is lost.

KEPT = {"generation_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json", "merges.txt"}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A checkpoint with all that public ones have beside their weights."""
    folder = tmp_path / "published"
    model_of(PUBLIC["mixtral"], folder, bos_token_id=1, eos_token_id=[2, 5], do_sample=True, temperature=0.7)
    settings_of = json.loads((folder / "tokenizer_config.json").read_text())
    more = {"pad_token": "<unk>", "unk_token": "<unk>", "model_max_length": 32768, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings_of, **more}, indent=4))
    (folder / "special_tokens_map.json").write_text('{"bos_token":  "<s>"}')
    (folder / "chat_template.jinja").write_text("{{ messages }} here\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("{{ documents }}")
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    values = json.loads((folder / "config.json").read_text())
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    more = {
        "router_aux_loss_coef": 0.003,
        "unsloth_version": "2025.1",
        "_name_or_path": "org/name",
        "id2label": {"0": "A"},
    }
    (folder / "config.json").write_text(json.dumps({**values, **ids, **more}))
    return folder


def handed_on(old: Path, new: Path) -> None:
    """All files but the weights and the config.json are there, byte for byte."""
    files = [path.relative_to(old) for path in old.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert {"rag.jinja", "tokenizer.json", *KEPT} <= {file.name for file in files}
    for file in files:
        if file.name != "config.json":
            assert (new / file).read_bytes() == (old / file).read_bytes(), file


def test_saved_again(published: Path, tmp_path: Path) -> None:
    for dtype in (None, torch.bfloat16):
        save(load(published, dtype=dtype), tmp_path / "new")
        handed_on(published, tmp_path / "new")
        old, new = (checkpoint.read_json(folder / "config.json") for folder in (published, tmp_path / "new"))
        assert new == {**old, "torch_dtype": "float32" if dtype is None else "bfloat16"}
        assert list(new) == list(old)


def test_trained_on_and_resumed(published: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    asked = training_settings(None, None, None, {"data": {"source": str(text)}}, start=str(published))
    assert asked.train.balance == BalanceConfig(loss="global", weight=0.003)  # the checkpoint's own
    data = load_data(str(text), tokenizer=str(published), cache=tmp_path / "cache")
    settings_of = training(steps=2, checkpoint_every=1, balance=asked.train.balance)
    events = train(load_decoder(published, dtype=torch.float32), settings_of, data, tmp_path / "run")
    for event in events:
        if event["event"] == "checkpoint":
            break
    events.close()  # type: ignore[attr-defined]
    handed_on(published, tmp_path / "run/model")
    again = load_data(str(text), tokenizer=str(tmp_path / "run/model"), cache=tmp_path / "cache")
    *_, end = train(moe(vocab=400), settings_of, again, tmp_path / "run", resume=True)
    assert end["step"] == 2
    handed_on(published, tmp_path / "run/model")
    old, new = (checkpoint.read_json(folder / "config.json") for folder in (published, tmp_path / "run/model"))
    assert new == old


@pytest.mark.parametrize(("weight", "right"), [(0, BalanceConfig()), (0.5, BalanceConfig(loss="global", weight=0.5))])
def test_the_balance_that_a_checkpoint_names(
    weight: float, right: BalanceConfig, published: Path, tmp_path: Path
) -> None:
    values = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({**values, "router_aux_loss_coef": weight}))
    given: dict[str, Any] = {"data": {"source": str(tmp_path)}}
    assert training_settings(None, None, None, given, start=str(published)).train.balance == right
    asked = training_settings(None, None, "gshard", given, start=str(published)).train.balance
    assert asked == BalanceConfig(loss="gshard", weight=weight or 0.01)
    (published / "config.json").write_text(json.dumps({**values, "router_aux_loss_coef": "much"}))
    with pytest.raises(HandfulError, match="router_aux_loss_coef = 'much': a weight, at least 0"):
        training_settings(None, None, None, given, start=str(published))


def test_upcycled(published: Path, tmp_path: Path) -> None:
    save(Decoder(dense(vocab=400)), tmp_path / "dense")
    for file in published.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors" and file.name != "config.json":
            new = tmp_path / "dense" / file.relative_to(published)
            new.parent.mkdir(exist_ok=True)
            new.write_bytes(file.read_bytes())
    values = json.loads((tmp_path / "dense/config.json").read_text())
    own = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "unsloth_version": "2025.1"}
    (tmp_path / "dense/config.json").write_text(json.dumps({**values, **own}))
    made = upcycle(load_decoder(tmp_path / "dense"), "copy", experts=4, top_k=2)
    save(made, tmp_path / "moe")
    handed_on(published, tmp_path / "moe")
    found = checkpoint.read_json(tmp_path / "moe/config.json")
    assert found["model_type"] != values["model_type"]
    assert {key: found[key] for key in own} == own
    assert stop_ids(load(tmp_path / "moe")) == (2, 5)


def test_a_family_stays_what_it_was(tmp_path: Path) -> None:
    """A Mistral without a window has Llama's maths, and stays a Mistral; so do the fields of another form."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    auto: Any = AutoModelForCausalLM
    theirs = auto.from_config(AutoConfig.for_model("mistral", **sizes, sliding_window=None))
    theirs.save_pretrained(tmp_path / "old")
    save(load(tmp_path / "old"), tmp_path / "new")
    old, new = (checkpoint.read_json(tmp_path / name / "config.json") for name in ("old", "new"))
    assert new == old
    assert new["architectures"] == ["MistralForCausalLM"]
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "new")(tokens).logits
        assert torch.equal(again, theirs(tokens).logits)


def test_a_config_that_no_longer_says_the_model_is_written_anew(tmp_path: Path, published: Path) -> None:
    model = load_decoder(published)
    changed = Decoder(moe({"experts": 8}, vocab=400))
    changed.tokenizer, changed.origin = model.tokenizer, model.origin
    save(changed, tmp_path / "new")
    found = checkpoint.read_json(tmp_path / "new/config.json")
    assert load_decoder(tmp_path / "new").config == changed.config
    assert (found["router_aux_loss_coef"], found["_name_or_path"]) == (0.003, "org/name")
