"""Builds the optional C++ extension; all else is in pyproject.toml.

The extension is one shared library on torch's stable ABI without Python symbols, so one build serves every Python and
torch 2.11 or later. Where it cannot be built, the package installs without it and everything works through torch.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# 2.11: the oldest torch that the stable ABI is held to.
TORCH_TARGET = "0x020b000000000000"


def torch_folder() -> Path | None:
    """The installed torch, if it has the stable ABI's headers. It is not imported: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return folder if folder and (folder / "include/torch/csrc/stable/ops.h").exists() else None


def extensions() -> list[Extension]:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        print("handful: installing without the native extension, which is for Linux on x86-64")
        return []
    torch = torch_folder()
    if torch is None:
        print("handful: installing without the native extension, which needs torch 2.11 or later to be built")
        return []
    return [
        Extension(
            "handful._native",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
            # No -march here: the kernels choose their instructions at run time, function by function.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-Wall", "-fvisibility=hidden", f"-isystem{torch}/include"],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ]


class BuildExtension(build_ext):
    """build_ext that says in one line what an extension that failed to build means."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception:  # there are many ways to fail, none may stop the install, and the compiler has told its own
            print("handful: installing without the native extension, which did not compile")


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
