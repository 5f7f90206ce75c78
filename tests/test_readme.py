"""README's "Use it", typed from top to bottom in one folder, scaled down."""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import moe, write_text

from handful.cli import main
from handful.data import load_data
from handful.families.io import save
from handful.machine import Measured
from handful.model import Decoder

README = Path(__file__).parent.parent / "README.md"
TINY = ["--context", "16", "--batch", "4"]
SHAPE = ["--width", "16", "--layers", "1"]
# What makes a command small, after what it says itself: of an option that is given twice the last one counts.
SMALLER = {
    "compare": ["--data", "texts", "--tokens", "200", *TINY, *SHAPE],
    "train": ["--data", "texts", "--steps", "2", *TINY, *SHAPE, "--heads", "2"],
    "train --from": ["--steps", "2", *TINY],
    "generate": ["--max-tokens", "3"],
    "chat": ["--max-tokens", "3"],
    "upcycle": ["--context", "16", "--eval-tokens", "64", "--fit-tokens", "64"],
    "eval": ["--context", "16"],
    "inspect": ["--context", "16", "--tokens", "2000", "--permutations", "20", "--ablate-tokens", "64"],
}


def commands() -> list[list[str]]:
    block = re.search(r"## Use it\n\n```\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert block
    return [shlex.split(line, comments=True)[1:] for line in block[1].splitlines()]


def small(command: list[str]) -> list[str]:
    kind = "train --from" if "--from" in command else command[0]
    return [*command, *SMALLER.get(kind, [])]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder but for a text, and for what stands for the models of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HANDFUL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    write_text(Path("texts"))
    data = load_data("texts", vocab=300)
    torch.manual_seed(0)
    for name in ("org/name", "allenai/OLMoE-1B-7B-0924"):
        model = Decoder(moe({"experts": 8}, vocab=data.tokenizer.vocab_size))
        model.tokenizer = data.tokenizer
        save(model, name)
        Path(name, "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        )
    rates = Measured(read_bytes_per_second=1e10, float32_flops=1e11, bfloat16_flops=2e11)
    monkeypatch.setattr("handful.machine.measure", lambda *args: rates)
    monkeypatch.setattr(
        "handful.experts.selection.TIMED", (("decoding", 1, {"width": 8, "hidden": 8, "experts": 4, "top_k": 2}),)
    )
    run = sys.modules.get("handful.verify.run") or __import__("handful.verify.run", fromlist=["verify"])
    real = run.verify

    def quick(seed: int, progress: Any = None) -> Any:
        return real(seed, cases=1, levels=[], progress=progress)

    monkeypatch.setattr(run, "verify", quick)
    return tmp_path


def test_typed_from_top_to_bottom(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(commands()) > 10
    for command in commands():
        monkeypatch.setattr(sys, "argv", ["handful", *small(command)])
        monkeypatch.setattr(sys, "stdin", io.StringIO("the router\n"))  # who talks
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        assert code == 0, f"{shlex.join(command)}: {capsys.readouterr().err}"
    made = {str(path.parent.relative_to("runs")) for path in Path("runs").glob("*/*.json")}
    assert made == {"compare", "routers", "train", "dense", "moe", "mended", "inspect"}
