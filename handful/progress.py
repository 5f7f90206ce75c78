"""What moves in the terminal while something takes long: a bar for each run, or lines where nobody sees a bar."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from handful.units import duration, size

__all__ = ["LoadProgress", "Pulse", "RunProgress"]

SILENCE = 60.0  # seconds after which a log is told that the work goes on


class _State(ProgressColumn):
    """Loss, tokens per second and time left, once there are any."""

    def render(self, task: Task) -> Text:
        fields = task.fields
        if fields.get("note"):
            return Text(fields["note"], style="dim")
        if "loss" not in fields:
            return Text("")
        left = f"  {duration(fields['left'])} left" if fields.get("left") else ""
        return Text(f"loss {fields['loss']:.3f}  {fields['rate']:>7,.0f} tokens/s{left}")


class Pulse:
    """Where nobody sees a bar (a log file, a pipe): a line where a minute has gone by without one."""

    def __init__(self, console: Console) -> None:
        self._console, self._told = console, time.monotonic()

    def told(self) -> None:
        """Something else was printed."""
        self._told = time.monotonic()

    def __call__(self, line: str) -> None:
        if not self._console.is_terminal and time.monotonic() - self._told > SILENCE:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            self._told = time.monotonic()


class RunProgress:
    """A progress bar per training run, fed with its events. Warnings are printed above the bars.

    Where the console is no terminal (a log file, a pipe) it prints a line at each evaluation instead, and one where a
    minute has gone by without.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            _State(),
            console=console,
        )
        self._tasks: dict[str, Any] = {}
        self._total: dict[str, int] = {}
        self._began: dict[str, tuple[float, int]] = {}  # when, and at which step
        self._pulse = Pulse(console)

    def __enter__(self) -> RunProgress:
        if self.live:
            self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self._progress.stop()

    def expect(self, run: str) -> None:
        """Show a run that has not begun."""
        if self.live:
            self._tasks[run] = self._progress.add_task(run, total=None, start=False, note="waiting")

    def __call__(self, run: str, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "start":
            self._total[run] = event["train"]["steps"]
            self._began[run] = time.monotonic(), event.get("step", 0)
            if event["dtype_reason"] != "as asked":
                self._say(f"{run}: {event['dtype']} ({event['dtype_reason']})", "dim")
            if self.live:
                if run not in self._tasks:
                    self.expect(run)
                self._progress.update(self._tasks[run], total=self._total[run], note="")
        elif kind == "step" and self.live:
            done, total = event["step"], self._total[run]
            # By the clock and not by its own seconds: runs may take turns.
            began, before = self._began[run]
            left = (time.monotonic() - began) / max(1, done - before) * (total - done)
            self._progress.update(
                self._tasks[run], completed=done, loss=event["loss"], rate=event["tokens_per_second"], left=left
            )
        elif kind == "step":
            rate = f"{event['tokens_per_second']:,.0f} tokens/s"
            self._pulse(f"{self._where(run, event)}, loss {event['loss']:.3f}, {rate}")
        elif kind == "eval" and not self.live:
            self._say(
                f"{self._where(run, event)}, held-out loss {event['loss']:.4f} ({event['bits_per_byte']:.4f} bits/byte)"
            )
        elif kind == "warning":
            self._say(f"warning: {run}, step {event['step']}: {event['message']}", "yellow")
        elif kind == "end" and self.live:
            note = f"loss {event['loss']:.4f} held out  {event['tokens_per_second']:,.0f} tokens/s"
            self._progress.update(
                self._tasks[run], completed=self._total[run], note=f"{note}  {duration(event['seconds'])}"
            )

    def _where(self, run: str, event: Mapping[str, Any]) -> str:
        return f"{run}: step {event['step']} of {self._total[run]}, {duration(event['seconds'])}"

    def _say(self, line: str, style: str = "") -> None:
        """A line as it is: names and paths may hold what rich would take for markup, and are not to be cut."""
        self._pulse.told()
        self.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


class LoadProgress:
    """A bar while a model is loaded, fed with (bytes done, bytes in all): for `handful.load`'s `progress`.

    In a terminal, and not before it has taken half a second; elsewhere a line a minute.
    """

    def __init__(self, console: Console) -> None:
        self._live = console.is_terminal
        self._pulse = Pulse(console)
        self._began = time.monotonic()
        self._progress = Progress(
            TextColumn("loading"), BarColumn(bar_width=24), DownloadColumn(), console=console, transient=True
        )
        self._task = self._progress.add_task("loading", total=None)

    def __enter__(self) -> LoadProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._live and time.monotonic() - self._began > 0.5:
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total)
        self._pulse(f"loading: {size(done)} of {size(total)}")
