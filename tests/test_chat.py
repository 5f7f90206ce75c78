"""Conversations: templates render as transformers renders them, in a sandbox; the engine gets no second beginning; a
conversation grows, is broken off and begins anew; and the command line is one."""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import moe
from hypothesis import given
from hypothesis import strategies as st
from public_tokenizers import PUBLIC, Public, byte_level, settings

import handful
from handful.chat import Conversation, chat, chat_request, chat_tokens, render
from handful.cli import main
from handful.engine import Engine
from handful.errors import CheckpointError, ConfigError, DataError
from handful.families.io import load, load_decoder, save
from handful.generate import stop_ids
from handful.model import Decoder
from handful.sampling import Sampling
from handful.text import Tokenizer, load_tokenizer

# Written as public ones are: what each uses of Jinja, and of what transformers gives it.
TEMPLATES = {
    "ChatML with a default system message": """\
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "BOS, and an end after each answer": """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] | trim }} \
[/INST]{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}
{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}""",
    "tools as JSON, namespaces, slices": """\
{% set ns = namespace(last=none, n=0) %}
{% for message in messages[::-1] %}{% if message.role == "user" and ns.last is none %}{% set ns.last = loop.index0 %}
{% endif %}{% set ns.n = ns.n + 1 %}{% endfor %}
{% if tools is not none and tools %}# Tools
{% for tool in tools %}
{{ tool | tojson }}
{{ tool | tojson(indent=2) }}
{% endfor %}
{% endif %}
{% for message in messages %}
{{ message.role }}: {{ message.content if message.content is string else message.content | tojson }} ({{ ns.n }})
{% endfor %}
{% macro end(x) %}<{{ x }}>{% endmacro %}{{ end(ns.last) }}
{% if not (enable_thinking is defined and enable_thinking is false) %}<think>{% endif %}
""",
    "break, continue, what is marked for training": """\
{% for message in messages %}{% if loop.index > 4 %}{% break %}{% endif %}
{% if not message.content %}{% continue %}{% endif %}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}
{{- message.content.split('</think>')[-1].lstrip('\\n') }}{% endif %}
{% endfor %}{{ 'x' if documents is none }}{{ pad_token is defined }}
{% for message in messages %}{{ message.thinking }}|{{ message.reasoning_content }}{% endfor %}
""",
}  # fmt: skip
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "the cat"}],
    [
        {"role": "user", "content": " hi "},
        {"role": "assistant", "content": "a <b> 'c' é"},
        {"role": "user", "content": ""},
    ],
    [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "x</think>\n\ny"}] * 3,
    [
        {"role": "user", "content": "a", "reasoning": None},
        {"role": "assistant", "content": "b", "reasoning_content": "r"},
        {"role": "assistant", "content": "c", "reasoning": "s", "thinking": "t"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"a": {"type": "number"}}, "text": "<é>"}}]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]


def public(template: str | None, before: tuple[str, ...] = ("<s>",), files: dict[str, str] | None = None) -> Public:
    more = {} if template is None else {"chat_template": template}
    return Public(byte_level(SPECIALS, before=before), settings("<s>", "<|im_end|>", **more), before, files=files or {})


CHATML = public(TEMPLATES["ChatML with a default system message"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save(Decoder(moe(vocab=400, context=256, tied=False)), tmp_path / "m")
    return CHATML.write(tmp_path / "m")


# ---------------------------------------------------------------------------------------------------------------------
# Templates.


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_transformers_renders_them(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    where = public(TEMPLATES[name]).write(tmp_path)
    ours, theirs = load_tokenizer(where), AutoTokenizer.from_pretrained(where)
    for messages in CONVERSATIONS:
        for answer in (True, False):
            for tools in (None, TOOLS):
                for variables in ({}, {"enable_thinking": False}):
                    theirs_of: Any = theirs.apply_chat_template
                    right = theirs_of(messages, tools=tools, add_generation_prompt=answer, tokenize=False, **variables)
                    how: dict[str, Any] = {"tools": tools, "answer": answer, "variables": variables}
                    assert render(ours, messages, **how) == right
                    tokens = theirs_of(
                        messages, tools=tools, add_generation_prompt=answer, return_dict=False, **variables
                    )
                    assert chat_tokens(ours, messages, **how) == tokens


@given(contents=st.lists(st.text(max_size=12), min_size=1, max_size=5))
def test_a_rendered_text_begins_once(contents: list[str]) -> None:
    inner = byte_level(SPECIALS, before=["<s>"])
    template = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    config = json.dumps(settings("<s>", "<|im_end|>", chat_template=template)).encode()
    tokenizer = Tokenizer(inner, "<|im_end|>", files={"tokenizer_config.json": config})
    messages = [{"role": "user", "content": content} for content in contents]
    tokens = chat_tokens(tokenizer, messages)
    assert tokens[:2] == [*tokenizer.prefix, tokenizer.special_id("<|im_start|>")]
    spelled = sum(content.count("<s>") for content in contents)
    assert tokens.count(tokenizer.prefix[0]) == 1 + spelled


def test_where_templates_are_kept(tmp_path: Path) -> None:
    """In tokenizer_config.json, alone or with names; a file of its own goes before it."""
    one = [{"role": "user", "content": "x"}]
    named: Any = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t {{ tools | length }}"}]
    tokenizer = load_tokenizer(public(named).write(tmp_path / "named"))
    assert (render(tokenizer, one), render(tokenizer, one, tools=TOOLS)) == ("d", "t 1")
    files = {"chat_template.jinja": "own {{ messages[0].content }}"}
    tokenizer = load_tokenizer(public("other", files=files).write(tmp_path / "own"))
    assert render(tokenizer, one) == "own x"
    assert render(tokenizer, one, template="{{ eos_token }}") == "<|im_end|>"
    (tmp_path / "own/additional_chat_templates").mkdir()
    (tmp_path / "own/additional_chat_templates/tool_use.jinja").write_text("tools")
    assert render(load_tokenizer(tmp_path / "own"), one, tools=TOOLS) == "tools"
    tokenizer = load_tokenizer(public([{"name": "rag", "template": "r"}]).write(tmp_path / "rag"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^model: it has no chat template, .*; it has rag, to be given as template$"):
        render(tokenizer, one)
    for wrong in (3, [3, 4], [{"name": "default"}], {"default": 1}):
        with pytest.raises(DataError, match=r"chat_template in tokenizer_config\.json: a template, or a list"):
            load_tokenizer(public(wrong).write(tmp_path / "wrong"))  # type: ignore[arg-type]
    (tmp_path / "own/chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"chat_template\.jinja: not UTF-8"):
        load_tokenizer(tmp_path / "own")


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{% if %}", CheckpointError, r"^chat template: line 1: Expected an expression"),
        ("\n{{ messages | nothing }}", CheckpointError, r"^chat template: line 2: No filter named 'nothing'"),
        (
            "{{ raise_exception('Roles must\n alternate') }}",
            ConfigError,
            "template refuses them: Roles must alternate$",
        ),
        ("{{ messages[0].content.x.y }}", CheckpointError, "^chat template: .*no attribute 'x'"),
        ("{{ 1 / 0 }}", CheckpointError, "^chat template: division by zero"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", CheckpointError, "^chat template: .*unsafe"),
        ("{{ raise_exception.__globals__['json'] }}", CheckpointError, "^chat template: .*unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id') }}", CheckpointError, "^chat template: .*unsafe"),
        ("{{ strftime_now.__code__.co_code }}", CheckpointError, "^chat template: .*unsafe"),
        ("{% set x = messages.append(1) %}", CheckpointError, "^chat template: .*(unsafe|not safely callable)"),
        ("{% include 'x' %}", CheckpointError, "^chat template: .*no loader"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", CheckpointError, "^chat template: Range too big"),
    ],
)
def test_a_template_does_what_it_may_and_is_told_of_in_one_line(
    template: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(public(template).write(tmp_path))
    with pytest.raises(error, match=message) as caught:
        render(tokenizer, [{"role": "user", "content": "x"}])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: a list of at least one message"),
        ("hello", "messages: a list of at least one message"),
        ({"role": "user"}, "messages: a list of at least one message"),
        (["hello"], "messages: 'hello': an object with a role and a content"),
        ([{"content": "x"}], "an object with a role and a content"),
        ([{"role": 3, "content": "x"}], "an object with a role and a content"),
        ([{"role": "user", "content": "\udcff"}], "messages: must be UTF-8"),
        ([{"role": "user", "content": object()}], "messages, tools: plain values"),
    ],
)
def test_what_is_no_conversation(messages: Any, message: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(CHATML.write(tmp_path))
    with pytest.raises(ConfigError, match=message):
        render(tokenizer, messages)


def test_messages_are_not_changed_by_a_template(tmp_path: Path) -> None:
    """It sees a copy, of plain values."""
    tokenizer = load_tokenizer(public("{% set m = messages[0] %}{% do m.update({'x': 1}) %}").write(tmp_path))
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(CheckpointError):
        render(tokenizer, messages)
    assert messages == [{"role": "user", "content": "x"}]


# ---------------------------------------------------------------------------------------------------------------------
# Answers.


def test_an_answer_is_the_engines_to_the_rendered_tokens(folder: Path) -> None:
    model = load_decoder(folder)
    messages = CONVERSATIONS[0]
    greedy = Sampling(temperature=0)
    request = chat_request(model, messages, max_tokens=12, sampling=greedy)
    assert model.tokenizer is not None
    assert request.prompt == chat_tokens(model.tokenizer, messages)
    assert tuple(request.stop_tokens) == stop_ids(model)
    job = Engine(model).run([request])[0]
    answer = "".join(chat(model, messages, max_tokens=12, sampling=greedy))
    assert answer == "".join(handful.chat(model, messages, max_tokens=12, sampling=greedy))
    assert answer == model.tokenizer.decode(job.made)


def test_an_answer_is_a_text_of_its_own(tmp_path: Path) -> None:
    """SentencePiece's space before a text is no part of an answer, as in what transformers decodes of new tokens."""
    from transformers import AutoTokenizer

    save(Decoder(moe(vocab=400, context=256)), tmp_path)
    theirs = AutoTokenizer.from_pretrained(PUBLIC["mixtral"].write(tmp_path))
    model = load_decoder(tmp_path)
    assert model.tokenizer is not None
    token = model.tokenizer.encode("the")[0]
    with torch.no_grad():  # it says that word alone
        model.embed.weight.fill_(0.01)
        model.embed.weight[token] = 1.0
        for name, parameter in model.named_parameters():
            if name.startswith("layers."):
                parameter.zero_()
    template = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    how: dict[str, Any] = {"max_tokens": 3, "sampling": Sampling(temperature=0), "template": template}
    answer = "".join(chat(model, CONVERSATIONS[0], **how))
    assert answer == theirs.decode([token] * 3)
    assert not answer.startswith(" ")


def test_a_conversation_grows_and_begins_anew(folder: Path) -> None:
    model = load_decoder(folder)
    talk = Conversation(model, system="Be brief.", max_tokens=6, sampling=Sampling(temperature=0))
    system = {"role": "system", "content": "Be brief."}
    assert talk.messages == [system]
    first = "".join(talk.ask("the cat"))
    assert talk.messages == [
        system, {"role": "user", "content": "the cat"}, {"role": "assistant", "content": first},
    ]  # fmt: skip
    before = [*talk.messages, {"role": "user", "content": "and?"}]
    assert "".join(talk.ask("and?")) == "".join(chat(model, before, max_tokens=6, sampling=Sampling(temperature=0)))
    assert len(talk.messages) == 5
    with pytest.raises(ConfigError, match=r"prompt: .* tokens; the model's context is 256"):
        list(talk.ask("the cat " * 400))
    assert len(talk.messages) == 5  # a question that cannot be asked is forgotten
    answer = talk.ask("again")
    piece = next(piece for piece in answer if piece)
    answer.close()
    assert talk.messages[-1] == {"role": "assistant", "content": piece}  # broken off, and kept as far as it came
    talk.reset()
    assert talk.messages == [system]


def test_models_that_do_not_talk(tmp_path: Path) -> None:
    from handful.config import EncoderDecoderConfig, RouterConfig
    from handful.encoder_decoder import EncoderDecoder

    save(Decoder(moe(vocab=400)), tmp_path / "plain")
    PUBLIC["qwen3"].write(tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"^model: it has no chat template, as models for conversations have$"):
        list(chat(load(tmp_path / "plain"), CONVERSATIONS[0]))
    with pytest.raises(ConfigError, match="model: it has no tokenizer"):
        list(chat(Decoder(moe()), CONVERSATIONS[0]))
    shape = EncoderDecoderConfig(
        vocab=40, width=16, encoder_layers=2, decoder_layers=2, heads=2, ffn=16, router=RouterConfig(experts=2, top_k=1)
    )
    with pytest.raises(ConfigError, match="an encoder-decoder has no conversations"):
        list(chat(EncoderDecoder(shape), CONVERSATIONS[0]))


# ---------------------------------------------------------------------------------------------------------------------
# The command line.

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: str | Path, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["handful", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode("utf-8", "surrogateescape"))))
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def test_a_conversation_through_a_pipe(call: Call, folder: Path) -> None:
    how = ["--temperature", "0", "--max-tokens", "5"]
    code, out, err = call("chat", folder, *how, typed="the cat\n\nand?\n/reset\nthe cat\n/what\n/exit\nnever\n")
    assert code == 0
    model = load_decoder(folder)
    talk = Conversation(model, max_tokens=5, sampling=Sampling(temperature=0))
    first, second = ("".join(talk.ask(text)) for text in ("the cat", "and?"))
    assert out == f"{first}\n{second}\n{first}\n"
    assert "forgotten" in err
    assert "/what: no such command" in err
    code, out, err = call("chat", folder, *how, "--json", "--system", "x", typed="the cat\nand?")
    found = json.loads(out)
    assert [message["role"] for message in found["messages"]] == ["system", *["user", "assistant"] * 2]
    assert found["sampling"]["temperature"] == 0


def test_an_answer_is_stopped_and_the_conversation_goes_on(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("handful.chat")  # `handful.chat` is the function
    real, asked = module.chat, []

    def pressed(model: Decoder, messages: list[dict[str, Any]], **options: Any) -> Iterator[str]:
        asked.append(messages)
        for number, piece in enumerate(real(model, messages, **options)):
            if len(asked) == 1 and number == 2:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(module, "chat", pressed)
    how = ["--seed", "1", "--max-tokens", "6", "--temperature", "1"]
    code, out, err = call("chat", folder, *how, typed="the cat\nand?\n")
    assert code == 0
    assert "stopped" in err
    assert "seed 1" in err
    said = asked[1][1]
    assert said["role"] == "assistant"
    assert out.startswith(f"{said['content']}\n")


def test_what_chat_refuses(call: Call, folder: Path, tmp_path: Path) -> None:
    save(Decoder(moe(vocab=400)), tmp_path / "plain")
    code, _, err = call("chat", tmp_path / "plain", typed="x\n")
    assert (code, err) == (1, f"error {tmp_path / 'plain'}: it has no tokenizer\n")
    PUBLIC["qwen3"].write(tmp_path / "plain")
    code, _, err = call("chat", tmp_path / "plain", typed="x\n")
    assert (code, err) == (1, "error model: it has no chat template, as models for conversations have\n")
    code, _, err = call("chat", folder, "--template-arg", "x", typed="x\n")
    assert err == "error template-arg = 'x': NAME=VALUE, such as enable_thinking=false\n"
    code, out, err = call("chat", folder, "--max-tokens", "2", typed="the cat " * 400 + "\n")
    assert code == 0
    assert out == ""
    assert err.splitlines()[-1].startswith("error prompt: ")
    assert err.splitlines()[-1].endswith("; /reset makes room")
    code, _, err = call("chat", folder, typed="\udcff\n")
    assert code == 1
    assert err.splitlines()[-1] == "error stdin: must be UTF-8"


def test_generate_answers_a_message(call: Call, folder: Path) -> None:
    how = ["--temperature", "0", "--max-tokens", "5"]
    code, out, _ = call("generate", folder, "the cat", "--chat", *how)
    right = "".join(chat(load(folder), CONVERSATIONS[0], max_tokens=5, sampling=Sampling(temperature=0)))
    assert (code, out) == (0, f"{right}\n")
    code, out, _ = call("generate", folder, "-", "--chat", "--system", "S", "--json", *how, typed="the cat\n")
    found = json.loads(out)
    messages = [{"role": "system", "content": "S"}, *CONVERSATIONS[0]]
    assert found["text"] == "".join(chat(load(folder), messages, max_tokens=5, sampling=Sampling(temperature=0)))
    assert found["prompt"] == "the cat"
    for option, value in (("--system", "S"), ("--template-arg", "a=1")):
        code, _, err = call("generate", folder, "x", option, value)
        assert (code, err) == (1, f"error {option[2:]}: only with --chat\n")
