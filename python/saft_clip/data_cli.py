"""The ``saft data`` commands: look at data before anything is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Look at data before training on them.")


@app.callback()
def data() -> None:
    """Look at data before training on them."""


@app.command()
def check(
    specs: Annotated[
        list[str],
        typer.Argument(
            metavar="SPEC...",
            help="Data as --data takes them; the others are compared with the first.",
        ),
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Read the images without decoding them.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", help="Also write what was found to this file.")
    ] = None,
) -> None:
    """Say what data hold and what is wrong with them; exit code 1 if something is."""
    from saft_clip.data_report import check_command

    raise typer.Exit(check_command(specs, quick=quick, json_file=json))
