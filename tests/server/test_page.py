"""The page's files over HTTP: their types, the headers that keep a browser to them, and who may fetch them.

What the page does is tested in a browser: tests/browser/test_page_browser.py.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Served, chat_model, serving

from handful.server import pages

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in pages.FOLDER.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(chat_model(), api_key="secret") as found:
        found.http.headers.pop("Authorization")
        yield found


def path_of(file: Path) -> str:
    return "/" if file.name == "index.html" else f"/web/{file.relative_to(pages.FOLDER).as_posix()}"


def test_every_file_comes_without_a_key_and_keeps_a_browser_to_this_server(served: Served) -> None:
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for file in FILES:
        answer = served.http.get(path_of(file))
        assert answer.status_code == 200, file
        assert answer.content == file.read_bytes()
        assert answer.headers["content-type"].partition(";")[0] == kinds[file.suffix]
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert served.http.get("/v1/models").status_code == 401


def test_a_file_that_is_known_is_not_sent_again(served: Served) -> None:
    first = served.http.get("/web/page.css")
    assert first.headers["cache-control"] == "no-cache"
    again = served.http.get("/web/page.css", headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert served.http.get("/web/page.css", headers={"If-None-Match": '"other"'}).status_code == 200
    head = served.http.head("/web/page.css")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(first.content))


@pytest.mark.parametrize(
    "path", ["/web", "/web/", "/web/nothing.js", "/web/../pages.py", "/web/%2e%2e/app.py", "/web/js/../../guard.py"]
)
def test_nothing_else_is_a_file(served: Served, path: str) -> None:
    target = served.http.build_request("GET", path)
    target.url = target.url.copy_with(raw_path=path.encode())  # as it stands, dots and all
    answer = served.http.send(target)
    assert answer.status_code in (401, 404)
    assert "error" in answer.json()


def test_the_host_is_asked_of_the_page_too() -> None:
    with serving(chat_model()) as open_one:
        assert open_one.http.get("/").status_code == 200
        assert open_one.http.get("/", headers={"Host": "elsewhere.example"}).status_code == 403
        assert open_one.http.post("/", json={}).status_code == 405


def test_a_page_names_only_files_that_are_there() -> None:
    """And nothing of another host; no script or style stands in it, which the policy would refuse."""
    html = (pages.FOLDER / "index.html").read_text("utf-8")
    named = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert all((pages.FOLDER.parent / name).is_file() for name in named)
    assert not re.search(r"<style|<script(?![^>]*src=)| style=| on\w+=", html)
    for file in FILES:
        text = file.read_text("utf-8")
        links = set(re.findall(r"\w+://[^\s\"')]+", text))
        assert links <= {
            "http://www.w3.org/2000/svg",
            "https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html",
        }
        if file.suffix == ".js":
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(", text), (
                file
            )
            for name in re.findall(r'from "([^"]+)"', text):
                assert (file.parent / name).is_file(), f"{file.name}: {name}"


def test_a_wheel_holds_them() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    held = {path for pattern in patterns["handful.server"] for path in pages.FOLDER.parent.glob(pattern)}
    assert set(FILES) <= held
