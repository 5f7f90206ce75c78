"""The pages are true: their Python runs and prints what they show, their TOML and their commands are accepted, their
tables are the code's, and their links lead somewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from builders import moe, training, write_text

from handful.cli import app
from handful.compare import compare, teams
from handful.config import RouterConfig
from handful.config_io import to_dict
from handful.data import load_data
from handful.placement import read_topology
from handful.presets import small_training
from handful.settings import training_settings
from handful.train import train

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in [ROOT / "README.md", *DOCS.glob("*.md")] if path.exists())

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [content for found, content in FENCE.findall(page.read_text("utf-8")) if found == language]


def shown_after(text: str, end: int) -> str | None:
    """What stands under a block that ends there, if it is an output or a table: that is what the block prints."""
    output = re.compile(r"\n\n```text\n(.*?)\n```$", re.MULTILINE | re.DOTALL).match(text, end)
    table = re.compile(r"\n\n((?:\|.*\n)+)").match(text, end)
    return output[1] if output else table[1].rstrip() if table else None


def table(page: Path, heading: str) -> list[list[str]]:
    """The rows of the table with that first line, without code marks."""
    lines = page.read_text("utf-8").splitlines()
    rows = []
    for line in lines[lines.index(heading) + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Python, TOML, commands.


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: texts, a run and a comparison."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HANDFUL_CACHE", str(folder / "cache"))
        write_text(Path("texts"), documents=100)
        data = load_data("texts", vocab=300)
        model, settings = moe(vocab=data.tokenizer.vocab_size, context=64), training(steps=2)
        list(train(model, settings, data, "runs/mine"))
        compare(data, teams(model, settings), "runs/demo")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=named)
def test_python_runs_and_prints_what_the_page_shows(page: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("HANDFUL_CACHE", str(home / "cache"))
    text = page.read_text("utf-8")
    names: dict[str, Any] = {"__name__": page.stem}
    for match in FENCE.finditer(text):
        if match[1] != "python":
            continue
        line = text.count("\n", 0, match.start(2))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # Line feeds, so that a traceback shows the page's own line.
            exec(compile("\n" * line + match[2], str(page), "exec"), names)
        shown = shown_after(text, match.end())
        if shown is not None:
            assert printed.getvalue().rstrip() == shown, f"{named(page)}:{line}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "toml")], ids=named)
def test_toml_is_accepted(page: Path, tmp_path: Path) -> None:
    for content in blocks(page, "toml"):
        (tmp_path / "page.toml").write_text(content, encoding="utf-8")
        if "[[nodes]]" in content:
            assert read_topology(tmp_path / "page.toml").devices == 12
            continue
        asked = training_settings(tmp_path / "page.toml", None, None, {})
        assert asked.model(2048).vocab == 2048


def commands(page: Path) -> list[str]:
    """The `handful …` lines of a page, without what a shell does with them."""
    lines = [line for content in blocks(page, "") for line in content.splitlines()]
    lines += re.findall(r"^    \$ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return [re.split(r" [>|#]", line)[0].strip() for line in lines if line.startswith("handful ")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=named)
def test_commands_are_accepted(page: Path) -> None:
    group = typer.main.get_group(app)
    for command in commands(page):
        _, verb, *rest = shlex.split(command)
        assert verb in group.commands, command
        group.commands[verb].make_context(verb, rest)  # raises what the user would see


# ---------------------------------------------------------------------------------------------------------------------
# Tables, links.


def test_table_of_router_settings() -> None:
    rows = table(DOCS / "moe.md", "| field | default | what it does | from |")
    expected = []
    for field in dataclasses.fields(RouterConfig):
        default = "" if field.default is dataclasses.MISSING else repr(field.default).replace("'", '"')
        expected.append([field.name, default])
    assert [row[:2] for row in rows] == expected


def test_table_of_training_settings() -> None:
    rows = table(DOCS / "train.md", "| setting | value | what it is |")
    values = to_dict(small_training(dtype="auto"))
    del values["balance"]  # a page of its own
    expected = []
    for name, value in values.items():
        in_toml = f'"{value}"' if isinstance(value, str) else repr(value).lower()
        expected.append([name, in_toml])
    assert [row[:2] for row in rows] == expected


def test_every_page_is_in_the_index() -> None:
    linked = re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "README.md").read_text("utf-8"))
    assert sorted(linked) == sorted(path.name for path in DOCS.glob("*.md") if path.name != "README.md")


def test_the_architecture_names_what_exists() -> None:
    text = re.sub(FENCE, "", (DOCS / "architecture.md").read_text("utf-8"))
    names = re.findall(r"`([^`\n]+)`", text)
    paths = [name for name in names if re.match(r"(handful|csrc|tests|bench|docs)/", name)]
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []
    dotted = [name for name in names if re.fullmatch(r"[a-z_]+(\.\w+)+", name) and not name.endswith((".py", ".json"))]
    assert len(dotted) > 40
    assert [name for name in dotted if found(name) is None] == []
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| \d: ", line)]
    modules = [module for row in rows for module in row[2].replace("`", "").split()]
    kinds = {"__init__", "__main__"}
    package = {path.stem for path in (ROOT / "handful").glob("*.py")} - kinds
    package |= {path.parent.name for path in (ROOT / "handful").glob("*/__init__.py")}
    assert sorted(modules) == sorted(package)


def found(name: str) -> object:
    """What a dotted name of the package, or of torch, is; None if it is nothing."""
    parts = name.split(".") if name.startswith("torch.") else ["handful", *name.split(".")]
    for count in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            value: object = importlib.import_module(".".join(parts[:count]))
            for part in parts[count:]:
                value = getattr(value, part, None)
            return value
    return None


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings are linked to."""
    headings = re.findall(r"^#+ (.*)$", re.sub(FENCE, "", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(FENCE, "", page.read_text("utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
