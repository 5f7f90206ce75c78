"""Imports go down the list of tiers only, `import handful` is light, and every public name is where it says."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fresh
import pytest
from builders import moe

import handful
from handful.families.io import save
from handful.model import Decoder

PACKAGE = Path(handful.__file__).parent

# A module imports from lower tiers and, within its own, from those that stand before it.
TIERS = [
    ["errors", "units", "config", "config_io", "presets", "machine", "verdict"],
    [
        "routing",
        "ranks",
        "meta_device",
        "count",
        "cost",
        "lazy_tensors",
        "safetensors_file",
        "checkpoint",
        "hub",
        "tokenizer_files",
        "text",
        "formats",
        "hub_rows",
        "documents",
        "data",
        "quantize",
        "kernels",
        "loss",
    ],
    ["experts", "balance", "observe"],
    [
        "sampling",
        "origin",
        "kv_rows",
        "positions",
        "attention",
        "moe",
        "block",
        "fused_step",
        "fused",
        "model",
        "encoder_decoder",
        "evaluate",
        "scores",
    ],
    ["families", "memory", "spread", "upcycle", "router_watch", "transformers"],
    [
        "runs",
        "settings",
        "monitor",
        "placement",
        "train_ranks",
        "train_step",
        "train",
        "routing_options",
        "speculation",
        "request",
        "prefix_cache",
        "engine",
        "generate",
        "chat",
        "ceilings",
        "forecast",
        "plan",
        "cache_replay",
        "deployment",
        "cluster",
        "finding",
        "terms",
        "picture",
        "report",
        "inspection",
        "verify",
        "server",
    ],
    ["lesson", "compare"],
    ["width", "progress", "console", "cli"],
    ["__main__"],
]
ORDER = [module for tier in TIERS for module in tier]

# Files that import each other, round about, and are to stop.
HEAVY = [
    "datasets",
    "fastapi",
    "jinja2",
    "matplotlib",
    "numpy",
    "prometheus_client",
    "pydantic",
    "rich",
    "starlette",
    "torch",
    "transformers",
    "typer",
    "uvicorn",
]


def module_of(path: Path) -> str:
    """The entry of TIERS that a file belongs to; a folder is one entry. The package's own __init__ is `handful`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "handful" if parts == ("__init__",) else parts[0]


def imported(tree: ast.AST, package: list[str], types: bool = False) -> Iterator[tuple[str, int]]:
    """The dotted names that `tree` imports, and their lines. Imports for type checkers alone are left out, but with
    `types`.

    `package` is the package that holds the file, against which relative imports are resolved.
    """
    for node in ast.iter_child_nodes(tree):
        checking = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        if isinstance(node, ast.If) and checking and not types:
            for other in node.orelse:
                yield from imported(ast.Module([other], []), package, types)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)
        else:
            yield from imported(node, package, types)


def files_imported(path: Path) -> set[str]:
    """The files that a file of the package imports, anywhere and for type checkers too."""
    package = ["handful", *path.relative_to(PACKAGE).parent.parts]
    names = (name for name, _ in imported(ast.parse(path.read_text()), package, types=True))
    return {file for name in names if (file := file_of(name)) is not None} - {name_of(path)}


def file_of(dotted: str) -> str | None:
    """The file of the package that a dotted import reaches, as `name_of` gives it; None if it reaches none."""
    first, *parts = dotted.split(".")
    if first != "handful" or not parts:
        return None
    parts = [*handful._HOMES.get(parts[0], parts[0]).split("."), *parts[1:]]
    for count in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:count])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return name_of(file)
    return None


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def circles(imports: dict[str, set[str]]) -> set[frozenset[str]]:
    """Files each of which reaches all the others, by what each imports."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        left = [start]
        while left:
            new = imports.get(left.pop(), set()) - found
            found |= new
            left += new
        return found

    reach = {file: reached(file) for file in imports}
    return {
        frozenset(other for other in reach[file] if file in reach.get(other, ()))
        for file in imports
        if file in reach[file]
    }


def target(dotted: str) -> str | None:
    """The entry of TIERS that a dotted import reaches; None if it is not ours or no module."""
    parts = dotted.split(".")
    if parts[0] != "handful" or len(parts) == 1 or parts[1].startswith("__version"):
        return None
    # `from handful import Name` reaches the module that Name lives in.
    return handful._HOMES.get(parts[1], parts[1]) if parts[1] not in ORDER else parts[1]


def violations(source: str, path: Path) -> list[str]:
    """What a file at `path` with this text imports against the tiers."""
    module = module_of(path)
    package = ["handful", *path.relative_to(PACKAGE).parent.parts]
    found = []
    for dotted, line in imported(ast.parse(source), package):
        other = target(dotted)
        if other is None or other == module:
            continue
        if other not in ORDER:
            found.append(f"{path.name}:{line}: {dotted} stands in no tier")
        elif module == "handful" or ORDER.index(other) > ORDER.index(module):
            found.append(f"{path.name}:{line}: {module} imports {other}, which stands above it")
    return found


@pytest.mark.parametrize(
    ("path", "source", "count"),
    [
        ("moe.py", "from handful.routing import Routing", 0),
        ("routing.py", "from handful.moe import MoE", 1),
        ("routing.py", "from handful import MoE", 1),
        ("routing.py", "import handful.moe", 1),
        ("routing.py", "def f():\n    from handful.moe import MoE", 1),
        ("routing.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from handful.moe import MoE", 0),
        ("routing.py", "if TYPE_CHECKING:\n    pass\nelse:\n    from handful.moe import MoE", 1),
        ("routing.py", "from .moe import MoE", 1),
        ("experts/grouped.py", "from .reference import Reference", 0),
        ("experts/grouped.py", "from ..moe import MoE", 1),
        ("experts/grouped.py", "from handful.experts.reference import Reference", 0),
        ("config.py", "from handful.errors import ConfigError", 0),
        ("errors.py", "from handful.config import ModelConfig", 1),
        ("__init__.py", "from handful.errors import ConfigError", 1),
        ("moe.py", "from handful.nowhere import x", 1),
        ("moe.py", "from handful import __version__\nimport torch", 0),
    ],
)
def test_the_rule_itself(path: str, source: str, count: int) -> None:
    assert len(violations(source, PACKAGE / path)) == count


def test_every_file_keeps_to_the_tiers() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    assert [error for path in paths for error in violations(path.read_text(), path)] == []


def test_every_module_stands_in_a_tier() -> None:
    assert {module_of(path) for path in PACKAGE.rglob("*.py")} - {"handful"} <= set(ORDER)


def test_every_tier_names_what_exists() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert [entry for entry in ORDER if entry not in modules] == []


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == set()
    assert circles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"a"}, "e": {"a"}}) == {frozenset("abcd")}
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"c"}}) == {frozenset("ab"), frozenset("cd")}
    assert file_of("handful.experts.grouped.grouped") == "experts/grouped.py"
    assert file_of("handful.experts.Experts") == "experts/__init__.py"
    assert file_of("handful.load") == "families/io.py"
    assert [file_of(name) for name in ("handful", "handful.__version__", "torch.nn")] == [None, None, None]


def test_no_files_import_each_other() -> None:
    # The package's own __init__ imports a name when it is asked for.
    files = set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py"}
    assert circles({name_of(path): files_imported(path) for path in files}) == set()


def test_no_test_file_imports_another() -> None:
    """What they share is in `builders.py` and its neighbours. The text of child processes counts too."""
    found = []
    for path in Path(__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        imports = [name for name, _ in imported(tree, [])]
        imports += re.findall(r"^ *(?:from|import) (test_\w+)", "\n".join(texts), re.MULTILINE)
        found += [f"{path.name} imports {name}" for name in imports if name.startswith("test_")]
    assert found == []


def test_import_is_light() -> None:
    code = "import sys, json, handful; handful.ConfigError; handful.PRESETS; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(HEAVY).isdisjoint(json.loads(run.stdout))


def test_loading_a_model_does_not_import_the_compiler(tmp_path: Path) -> None:
    """torch's own, with sympy: they take as long as the rest of torch."""
    save(Decoder(moe()), tmp_path / "model")
    names = "torch._dynamo", "sympy"
    code = (
        f"import sys, handful; handful.load({str(tmp_path / 'model')!r}); handful.train; handful.generate\n"
        f"print([name for name in {names} if name in sys.modules])"
    )
    assert fresh.python("-c", code).stdout == "[]\n"


def test_public_names_are_sorted_and_listed_once() -> None:
    assert sorted(handful.__all__) == sorted([*handful._HOMES, "__version__"])
    assert list(handful._HOMES) == sorted(handful._HOMES)


@pytest.mark.parametrize("name", sorted(handful._HOMES))
def test_public_name_resolves_to_its_own_object(name: str) -> None:
    module = importlib.import_module(f"handful.{handful._HOMES[name]}")
    assert getattr(handful, name) is getattr(module, name)
    assert name in dir(handful)


def test_a_function_is_not_hidden_by_the_module_of_its_name() -> None:
    # In a fresh process, so that no earlier import decides the outcome.
    code = "import handful.cost, handful; from handful import cost; assert callable(cost) and cost is handful.cost"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = handful.nothing


# Read for the mathematics of a mixture of experts: how it is made quick is told elsewhere.
LESSONS = ["moe.py", "block.py", "model.py", "attention.py", "positions.py", "encoder_decoder.py"]
LESSONS += ["experts/dense.py", "experts/linear.py"]


def kernels_used(source: str) -> list[str]:
    """Where a file uses what computes quickly, other than in a decorator."""
    tree = ast.parse(source)
    decorated = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for decorator in function.decorator_list
        for node in ast.walk(decorator)
    }
    names = {"kernels", "fused", "with_kernel", "available", "native"}
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in names]
    return [f"line {node.lineno}: {node.id}" for node in uses if node not in decorated]


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("@with_kernel(kernels.route)\ndef forward(self, x):\n    return x", 0),
        ("def forward(self, x):\n    return kernels.route(self, x)", 1),
        ("def forward(self, x):\n    if available():\n        return x", 1),
    ],
)
def test_a_kernel_in_a_lesson_is_found(source: str, count: int) -> None:
    assert len(kernels_used(source)) == count


@pytest.mark.parametrize("file", LESSONS)
def test_lessons_are_torch_alone(file: str) -> None:
    assert kernels_used((PACKAGE / file).read_text()) == []
