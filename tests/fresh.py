"""Python in a process of its own, forked from one that has imported torch and nothing else: importing it takes seconds.

For what a process decides once (the kernels' level, its imports, its limits), for those that work at once and for those
that are killed. Not for how much memory a process takes: a fork shares pages.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch"])


class Process:
    """`python -c CODE ARGUMENTS` or `python -m MODULE ARGUMENTS`, begun."""

    def __init__(
        self, *arguments: str | os.PathLike[str], env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        self.args = [os.fspath(argument) for argument in arguments]
        self._folder = tempfile.TemporaryDirectory()
        self._said = [str(Path(self._folder.name, name)) for name in ("out", "err")]
        environment = dict(os.environ if env is None else env)
        self._process = _SERVER.Process(target=_run, args=(self.args, environment, cwd or Path.cwd(), self._said))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Its end as subprocess tells it; one that takes longer is killed, and shows by its status."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        out, err = (Path(path).read_text(encoding="utf-8") for path in self._said)
        self._folder.cleanup()
        assert self._process.exitcode is not None
        return subprocess.CompletedProcess(self.args, self._process.exitcode, out, err)


def python(
    *arguments: str | os.PathLike[str], env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return Process(*arguments, env=env, cwd=cwd).wait()


def _run(arguments: Sequence[str], environment: Mapping[str, str], cwd: Path, said: Sequence[str]) -> None:
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    assert not any(name.partition(".")[0] == "handful" for name in sys.modules)
    how, what, *rest = arguments
    sys.argv = [how, *rest]
    if how == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)
