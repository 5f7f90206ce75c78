"""What an install says of an extension that it could not build, and where it finds torch."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from handful import machine as module
from handful.cli import main
from handful.experts import Experts

ROOT = Path(__file__).parent.parent

if not (ROOT / "setup.py").exists():
    pytest.skip("there are no sources to build", allow_module_level=True)


@pytest.fixture
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def build(tmp_path: Path, compiler: str) -> Path:
    """The package as build_ext leaves it with a compiler."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        f"--build-lib={tmp_path / 'lib'}",
        f"--build-temp={tmp_path}",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"CC": compiler, "CXX": compiler},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr  # it is optional
    assert "installing without the native extension" in done.stderr
    return tmp_path / "lib" / "handful"


linux = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the extension is for Linux on x86-64"
)


@linux
def test_a_missing_compiler_is_named_in_the_package(tmp_path: Path) -> None:
    package = build(tmp_path, "/nowhere/g++")
    assert (package / "_native_error.txt").read_text() == (
        "there was no C++ compiler (/nowhere/g++): install g++ 11 or clang 14 or later, or name one in CXX, "
        "then install Handful again, with pip install --no-build-isolation --force-reinstall --no-deps\n"
    )
    assert not list(package.glob("_native*.so"))


@linux
def test_a_compilers_own_complaint_is_in_the_package(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'x.h:1: note: hm' >&2\necho 'x.h:3:2: fatal error: immintrin.h' >&2\nexit 1\n")
    compiler.chmod(0o755)
    stale = tmp_path / "lib" / "handful" / "_native.abi3.so"  # of a build before
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"old")
    os.utime(stale, (0, 0))
    package = build(tmp_path, str(compiler))
    why = (package / "_native_error.txt").read_text()
    assert why.startswith(f"{compiler} said 'x.h:3:2: fatal error: immintrin.h': install g++ 11 or clang 14 or later")
    assert not stale.exists()


def test_torch_is_found_from_an_environment_of_the_builds_own(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """pip's isolated build does not see the packages of the Python that it builds for; they are where they are."""
    real = Path(sysconfig.get_path("purelib")) / "torch"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert setup_py.torch_folder() == real
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(setup_py.site, "getusersitepackages", lambda: str(tmp_path))
    with pytest.raises(setup_py.NotBuiltError, match="there was no torch to build it with: install torch first, then"):
        setup_py.torch_folder()
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")  # without the stable ABI's headers
    with pytest.raises(setup_py.NotBuiltError, match=r"is older than 2\.11"):
        setup_py.torch_folder()


@pytest.fixture
def not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package whose build left word of why it has no extension."""
    (tmp_path / "_native_error.txt").write_text("there was no C++ compiler (g++): install one\n")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "machine.py"))
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("HANDFUL_NATIVE", raising=False)
    monkeypatch.setattr(module, "_warned", [])
    module._load.cache_clear()
    yield
    module._load.cache_clear()


WORDS = "the native extension was not built: there was no C++ compiler (g++): install one"


def test_the_first_slow_path_says_why_once(not_built: None) -> None:
    assert module.native_error() == WORDS
    with pytest.warns(module.SlowWarning, match="several times slower: the native extension was not built") as told:
        Experts(4, 8, 8)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Experts(4, 8, 8)


def test_who_asked_for_another_backend_is_not_told(not_built: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Experts(4, 8, 8, backend="grouped")


def test_the_command_line_says_it_in_a_line(
    not_built: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["handful", "--version"])
    with warnings.catch_warnings():
        with pytest.raises(SystemExit):
            main()
        warnings.showwarning(module.SlowWarning(WORDS), module.SlowWarning, "x.py", 1)
    assert capsys.readouterr().err == f"warning {WORDS}\n"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux")
def test_doctor_says_why(not_built: None) -> None:
    assert module.machine().native_error == WORDS
