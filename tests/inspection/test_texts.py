"""Files to documents with labels and to windows of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import write_text
from serving import tokenizer

from handful.documents import read_documents, split_documents
from handful.errors import DataError
from handful.inspection import texts
from handful.inspection.ablation import sample
from handful.inspection.texts import Document, Window, held_out, read, windows


def tree(folder: Path) -> Path:
    for name in ("src/a", "src/b", "notes"):
        for i in range(15):
            file = folder / name / f"{i}.{'py' if name.startswith('src') else 'md'}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{name} {i}\n" * 20)
    return folder


def test_labels_of_files(tmp_path: Path) -> None:
    name, documents, said = read([str(tree(tmp_path))])
    assert (name, len(documents), said) == (str(tmp_path), 45, [])
    assert {document.labels["folder"] for document in documents} == {"src", "notes"}
    assert {document.labels["suffix"] for document in documents} == {".py", ".md"}
    assert {document.labels["text"] for document in documents} == {str(tmp_path)}
    assert len({document.labels["file"] for document in documents}) == 45
    below = read([str(tmp_path / "src")])[1]
    assert {document.labels["folder"] for document in below} == {"a", "b"}


def test_a_text_has_the_name_that_it_is_given(tmp_path: Path) -> None:
    tree(tmp_path)
    name, documents, _ = read([f"code={tmp_path}/src/**/*.py", f"plain prose={tmp_path / 'notes'}"])
    assert name == "code, plain prose"
    assert [sum(d.labels["text"] == label for d in documents) for label in ("code", "plain prose")] == [30, 15]


def test_a_file_whose_name_has_an_equals_sign_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a=b.txt"
    file.write_text("one line of text\n" * 400)
    assert {d.labels["text"] for d in read([str(file)])[1]} == {str(file)}


def test_copies_count_once(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "notes" / "copy.md").write_bytes((tmp_path / "notes" / "3.md").read_bytes())
    _, documents, said = read([str(tmp_path)])
    assert (len(documents), said) == (45, ["1 copy of a document is left out"])


def test_few_long_documents_are_cut_into_sections(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {i} of a long book\n" for i in range(4000)))
    _, documents, said = read([str(file)])
    assert b"".join(document.content for document in documents) == file.read_bytes()
    assert 35 <= len(documents) <= 45
    assert said == [f"1 document cut into {len(documents)} sections: they count as documents"]
    file.write_text("short\n")
    with pytest.raises(DataError, match="1 document, where 4 at least are needed"):
        read([str(file)])


def test_held_out_is_what_training_holds_out(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "text", documents=400)
    _, heldout = split_documents(read_documents(str(folder))[1])
    _, documents, _ = held_out(str(folder))
    assert sorted(document.content for document in documents) == sorted(heldout)
    assert {len(document.labels["file"]) > 0 for document in documents} == {True}


def of_lengths(*words: int) -> list[Document]:
    return [Document(f"{i} {' x' * n}".encode(), {}) for i, n in enumerate(words)]


def test_windows_are_documents_in_a_row() -> None:
    own = tokenizer()
    chosen, found = windows(of_lengths(50, 3, 20), own, 8, 10_000, 0)
    first, before, after = own.frame
    for place, document in enumerate(chosen):
        row = [*first, *before, *own.encode(document.content.decode()), *after]
        mine = [window for window in found if window.document == place]
        again = list(mine[0].tokens)
        for window in mine[1:]:
            assert window.tokens[0] == again[-1]  # predicted there, and read here
            again += window.tokens[1:]
        assert again == row
        assert all(window.length == 8 for window in mine[:-1])


def test_no_document_has_more_than_its_share() -> None:
    documents = of_lengths(5000, *[100] * 60)
    chosen, found = windows(documents, tokenizer(), 8, 4000, 3)
    held = [sum(window.length for window in found if window.document == i) for i in range(len(chosen))]
    assert max(held) <= 4000 / texts.MANY + 8
    assert 4000 <= sum(held) <= 4000 + max(held)
    assert len({document.content for document in chosen}) == len(chosen) >= texts.MANY
    assert windows(documents, tokenizer(), 8, 4000, 3) == (chosen, found)
    assert windows(documents, tokenizer(), 8, 4000, 4) != (chosen, found)


def test_a_sample_is_of_all_documents_by_turns() -> None:
    all_of_them = [Window(document, tuple(range(9))) for document in range(10) for _ in range(5)]
    found = sample(all_of_them, 8 * 15, 0)
    assert len(found) == 15
    counts = [sum(window.document == i for window in found) for i in range(10)]
    assert sorted(set(counts)) == [1, 2]
    assert len(sample(all_of_them, 10_000, 0)) == 50
