"""Rows of data sets, read by the package itself from folders laid out like the Hub's."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from handful.documents import read_documents
from handful.errors import DataError, MissingExtraError
from handful.hub_rows import rows_of

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")  # the package's own


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(folder: Path, files: dict[str, str], configs: bool = False) -> Path:
    """A data set of 30 rows a file; the values are the names of the columns."""
    folder.mkdir()
    for file, column in files.items():
        rows = [{"id": i, column: f"{file} {i}"} for i in range(30)]
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if configs:
        listed = "".join(f"- config_name: {Path(f).stem}\n  data_files: {f}\n" for f in files)
        (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    return folder


def test_splits_and_parts(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"train.jsonl": "text", "test.jsonl": "text"})
    assert list(rows_of(f"hf:{one}")) == [f"train.jsonl {i}" for i in range(30)]
    assert list(rows_of(f"hf:{one}:test")) == [f"test.jsonl {i}" for i in range(30)]
    assert list(rows_of(f"hf:{one}:train[:2]")) == ["train.jsonl 0", "train.jsonl 1"]
    assert list(rows_of(f"hf:{one}:test[28:]")) == ["test.jsonl 28", "test.jsonl 29"]
    assert list(rows_of(f"hf:{one}:train[5:6]")) == ["train.jsonl 5"]
    assert len(list(rows_of(f"hf:{one}:train[:10%]"))) == 3
    assert read_documents(f"hf:{one}:train[:2]")[1] == [b"train.jsonl 0", b"train.jsonl 1"]
    with pytest.raises(DataError, match=r"nope"):
        list(rows_of(f"hf:{one}:nope"))


def test_a_part_of_a_split_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write(tmp_path / "one", {"train.jsonl": "text"})
    asked = []
    load = datasets.load_dataset

    def watched(*args: object, **options: object) -> object:
        asked.append(options)
        return load(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset", watched)
    assert len(list(rows_of(f"hf:{one}:train[:2]"))) == 2
    assert asked == [{"split": "train", "streaming": True}]


def test_configurations(tmp_path: Path) -> None:
    two = write(tmp_path / "two", {"en.jsonl": "text", "de.jsonl": "text"}, configs=True)
    assert next(rows_of(f"hf:{two}:en")) == "en.jsonl 0"
    assert next(rows_of(f"hf:{two}:de:train")) == "de.jsonl 0"
    assert list(rows_of(f"hf:{two}:de:train[3:4]")) == ["de.jsonl 3"]
    with pytest.raises(DataError, match=rf"name one of its configurations, as hf:{two}:en: en, de$"):
        list(rows_of(f"hf:{two}"))
    with pytest.raises(DataError, match="of the form hf:name, hf:name:split"):
        list(rows_of(f"hf:{two}:en:train:more"))


def test_columns(tmp_path: Path) -> None:
    code = write(tmp_path / "code", {"train.jsonl": "body"})
    assert next(rows_of(f"hf:{code}")) == "train.jsonl 0"  # the only one that holds text
    assert list(rows_of(f"hf:{code}", "id"))[:2] == [None, None]
    with pytest.raises(DataError, match=r"no column 'content' among id, body; name one by --column$"):
        list(rows_of(f"hf:{code}", "content"))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"data 'hf:org/name' needs the package 'datasets': pip install"):
        read_documents("hf:org/name")
