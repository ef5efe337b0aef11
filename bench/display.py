"""A progress bar that keeps still while something is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from saft_clip.console import console


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Show how many of ``total`` runs are done; call what it yields after each.

    It is drawn only then: the usual refreshing thread would take time from what is measured.
    """
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        auto_refresh=False,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(description, total=total)

        def advance() -> None:
            bar.advance(task)
            bar.refresh()

        yield advance
