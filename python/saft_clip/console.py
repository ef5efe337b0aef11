"""What the user sees while something runs: messages and progress on stderr, results on stdout."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

#: Messages and progress bars. Not shown as bars when stderr is not a terminal.
console = Console(stderr=True, highlight=False)

#: Seconds between two lines of progress where there is no terminal.
LINE_INTERVAL = 60.0

#: Results: tables and what other programs may read.
output = Console(highlight=False)


class _RateColumn(ProgressColumn):
    """Throughput, such as ``312.4 images/s``."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {task.fields['unit']}/s")


@contextmanager
def progress(
    description: str, total: int, *, unit: str = "images", show: bool = True
) -> Iterator[Callable[..., None]]:
    """A progress bar with throughput and time left; a line a minute where there is no terminal.

    Args:
        description: what is being done, shown before the bar.
        total: how many units there are.
        unit: what is counted.
        show: False hides the bar.

    Yields:
        ``advance(n=1, note=None)``: call it after every n units; ``note`` replaces the text behind
        the bar.
    """
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not (show and console.is_terminal),
    )
    lines = _ProgressLines(description, total, unit) if show and not console.is_terminal else None
    with bar:
        task = bar.add_task(description, total=total, unit=unit, note="")

        def advance(n: int = 1, note: str | None = None) -> None:
            bar.advance(task, n)
            if note is not None:
                bar.update(task, note=note)
            if lines is not None:
                lines.advance(n, note)

        yield advance


class _ProgressLines:
    """Progress for log files: one line in :data:`LINE_INTERVAL` seconds at most."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done = 0
        self._note = ""
        self._start = self._last = time.monotonic()

    def advance(self, n: int, note: str | None) -> None:
        self._done += n
        self._note = self._note if note is None else note
        now = time.monotonic()
        if now - self._last >= LINE_INTERVAL:
            self._last = now
            self._say(now - self._start)

    def _say(self, seconds: float) -> None:
        rate = self._done / seconds
        left = timedelta(seconds=round((self._total - self._done) / rate))
        line = f"{self._description}: {self._done:,} of {self._total:,} {self._unit}, "
        line += f"{rate:,.1f} {self._unit}/s, {left} left"
        say(f"{line}, {self._note}" if self._note else line)


def say(message: str) -> None:
    """Print one message for the user; brackets are taken literally."""
    console.print(message, markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """Print one warning for the user; brackets are taken literally."""
    console.print(Text.assemble(("warning: ", "yellow"), message), soft_wrap=True)
