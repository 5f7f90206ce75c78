"""The pictures of docs/what-is-a-mixture.md: drawn from a comparison, well-formed, and saying what it says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from comparisons import document

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_they_are_drawn(pictures: ModuleType, tmp_path: Path) -> None:
    doc = document()
    pictures.draw(doc, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(pictures.PICTURES)
    drawn = {path.name: ElementTree.parse(path).getroot() for path in tmp_path.iterdir()}
    for root in drawn.values():
        assert root.tag.endswith("svg")
        assert root.get("role") == "img"
        width, height = (float(value) for value in str(root.get("viewBox")).split()[2:])
        for word in root.iter("{http://www.w3.org/2000/svg}text"):
            assert 0 <= float(str(word.get("x"))) < width
            assert 0 < float(str(word.get("y"))) < height
    seats = drawn["mixture-seats.svg"]
    filled = [circle.get("class") for circle in seats.iter("{http://www.w3.org/2000/svg}circle")]
    # 160 dots are 3.743 M parameters: 12 of the small team, 13 of the mixture at work, all 159 of the big one.
    assert [filled.count(kind) for kind in ("d1", "on", "off", "d3")] == [12, 13, 147, 159]
    bars = list(drawn["mixture-way.svg"].iter("{http://www.w3.org/2000/svg}rect"))
    assert [bar.get("class") for bar in bars].count("on") == 2
    assert [bar.get("class") for bar in bars].count("bar") == 62
    assert "held-out loss 3.393" in str(seats.get("aria-label"))


def test_the_page_has_them_all(pictures: ModuleType) -> None:
    shown = re.findall(r"\]\((mixture-[\w-]+\.svg)\)", (DOCS / "what-is-a-mixture.md").read_text("utf-8"))
    assert sorted(shown) == sorted(pictures.PICTURES)
    assert all((DOCS / name).exists() for name in shown)
