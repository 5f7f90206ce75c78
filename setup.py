"""Builds the optional C++ extension; all else is in pyproject.toml.

The extension is one shared library on torch's stable ABI without Python symbols, so one build serves every Python and
torch 2.11 or later. Where it cannot be built, the package installs without it, and everything works through torch; why,
and what would help, is written into the package, for `handful doctor` to tell: pip hides what a build prints.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import site
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# 2.11: the oldest torch that the stable ABI is held to.
TORCH_TARGET = "0x020b000000000000"

# psABI: vectors are passed between functions of one file alone, so how the ABI would pass them does not matter.
FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-Wall", "-Wno-psabi", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
]

# The kernels choose their instructions at run time, file by file: all else must run on every CPU. These are the last
# flags, so that a user's CXXFLAGS with -march=native do not reach it.
BASELINE = ["-march=x86-64", "-mtune=generic"]

WHY_NOT = "_native_error.txt"  # beside where the extension would be; handful/machine.py reads it
AGAIN = "then install Handful again, with pip install --no-build-isolation --force-reinstall --no-deps"


class NotBuiltError(Exception):
    """Why, and what would help."""


def torch_folder() -> Path:
    """The installed torch, if it has the stable ABI's headers. It is not imported: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    # pip builds in an environment of its own, and torch is not listed in pyproject.toml: it would be downloaded whole,
    # once more. The Python that runs is the one that Handful is installed for: torch is where its packages are.
    places = [Path(sysconfig.get_path(name)) for name in ("platlib", "purelib")] + [Path(site.getusersitepackages())]
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    found += [place / "torch" for place in places if (place / "torch" / "__init__.py").exists()]
    for folder in found:
        if (folder / "include/torch/csrc/stable/ops.h").exists():
            return folder
    if found:
        raise NotBuiltError(
            f"the torch in {found[0]} is older than 2.11, and it needs that: install torch 2.13.0, {AGAIN}"
        )
    raise NotBuiltError(f"there was no torch to build it with: install torch first, {AGAIN}")


class BuildExtension(build_ext):
    """build_ext that compiles on all cores, finds torch, and leaves word of what went wrong."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        why_not = library.parent / WHY_NOT
        why_not.unlink(missing_ok=True)
        try:
            torch = torch_folder()
            ext.extra_compile_args.insert(0, f"-isystem{torch}/include")
            ext.library_dirs.append(str(torch / "lib"))
            self.compiler.compile = partial(compile_apart, self.compiler.compile)
            with complaints(self.compiler.compiler_cxx[0]):
                super().build_extension(ext)
        except Exception as error:  # there are many ways to fail, and none may stop the install
            reason = str(error) if isinstance(error, NotBuiltError) else f"{type(error).__name__}: {error}"
            print(f"handful: installing without the native extension: {reason}", file=sys.stderr)
            library.unlink(missing_ok=True)
            why_not.parent.mkdir(parents=True, exist_ok=True)
            why_not.write_text(reason + "\n")

    def copy_extensions_to_source(self) -> None:
        """An editable install's: the word goes where the library would, and an old one of either goes."""
        for ext in self.extensions:
            library = Path(self.get_ext_fullpath(ext.name))
            built, here = Path(self.build_lib, "handful", WHY_NOT), library.parent / WHY_NOT
            for old in (library, here):
                old.unlink(missing_ok=True)
            if built.exists():
                shutil.copy(built, here)
        super().copy_extensions_to_source()


def compile_apart(compile_all: Callable[..., list[str]], sources: list[str], **options: Any) -> list[str]:
    """A compiler's `compile`, with a source on each core."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return [
            made for objects in pool.map(lambda source: compile_all([source], **options), sources) for made in objects
        ]


@contextmanager
def complaints(compiler: str) -> Iterator[None]:
    """Whatever goes wrong while a compiler runs becomes one line: its own first one of an error, if there is one."""
    if shutil.which(compiler) is None:
        raise NotBuiltError(
            f"there was no C++ compiler ({compiler}): install g++ 11 or clang 14 or later, or name one in CXX, {AGAIN}"
        )
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        os.dup2(said.fileno(), 2)  # the compiler is another process: it writes to the file, not to sys.stderr
        try:
            yield
        except Exception as error:
            said.seek(0)
            lines = [line.strip() for line in said if "error" in line.lower()]
            raise NotBuiltError(
                f"{compiler} said {(lines or [str(error)])[0]!r}: install g++ 11 or clang 14 or later, "
                f"or name one in CXX, {AGAIN} --verbose, which shows all that it says"
            ) from None
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            said.seek(0)
            sys.stderr.write(said.read())


def extensions() -> list[Extension]:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return []  # handful/machine.py knows why
    extra_flags = shlex.split(os.environ.get("HANDFUL_CXXFLAGS", ""))  # another build of the same: see `make sanitize`
    return [
        Extension(
            "handful._native",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for kind in ("*.h", "*.inc") for path in Path("csrc").glob(kind)),
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
            extra_compile_args=[*FLAGS, *extra_flags, *BASELINE],
            extra_link_args=extra_flags,
            libraries=["torch_cpu"],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ]


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
