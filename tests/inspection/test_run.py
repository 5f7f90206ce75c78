"""`handful inspect` and `handful.inspect_model` on small models: document, page, two sides, mistakes, Ctrl-C."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Call, calling, dense, document, mistake, moe
from serving import tokenizer

import handful
from handful.errors import ConfigError, DataError
from handful.families.io import save
from handful.inspection import page
from handful.inspection.ablation import ablate
from handful.inspection.words import costly, summary
from handful.model import Decoder

QUICK: dict[str, Any] = {"permutations": 20, "ablate_tokens": 300, "tokens": 4000, "context": 32}
OPTIONS = ["--permutations", "20", "--ablate-tokens", "300", "--tokens", "4000", "--context", "32"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return calling(monkeypatch, capsys)


def write_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    torch.manual_seed(seed)
    own = tokenizer()
    model = Decoder(moe({"experts": 6}, vocab=own.vocab_size, context=64, tied=False, **changes))
    model.tokenizer = own
    save(model, folder)
    own.save(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a dense one, and texts in two folders."""
    folder = tmp_path_factory.mktemp("home")
    write_model(folder / "one")
    write_model(folder / "two", seed=1)
    own = tokenizer()
    twin = Decoder(dense(vocab=own.vocab_size))
    save(twin, folder / "dense")
    own.save(folder / "dense")
    for kind, words in (("code", "def self return == ( ) :"), ("prose", "the of and a router , .")):
        for i in range(20):
            file = folder / "text" / kind / f"{i}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            listed = words.split()
            file.write_text(" ".join(listed[(i * j + j * j) % 7] for j in range(120)) + f" {i}\n")
    return folder


@pytest.fixture(scope="module")
def found(home: Path) -> dict[str, Any]:
    return handful.inspect_model(str(home / "one"), str(home / "text"), **QUICK)


def test_the_document_has_every_expert_and_every_measure(found: dict[str, Any]) -> None:
    (side,) = found["sides"]
    assert not found["interrupted"]
    assert [kind["kind"] for kind in side["kinds"]] == ["token", "position", "folder", "folder given token"]
    assert (len(side["layers"]), side["documents"], side["context"]) == (2, side["documents"], 32)
    assert sum(half["documents"] for half in side["halves"]) == side["documents"] >= 20
    assert sum(half["tokens"] for half in side["halves"]) == side["tokens"]
    for layer in side["layers"]:
        assert sum(expert["load"] for expert in layer["experts"]) == pytest.approx(1, abs=1e-5)
        assert len(layer["experts"]) == 6
        for expert in layer["experts"]:
            assert expert["ablation"].keys() == {"cost", "error", "p", "q", "beyond"}
            for kind in side["kinds"]:
                row = expert[kind["kind"]]
                assert row is None or 0 <= row["q"] <= 1
    json.dumps(found, allow_nan=False)
    # A random model routes by its embeddings: token identity decides much of the first layer.
    first = [expert["token"]["share"] for expert in side["layers"][0]["experts"] if expert["token"]]
    assert max(first) > 0.5
    assert side["summary"]["follow"]["token"] > 6
    assert side["loss"] == pytest.approx(side["ablation"]["loss"], rel=0.05)


def test_the_same_seed_gives_the_same_document(home: Path, found: dict[str, Any]) -> None:
    again = handful.inspect_model(str(home / "one"), str(home / "text"), **QUICK)
    assert again["sides"] == found["sides"]


def test_a_memory_budget_and_transformers_see_the_same_routing(home: Path, call: Call, tmp_path: Path) -> None:
    base = ["inspect", home / "one", "--text", home / "text", *OPTIONS, "--out", tmp_path / "out", "--json"]
    plain = document(call(*base))["sides"][0]
    small = document(call(*base, "--memory", "150KB", "--pack", tmp_path / "experts.pack"))["sides"][0]
    theirs = document(call(*base, "--transformers"))["sides"][0]
    assert small == plain
    coarse = document(call(*base, "--quant", "int8", "--no-ablate"))["sides"][0]
    assert 0 < abs(coarse["loss"] - plain["loss"]) < 0.01
    assert theirs["ablation"]["removal"] == "removed"
    assert theirs["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    for ours, other in zip(plain["layers"], theirs["layers"], strict=True):
        assert [e["load"] for e in other["experts"]] == pytest.approx([e["load"] for e in ours["experts"]], abs=1e-3)
        assert other["repeats"]["rate"] == pytest.approx(ours["repeats"]["rate"], abs=2e-3)


def test_what_the_command_prints_and_writes(home: Path, call: Call, tmp_path: Path) -> None:
    result = call("inspect", home / "one", "--text", home / "text", *OPTIONS, "--no-ablate", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "folder given token" in result.out
    assert re.search(r"^Of 12 experts in 2 layers, \d+ follow token identity", result.err, re.MULTILINE)
    assert "Switched off" not in result.err
    written = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert written["command"].startswith("handful inspect ")
    assert written["sides"][0]["ablation"] is None
    shown = (tmp_path / "out" / "report.html").read_text()
    assert "Not measured" in shown
    assert written["sides"][0]["summary"]["sentences"][0] in shown


def test_a_long_ablation_says_so_first(home: Path, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("handful.cli.inspect.LONG", 0.0)
    result = call("inspect", home / "one", "--text", home / "text", *OPTIONS, "--out", tmp_path)
    assert re.search(r"^ablation: 12 experts, each switched off: at most about \d+ s; Ctrl-C", result.err, re.MULTILINE)


def test_two_models_and_two_texts_side_by_side(home: Path, call: Call, tmp_path: Path) -> None:
    options = ["--text", home / "text", *OPTIONS, "--no-ablate", "--out", tmp_path, "--json"]
    models = document(call("inspect", home / "one", "--against", home / "two", *options))["sides"]
    assert [side["model"] for side in models] == [str(home / "one"), str(home / "two")]
    assert models[0]["tokens"] == models[1]["tokens"]
    assert models[0]["loss"] != models[1]["loss"]
    shown = (tmp_path / "report.html").read_text()
    assert shown.count('<th scope="col">' + str(home / "two")) == 1
    code, prose = f"code={home / 'text/code'}", f"prose={home / 'text/prose'}"
    both = document(call("inspect", home / "one", "--text", code, "--text2", prose, *options[2:]))["sides"]
    assert [side["text"] for side in both] == ["code", "prose"]
    named = document(call("inspect", home / "one", "--text", code, "--text", prose, *options[2:]))["sides"]
    assert [kind["kind"] for kind in named[0]["kinds"]][2:] == [
        "text", "text given token", "folder", "folder given token",
    ]  # fmt: skip
    asked = document(call("inspect", home / "one", *options, "--by", "suffix"))["sides"][0]["kinds"][2]
    assert (asked["kind"], asked["why_not"]) == ("suffix", "all documents have one label, '.txt'")


class Page(HTMLParser):
    """What a page's elements refer to, and whether every element ends."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.urls: list[str] = []
        self.ids: list[str] = []
        self.labelled: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.urls += [value or "" for name, value in attributes if name in ("src", "href")]
        self.ids += [given["id"] or ""] if "id" in given else []
        self.labelled += [given["aria-labelledby"] or ""] if "aria-labelledby" in given else []
        if tag not in ("meta", "link", "circle", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("circle", "line"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass


def test_the_page_is_whole_and_fetches_nothing(found: dict[str, Any], tmp_path: Path) -> None:
    text = page.write(found, tmp_path).read_text()
    read = Page(text)
    assert read.open == []
    assert read.urls == ["data:,"]
    assert len(set(read.ids)) == len(read.ids)
    assert set(read.labelled) <= set(read.ids)
    assert "{{" not in text.split("<script")[0]
    assert json.loads((tmp_path / "inspect.json").read_text()) == found


def test_what_a_text_is_called_is_shown_and_not_run(found: dict[str, Any], tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    side = dict(found["sides"][0]) | {"model": evil, "text": evil, "notes": [evil]}
    side["kinds"] = [kind | {"why_not": evil} for kind in side["kinds"]]
    text = page.write({**found, "sides": [side, side], "command": evil}, tmp_path).read_text()
    assert "<script>alert" not in text
    assert Page(text).open == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dense", "--text", "text"], "dense: a dense model; inspect is for mixtures of experts"),
        (["one"], "text = None: one does not say what text it was trained on; name some"),
        (["one", "--text", "text", "--against", "two", "--text2", "text"], "against, text2: give one of them"),
        (["one", "--text", "text", "--by", "colour"], "by = 'colour': one of text, folder, suffix, file"),
        (["one", "--text", "text", "--level", "5"], "level = 5.0: between 0 and 1"),
        (["one", "--text", "text", "--context", "65"], "context = 65: from 1 to 64, the model's"),
        (["one", "--text", "text", "--quant", "int2"], "quant = 'int2': int8 or int4"),
        (["one", "--text", "text", "--transformers", "--memory", "1GB"], "transformers: without --quant, --memory"),
        (["one", "--text", "text/code/0.txt"], "text: 2 documents, where 4 at least are needed, to be split in halves"),
        (["one", "--text", "nowhere"], "data 'nowhere': no such file"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, home: Path, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(home)
    result = call("inspect", *arguments, "--out", tmp_path)
    assert mistake(result).startswith(said)
    assert not (tmp_path / "report.html").exists()


def test_mistakes_in_python(home: Path) -> None:
    with pytest.raises(ConfigError, match="permutations = 3: at least 20"):
        handful.inspect_model(str(home / "one"), str(home / "text"), permutations=3)
    with pytest.raises(ConfigError, match="a list; inspect is for decoders"):
        handful.inspect_model([], str(home / "text"))
    with pytest.raises(DataError, match="no such file"):
        handful.inspect_model(str(home / "one"), "nowhere")


def test_a_ctrl_c_during_the_ablation_writes_what_there_is(
    home: Path, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = 0

    def pressed(subject: Any, windows: Any, progress: Any = None) -> Any:
        def told(done: int, total: int) -> None:
            nonlocal seen
            seen = done
            if done == 5:
                raise KeyboardInterrupt

        return ablate(subject, windows, told)

    monkeypatch.setattr("handful.inspection.run.ablate", pressed)
    result = call("inspect", home / "one", "--text", home / "text", *OPTIONS, "--out", tmp_path)
    assert result.code == 130
    assert f"interrupted: what was measured until then is in {tmp_path}" in result.err
    side = json.loads((tmp_path / "inspect.json").read_text())["sides"][0]
    assert seen == 5
    assert len(costly(side)) == 5
    assert "redundant" not in " ".join(side["summary"]["sentences"])
    assert "It was interrupted" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("stage", ["cosines", "redundant"])
def test_a_ctrl_c_after_the_ablation_keeps_it(
    stage: str, home: Path, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"handful.inspection.run.{stage}", pressed)
    result = call("inspect", home / "one", "--text", home / "text", *OPTIONS, "--out", tmp_path)
    assert result.code == 130
    side = json.loads((tmp_path / "inspect.json").read_text())["sides"][0]
    assert len(costly(side)) == 12
    assert side["layers"][0]["alike"] is None
    assert "was not measured" in (tmp_path / "report.html").read_text()


def test_sentences(found: dict[str, Any]) -> None:
    side = found["sides"][0]
    none = {**side, "kinds": [kind | {"follow": 0} for kind in side["kinds"]], "ablation": None}
    assert summary(none)["sentences"][0] == (
        "Of 12 experts in 2 layers, none follows token identity, position or the folder beyond chance in both "
        "halves of the text."
    )
    untested = {**none, "kinds": [kind | {"why_not": "too few"} for kind in side["kinds"]]}
    assert "could be tested" in summary(untested)["sentences"][0]
    seldom = {**none, "kinds": [kind | {"judged": 0} for kind in side["kinds"]]}
    assert "could be tested" in summary(seldom)["sentences"][0]
    some = {**none, "kinds": [kind | {"follow": 3 if kind["kind"] != "position" else 0} for kind in side["kinds"]]}
    assert summary(some)["sentences"][0] == (
        "Of 12 experts in 2 layers, 3 follow token identity and 3 follow the folder (with token identity taken "
        "away, 3), beyond chance and in both halves of the text; none follows position."
    )
