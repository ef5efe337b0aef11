"""The commands of ``python -m bench`` and ``saft bench``."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from saft_clip.console import output, say, warn
from saft_clip.models import check_precision
from saft_kernels.errors import SaftError

from .answer import Question, answer, total_memory
from .answer import markdown as answer_markdown
from .answer import record as answer_record
from .bars import Bar
from .check import Verdict, agreement, bars_of, cases_of, verdicts
from .check import brief as brief_markdown
from .check import markdown as check_markdown
from .compare import RUNS_THRESHOLD, compare_results
from .compare import markdown as comparison_markdown
from .environment import NOTICEABLE_LOAD, environment
from .harness import Effort
from .models import DTYPES, SMOKE, Setting
from .page import write_page
from .readme_figures import MARKERS, write_figures
from .registry import CASES, applied, run_case
from .result_file import (
    FORMAT,
    VERSION,
    ResultError,
    circumstances,
    kept_cases,
    read_result,
    understood,
    update_block,
    write_json,
    write_result,
)
from .revisions import DEFAULT_CASES, ROUNDS, THRESHOLD, compare_revisions
from .tables import markdown

#: Between these a Markdown file has the answer for a model.
ANSWER = ("<!-- bench-answer:begin -->", "<!-- bench-answer:end -->")

#: Where results are kept: beside this file in a checkout, in the current folder elsewhere.
_BESIDE = Path(__file__).parent / "results"
RESULTS = _BESIDE if _BESIDE.is_dir() else Path("bench-results")

#: What a GPU is measured on: batches that keep it busy, and more rounds, since they are short.
GPU_SETTING = Setting(
    images=128, prompts=100, kernels=Effort(6, 15, 100, 2), steps=Effort(30, 7, 40, 2)
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option(help="A model of open_clip or timm, or saft-tiny.")]
Pretrained = Annotated[
    str, typer.Option(help="Tag or file of its weights; random: only its shapes matter.")
]
Images = Annotated[int, typer.Option("--batch", min=1, help="Images in a batch.")]
Prompts = Annotated[int, typer.Option(min=1, help="Class prompts in a batch.")]
Density = Annotated[float, typer.Option(min=0, max=1, help="Share of the parameters selected.")]
Dtype = Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")]
Backend = Annotated[
    str | None, typer.Option(help="Of the kernels.", show_default="the device's own")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Of the CPU.", show_default="all cores")]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="A tiny model, two rounds: shows that everything runs.")
]


@app.callback(invoke_without_command=True)
def answer_for_a_model(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(help="A model of open_clip or timm, or saft-tiny.", show_default=False),
    ] = None,
    pretrained: Pretrained = Setting.pretrained,
    batch: Images = Setting.images,
    prompts: Prompts = Setting.prompts,
    density: Density = Setting.density,
    precision: Annotated[str, typer.Option(help="fp32 or amp_bf16.")] = "fp32",
    memory: Annotated[
        str | None,
        typer.Option(
            help="What there is for training, such as 24GB.", show_default="this machine's"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Threads = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="What the answer may take, roughly.")
    ] = Question.seconds,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="Keep the answer in this JSON file, too.")
    ] = None,
    update: Annotated[
        Path | None,
        typer.Option(help=f"Put it between {ANSWER[0]} and {ANSWER[1]} of this Markdown file."),
    ] = None,
) -> None:
    """Measure kernels, memory and training steps against their baselines.

    With --model, and without a command, it says what SAFT, LoRA and full fine-tuning would take for
    that model and batch on this machine.
    """
    if context.invoked_subcommand is not None:
        _refuse_options_before(context, context.invoked_subcommand)
        return
    if model is None:
        raise ResultError("name a model (--model ViT-B-16) or a command (--help lists them)")
    check_precision(precision)
    _check_places(output_file, update)
    question = Question(
        Setting(model, pretrained, batch, prompts, density, threads=threads),
        precision,
        device,
        total_memory(device) if memory is None else parsed_size(memory),
        seconds,
    )
    with applied(question.setting):
        found = answer(question)
    print(answer_markdown(found), end="")  # first of all: it took minutes
    if output_file is not None:
        write_json(output_file, {"environment": environment(), **answer_record(found)})
    if update is not None:
        update_block(update, answer_markdown(found), ANSWER)


def _refuse_options_before(context: typer.Context, command: str) -> None:
    given = _given(context, context.params)
    if given:
        raise ResultError(
            f"{' and '.join(given)} before `{command}` would count for nothing; "
            "give options behind the command"
        )


def _check_places(output_file: Path | None, update: Path | None) -> None:
    """Said before anything is measured."""
    if output_file is not None and not output_file.parent.is_dir():
        raise ResultError(f"{output_file.parent} is no folder, so that no answer can be kept in it")
    if update is not None:
        text = update.read_text(encoding="utf-8") if update.is_file() else ""
        if any(text.count(marker) != 1 for marker in ANSWER):
            raise ResultError(
                f"{update} has no place for the answer; put {ANSWER[0]} and {ANSWER[1]} on lines "
                "of their own"
            )


_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parsed_size(text: str) -> int:
    """Bytes from a number with a unit, such as 24GB.

    Raises:
        ResultError: if it is none.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    with suppress(KeyError, ValueError):
        if match is not None:
            return int(float(match[1]) * _SIZES[match[2].upper()])
    raise ResultError(f"{text!r} is no size of memory; write it like 24GB or 80GiB")


def _kept(where: dict[str, Any]) -> Path:
    """Where the result of this machine and release is kept."""
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / _file_name(where)


def _file_name(where: dict[str, Any]) -> str:
    """One file per kind of machine, or of GPU if that is what was measured, and release."""
    machine = str(where.get("gpu") or f"{where['processor']} {where['cores']} cores").lower()
    return f"{re.sub(r'[^a-z0-9]+', '-', machine).strip('-')}-{where['saft_kernels']}.json"


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
        Path | None,
        typer.Option(
            "--output", help="Keep the result in this JSON file, beside what it holds of others."
        ),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help=f"Keep the result in {RESULTS.name}.")
    ] = False,
    model: Model = Setting.model,
    pretrained: Pretrained = Setting.pretrained,
    batch: Images = Setting.images,
    prompts: Prompts = Setting.prompts,
    density: Density = Setting.density,
    dtype: Dtype = Setting.dtype,
    backend: Backend = None,
    threads: Threads = None,
    smoke: Smoke = False,
) -> None:
    """Run cases and print the tables."""
    if keep and (smoke or output_file is not None):
        raise ResultError(
            "--keep keeps a whole result under a name of its own; leave out --keep, or --smoke and "
            "--output"
        )
    chosen = _choose(cases)
    asked = Setting(model, pretrained, batch, prompts, density, _dtype(dtype), backend, threads)
    setting = _smoke(asked) if smoke else asked
    _warn_of_ignored(chosen, asked)
    if keep:
        output_file = _kept(environment(gpu=_on_gpu(chosen)))
    result = measure_cases(chosen, setting, output_file)
    print(markdown(result), end="")
    _exit_if_refused(result, chosen)


def _smoke(asked: Setting) -> Setting:
    """The tiny model and two rounds, with what says how it is run as it was asked for."""
    sizes = ("model", "pretrained", "images", "prompts", "density")
    if any(getattr(asked, size) != getattr(Setting, size) for size in sizes):
        raise ResultError(
            f"--smoke measures {SMOKE.model} at sizes of its own; leave out --smoke, or --model, "
            "--pretrained, --batch, --prompts and --density"
        )
    return replace(SMOKE, dtype=asked.dtype, backend=asked.backend, threads=asked.threads)


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise ResultError(f"there is no dtype {name!r} here; choose among {', '.join(DTYPES)}")
    return name


def _warn_of_ignored(names: Sequence[str], asked: Setting) -> None:
    """Name the cases that do not take all that was asked for."""
    for name in names:
        ignored = CASES[name].ignored(asked)
        if ignored:
            options = ", ".join(f"--{option}" for option in ignored)
            warn(f"{name} has sizes or types of its own, which {options} cannot change")


def _on_gpu(names: Sequence[str]) -> bool:
    return any(CASES[name].on_gpu for name in names)


def _refuse_unused(context: typer.Context, names: Sequence[str], reason: str) -> None:
    """Make sure that no option was given that would do nothing.

    Args:
        context: of the command.
        names: of the parameters that have no effect.
        reason: why they have none.

    Raises:
        ResultError: if one of them was given.
    """
    given = _given(context, names)
    if given:
        raise ResultError(f"{reason}; leave out {', '.join(given)}")


def _given(context: typer.Context, names: Collection[str]) -> list[str]:
    """Which options among the parameters with these names were given."""
    return [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name in names and _was_given(context, parameter.name)
    ]


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _choose(names: Sequence[str] | None) -> list[str]:
    for name in names or ():
        if name not in CASES:
            raise ResultError(f"there is no case {name!r}; choose among {', '.join(CASES)}")
    return list(names or [case.name for case in CASES.values() if not case.on_gpu])


def _exit_if_refused(result: dict[str, Any], names: Sequence[str]) -> None:
    if any(result["cases"][name]["refused"] for name in names):
        raise typer.Exit(1)


@app.command()
def check(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Bars, cases, foundation or sampled; all bars if none is named.",
            show_default=False,
        ),
    ] = None,
    result_file: Annotated[
        Path | None,
        typer.Option("--result", help="Look at a file that `run` wrote; measure nothing."),
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="Keep the result in this JSON file.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Name the bars that this earlier result reached and this one does not."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail if a bar is too close to call, too.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Measure what has a bar; exit code 1 if one is missed or could not be measured.

    A bar within the interval of a figure is too close to call, which fails with --strict only:
    measure again on an idle machine, where intervals are narrower.
    """
    bars = bars_of(names or ())
    before = None if against is None else _verdicts_in(against, bars)
    if result_file is not None:
        reason = "nothing is measured or written with --result"
        _refuse_unused(context, ("output_file", "threads"), reason)
        found = _verdicts_in(result_file, bars)
    else:
        setting = Setting(threads=threads, bars_only=True)
        found = verdicts(measure_cases(cases_of(bars), setting, output_file), bars)
    print(check_markdown(found), end="")
    if before is not None:
        print(f"\n{agreement(found, before, str(against))}")
    if any(verdict.failed or (strict and not verdict.reached) for verdict in found):
        raise typer.Exit(1)


def _verdicts_in(file: Path, bars: Sequence[Bar]) -> list[Verdict]:
    with understood(file):
        return verdicts(read_result(file), bars)


@app.command()
def gpu(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[CASE]...", help="Cases.", show_default="all")
    ] = None,
) -> None:
    """Measure the GPU and keep the result in bench/results, in a file with its name."""
    on_gpu = [case.name for case in CASES.values() if case.on_gpu]
    if unknown := sorted({*(names or [])} - {*on_gpu}):
        raise typer.BadParameter(f"there are {', '.join(on_gpu)} to measure, not {unknown[0]}")
    file = _kept(environment(gpu=True))
    result = measure_cases(names or on_gpu, GPU_SETTING, file)
    print(markdown(result), end="")
    _exit_if_refused(result, names or on_gpu)


def measure_cases(names: Sequence[str], setting: Setting, file: Path | None) -> dict[str, Any]:
    """Run the named cases; the result so far is in the file, if one is named, after each.

    What the file holds of other cases stays.

    Raises:
        ResultError: before anything is measured, if the file cannot be written, or holds a result
            of another machine, version or setting, or something else.
    """
    if file is not None and not file.parent.is_dir():  # said before anything is measured
        raise ResultError(f"{file.parent} is no folder, so that no result can be kept in it")
    with applied(setting):
        where = environment(gpu=_on_gpu(names))
    result: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "environment": where,
        "setting": asdict(setting),
        "cases": {},
    }
    known = {} if file is None else kept_cases(file, result)
    for name in names:
        known[name] = record = {**circumstances(result), **run_case(CASES[name], setting)}
        result["cases"] = {name: known[name] for name in CASES if name in known}
        if file is not None:
            write_result(file, result)
        say(f"{name}: {record['seconds']:.0f} s" + (f", kept in {file}" if file else ""))
        _warn(record)
    return result


def _warn(record: dict[str, Any]) -> None:
    for key in ("refused", "left_out"):
        if record[key]:
            warn(record[key])
    others = record["load"]["others"]
    if others is not None and others > NOTICEABLE_LOAD:
        warn(f"other programs used {others:.0%} of the processors; run it again on an idle machine")


@app.command()
def report(
    context: typer.Context,
    result: Annotated[
        Path | None,
        typer.Argument(help="A file that `run` wrote.", show_default="newest in bench/results"),
    ] = None,
    output_file: Annotated[
        Path | None,
        typer.Option("--output", help="Where the page goes.", show_default="beside the result"),
    ] = None,
    to_terminal: Annotated[
        bool, typer.Option("--markdown", help="Print the result as Markdown; write no page.")
    ] = False,
    update: Annotated[
        Path | None,
        typer.Option(help="Rewrite the block between the markers of this Markdown file."),
    ] = None,
    brief: Annotated[
        bool, typer.Option("--brief", help="In Markdown only the bars that say most.")
    ] = False,
    case: Annotated[
        list[str] | None,
        typer.Option(help="Only this case (may be repeated).", show_default=False),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            help="Write the README's figures into this folder, and print what shows them "
            f"(with --update: put it between {MARKERS[0]} and {MARKERS[1]} of that file)."
        ),
    ] = None,
) -> None:
    """Write a result as a page; or print it as Markdown, or put it or its figures into files."""
    if not to_terminal and update is None:
        reason = "--brief is about Markdown, which only --markdown and --update write"
        _refuse_unused(context, ("brief",), reason)
    file = _newest() if result is None else result
    with understood(file):
        found = _only(case, read_result(file), file)
        if to_terminal or update is not None:
            _put_markdown(brief_markdown(found) if brief else markdown(found), to_terminal, update)
        if figures is not None:
            _put_figures(write_figures(found, figures, update), update)
        if output_file is not None or not (to_terminal or update or figures):
            page = output_file or file.with_suffix(".html")
            write_page(found, page)
            say(f"{page} shows {file}")


def _only(cases: Sequence[str] | None, result: dict[str, Any], file: Path) -> dict[str, Any]:
    """The result of these cases; of all if none is named."""
    for name in cases or ():
        if name not in result["cases"]:
            raise ResultError(f"{file} has no case {name!r}; it has {', '.join(result['cases'])}")
    chosen = cases or result["cases"]
    return {**result, "cases": {n: case for n, case in result["cases"].items() if n in chosen}}


def _put_markdown(text: str, to_terminal: bool, update: Path | None) -> None:
    if to_terminal:
        print(text, end="")
    if update is not None:
        update_block(update, text)


def _put_figures(shown: str, update: Path | None) -> None:
    if update is None:
        print(shown, end="")
    else:
        update_block(update, shown, MARKERS)


def _newest() -> Path:
    """The file in bench/results that was measured last: files of a checkout are all as new.

    Of a CPU: what a GPU measured is named.
    """
    dates = {}
    for path in RESULTS.glob("*.json"):
        with suppress(ResultError):  # of another version
            where = read_result(path)["environment"]
            if "gpu" not in where:
                dates[path] = str(where["date"])
    if not dates:
        raise ResultError(
            f"there is no result of this version in {RESULTS}; name a file that `run` wrote"
        )
    return max(dates, key=lambda path: dates[path])


#: Parameters of ``compare`` that say what two revisions are measured on.
_MEASURED = ("rounds", "model", "pretrained", "batch", "prompts", "density", "dtype", "backend",
             "threads", "smoke")  # fmt: skip


@app.command()
def compare(
    context: typer.Context,
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="BEFORE.json AFTER.json | --base REV [CASE]...",
            help="Two files that `run` wrote, or the cases to measure "
            f"({', '.join(DEFAULT_CASES)} if none is named).",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="REV", help="Build this revision, and measure both.")
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(metavar="REV", help="Compare it to this one.", show_default="working tree"),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Percent by which a time may differ.",
            show_default=f"{100 * RUNS_THRESHOLD:g} for files, {100 * THRESHOLD:g} for revisions",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Of each group, with --base.")] = ROUNDS,
    force: Annotated[
        bool, typer.Option("--force", help="Compare files of different machines or settings.")
    ] = False,
    model: Model = Setting.model,
    pretrained: Pretrained = Setting.pretrained,
    batch: Images = Setting.images,
    prompts: Prompts = Setting.prompts,
    density: Density = Setting.density,
    dtype: Dtype = Setting.dtype,
    backend: Backend = None,
    threads: Threads = None,
    smoke: Smoke = False,
) -> None:
    """Show what got slower or larger between two files or revisions; exit code 1 if anything did.

    Two revisions are measured in turns: they run the same benchmarks, a round each at a time.
    """
    if base is None:
        if what is None or len(what) != 2 or head is not None:
            raise ResultError("give two result files, or a revision to compare with (--base main)")
        _refuse_unused(context, _MEASURED, "nothing is measured where two files are compared")
        limit = RUNS_THRESHOLD if threshold is None else threshold / 100
        before, after = (read_result(Path(name)) for name in what)
        title = f"{what[1]} against {what[0]}."
        with understood(" or ".join(what)):
            found = compare_results(before, after, threshold=limit, force=force)
    else:
        _refuse_unused(context, ("force",), "--force is about two files; revisions always compare")
        limit = THRESHOLD if threshold is None else threshold / 100
        cases = _choose(what or DEFAULT_CASES)
        asked = Setting(model, pretrained, batch, prompts, density, _dtype(dtype), backend, threads)
        setting = _smoke(asked) if smoke else asked
        _warn_of_ignored(cases, asked)
        title, found = compare_revisions(base, head, cases, setting, rounds=rounds, threshold=limit)
    print(comparison_markdown(title, found, limit), end="")
    if not found.passed:
        raise typer.Exit(1)


def run_arguments(arguments: Sequence[str] | None, name: str) -> None:
    """Run one command; errors are left to the caller.

    Args:
        arguments: of the command line; None: those of this process.
        name: that help and usage show.
    """
    app(args=None if arguments is None else list(arguments), prog_name=name)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; an error is one sentence."""
    try:
        run_arguments(arguments, "python -m bench")
    except SaftError as error:
        say(f"error: {error}")
        sys.exit(1)
