"""``python -m bench``: run every case, or list, run some, and report."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from saft_clip.console import output, say, warn
from saft_kernels.errors import SaftError

from . import report as reports
from .environment import NOTICEABLE_LOAD, environment
from .harness import Effort
from .models import SMOKE, Setting
from .registry import CASES, run_case

RESULTS = Path(__file__).parent / "results"

#: What a GPU is measured on: batches that keep it busy, and more rounds, since they are short.
GPU_SETTING = Setting(
    images=128, prompts=100, kernels=Effort(6, 15, 100, 2), steps=Effort(60, 7, 40, 2)
)

app = typer.Typer(
    help="Measure kernels, memory and training steps against their baselines.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def everything(context: typer.Context) -> None:
    """Without a command: run every case and keep the result in bench/results."""
    if context.invoked_subcommand is None:
        run(output_file=RESULTS / _file_name(environment()))


def _file_name(where: dict[str, Any]) -> str:
    """One file per kind of machine, or of GPU if that is what was measured, and release."""
    machine = str(where.get("gpu") or f"{where['processor']} {where['cores']} cores").lower()
    return f"{re.sub(r'[^a-z0-9]+', '-', machine).strip('-')}-{where['saft_kernels']}.json"


@app.command()
def gpu() -> None:
    """Measure the GPU and keep the result in bench/results, in a file with its name."""
    file = RESULTS / _file_name(environment(gpu=True))
    result = measure_cases(["gpu"], GPU_SETTING, file)
    print(reports.markdown(result), end="")
    _exit_if_refused(result, ["gpu"])


def _exit_if_refused(result: dict[str, Any], names: list[str]) -> None:
    if any(result["cases"][name]["refused"] for name in names):
        raise typer.Exit(1)


@app.command("list")
def list_cases() -> None:
    """Name the cases."""
    for case in CASES.values():
        output.print(f"{case.name:16} {case.summary}")


@app.command()
def run(
    cases: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CASE]...", help="Which ones; all of the CPU if none is named."),
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="Keep the result in this JSON file.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="An open_clip model; its weights are random.")
    ] = Setting.model,
    smoke: Annotated[
        bool, typer.Option(help="A tiny model and two rounds: shows that everything runs.")
    ] = False,
) -> None:
    """Run cases and print the tables."""
    chosen = _choose(cases)
    setting = SMOKE if smoke else replace(Setting(), model=model)
    result = measure_cases(chosen, setting, output_file)
    print(reports.markdown(result), end="")
    _exit_if_refused(result, chosen)


def _choose(names: list[str] | None) -> list[str]:
    for name in names or ():
        if name not in CASES:
            raise reports.ResultError(f"there is no case {name!r}; choose among {', '.join(CASES)}")
    return names or [case.name for case in CASES.values() if not case.on_gpu]


def measure_cases(names: list[str], setting: Setting, file: Path | None) -> dict[str, Any]:
    """Run the named cases; the result so far is in the file, if one is named, after each.

    What the file holds of other cases stays, if it was measured on this machine with this setting.
    """
    result: dict[str, Any] = {
        "format": reports.FORMAT,
        "version": reports.VERSION,
        "environment": environment(gpu=any(CASES[name].on_gpu for name in names)),
        "setting": asdict(setting),
        "cases": {},
    }
    known = {} if file is None else reports.comparable_cases(file, result)
    when = {key: result["environment"][key] for key in ("date", "commit")}
    for name in names:
        known[name] = record = {**when, **run_case(CASES[name], setting)}
        result["cases"] = {name: known[name] for name in CASES if name in known}
        if file is not None:
            reports.write_result(file, result)
        say(f"{name}: {record['seconds']:.0f} s" + (f", kept in {file}" if file else ""))
        if record["refused"]:
            warn(record["refused"])
        others = record["load"]["others"]
        if others is not None and others > NOTICEABLE_LOAD:
            warn(
                f"other programs used {others:.0%} of the processors; "
                "run it again on an idle machine"
            )
    return result


@app.command()
def report(
    result: Annotated[Path, typer.Argument(help="A file that `run` wrote.")],
    update: Annotated[
        Path | None,
        typer.Option(help="Rewrite the block between the markers of this Markdown file."),
    ] = None,
    brief: Annotated[bool, typer.Option("--brief", help="Only figures that have a bar.")] = False,
) -> None:
    """Print a result as Markdown, or put it into a file."""
    text = reports.markdown(reports.read_result(result), brief=brief)
    if update is None:
        print(text, end="")
    else:
        reports.update_block(update, text)


def main() -> None:
    """The command line; an error is one sentence."""
    try:
        app()
    except SaftError as error:
        say(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
