"""Builds the optional C++ extension; all else is in pyproject.toml.

The extension is one shared library on torch's stable ABI without Python symbols, so one build serves every Python and
torch 2.11 or later. Where it cannot be built, the package installs without it and everything works through torch.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

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


def torch_folder() -> Path | None:
    """The installed torch, if it has the stable ABI's headers. It is not imported: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return folder if folder and (folder / "include/torch/csrc/stable/ops.h").exists() else None


def extensions() -> list[Extension]:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        print("handful: installing without the native extension, which is for Linux on x86-64")
        return []
    extra_flags = os.environ.get("HANDFUL_CXXFLAGS", "").split()  # another build of the same: see `make sanitize`
    torch = torch_folder()
    if torch is None:
        print("handful: installing without the native extension, which needs torch 2.11 or later to be built")
        return []
    return [
        Extension(
            "handful._native",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for kind in ("*.h", "*.inc") for path in Path("csrc").glob(kind)),
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
            extra_compile_args=[*FLAGS, f"-isystem{torch}/include", *extra_flags, *BASELINE],
            extra_link_args=extra_flags,
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
