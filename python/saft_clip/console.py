"""What the user sees while something runs: messages and progress on stderr, results on stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    """A progress bar with throughput and time left; silent where stderr is not a terminal.

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
    with bar:
        task = bar.add_task(description, total=total, unit=unit, note="")

        def advance(n: int = 1, note: str | None = None) -> None:
            bar.advance(task, n)
            if note is not None:
                bar.update(task, note=note)

        yield advance


def say(message: str) -> None:
    """Print one message for the user; brackets are taken literally."""
    console.print(message, markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """Print one warning for the user; brackets are taken literally."""
    console.print(Text.assemble(("warning: ", "yellow"), message), soft_wrap=True)
