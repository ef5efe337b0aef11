"""A result as Markdown: what the README includes, and what a terminal shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .environment import NOTICEABLE_LOAD
from .outcome import Figure, MemoryUse, Outcome, Timing
from .ratios import format_seconds
from .result_file import outcome_of

MARK = "†"

FIGURES = ("what", "measured (95 % interval)", "from", "bar", "")
TIMES = (
    "work",
    "by",
    "covers",
    "time",
    "quartiles",
    "processor time",
    "bytes",
    "operations",
    "limit",
    "reached",
)
MEMORY = (
    "work",
    "by",
    "covers",
    "peak",
    "weights",
    "optimizer state",
    "gradients",
    "activations",
    "the rest",
    "allocated in all",
)


def markdown(result: dict[str, Any]) -> str:
    """What a result was measured on, figures beside their bars, times beside their limits."""
    outcomes = [(outcome_of(case), mark(case)) for case in result["cases"].values()]
    return "\n\n".join([*preamble(result), *_tables(outcomes)]) + "\n"


def preamble(result: dict[str, Any]) -> list[str]:
    """Paragraphs on what a result was measured on, and what speaks against it."""
    cases = result["cases"].items()
    parts = [conditions(result), *own_sizes(result)]
    if any(mark(case) for _, case in cases):
        parts.append(DISTURBED)
    parts += [f"**{n} was refused:** {case['refused']}" for n, case in cases if case["refused"]]
    parts += [f"{n} was left out: {case['left_out']}." for n, case in cases if case["left_out"]]
    return parts


def _tables(outcomes: Sequence[tuple[Outcome, str]]) -> list[str]:
    parts = []
    figures = [figure_row(figure, mark) for outcome, mark in outcomes for figure in outcome.figures]
    if figures:
        parts.append(table(FIGURES, figures))
    timings = [timing_row(timing, mark) for outcome, mark in outcomes for timing in outcome.timings]
    if timings:
        parts += [ABOUT_TIMES, table(TIMES, timings)]
    memory = [memory_row(use) for outcome, _ in outcomes for use in outcome.memory]
    if memory:
        parts += [ABOUT_MEMORY, table(MEMORY, memory)]
    return parts


DISTURBED = (
    f"{MARK} Measured while other programs used more than {NOTICEABLE_LOAD:.0%} of the processors, "
    "so that times and their ratios mean little."
)
ABOUT_TIMES = (
    "Median times and their quartiles, and the processor time of all threads. Ratios are those "
    "within rounds: their mean without the largest and the smallest quarter. The limit is what "
    "this machine would need: for the bytes that the work must move at the speed of a copy, or for "
    "its operations, counted while it was checked or known from its sizes, at the speed of a large "
    "matrix product, whichever takes longer; both ran alongside. What is reached of it is that of "
    "the first quartile: other programs only ever add time. Weights and gradients that are "
    "selected entry by entry count as whole cache lines (on a GPU: sectors). Work that reads more "
    "than it writes can beat a copy."
)
ABOUT_MEMORY = (
    "Peak memory, each in a process of its own: of a CPU all that is resident (glibc gives every "
    "block of 64 KiB or more back as soon as it is freed, MALLOC_MMAP_THRESHOLD_=65536), of a GPU "
    "what is allocated. How it divides is counted over all tensors alive at the peak; activations "
    "are all that are none of the others. The rest is no tensor's: libraries, the allocator's "
    "slack, temporaries inside operations."
)


def mark(case: dict[str, Any]) -> str:
    """What marks the rows of a case that was disturbed."""
    others = case["load"]["others"]
    return f" {MARK}" if others is not None and others > NOTICEABLE_LOAD else ""


def hardware(where: dict[str, Any]) -> str:
    """The machine in a few words."""
    host = f"{where['processor']}, {where['threads']} threads, {where['instruction_set']}"
    if "gpu" not in where:
        return host
    return f"{where['gpu']} (driver {where['driver']}, {where['toolkit']}; host {host})"


def conditions(result: dict[str, Any]) -> str:
    """When, where and on what a result was measured."""
    where, setting = result["environment"], result["setting"]
    cases = [{**where, **case} for case in result["cases"].values()]
    dates = " and ".join(dict.fromkeys(case["date"][:10] for case in cases))
    commits = " and ".join(dict.fromkeys(case["commit"][:12] for case in cases))
    text = (
        f"Measured {dates} on {hardware(where)}, torch {where['torch']}, "
        f"with {setting['model']} ({setting['pretrained']} weights, {setting['dtype']}, "
        f"{setting['images']} images, {setting['prompts']} prompts, "
        f"density {setting['density']:g}); "
        f"saft-kernels {where['saft_kernels']} at commit {commits}."
    )
    loads = [case["load"]["others"] for case in result["cases"].values()]
    known = [load for load in loads if load is not None]
    if known:
        text += f" Other programs used up to {max(known):.0%} of the processors meanwhile."
    return text


def own_sizes(result: dict[str, Any]) -> list[str]:
    """A paragraph on the cases that the conditions do not wholly describe; none without one."""
    fixed = {name: case.get("fixed") for name, case in result["cases"].items()}
    said = [f"{name} ({', '.join(options)})" for name, options in fixed.items() if options]
    text = "Cases with sizes or types of their own, and what of the above does not change them: "
    return [f"{text}{'; '.join(said)}."] if said else []


def figure_row(figure: Figure, mark: str = "") -> list[str]:
    """Its cells, in the order of ``FIGURES``."""
    return [figure.what + mark, value(figure), figure.note, bar(figure), figure.verdict]


def value(figure: Figure) -> str:
    """The value with its interval; of a ratio inside the noise only the interval."""
    interval = "" if figure.low is None else f" ({figure.low:.3g} to {figure.high:.3g})"
    if figure.inside_noise:
        return f"no difference beyond the noise{interval}"
    return f"{figure.value:.3g}{interval} {figure.unit}".strip()


def bar(figure: Figure) -> str:
    """What the figure must reach."""
    if figure.bar is None:
        return ""
    return f"{'≥' if figure.at_least else '≤'} {figure.bar:g}"


def timing_row(timing: Timing, mark: str = "") -> list[str]:
    """Its cells, in the order of ``TIMES``."""
    return [
        timing.group + mark,
        timing.name,
        timing.covers,
        format_seconds(timing.median),
        " to ".join(map(format_seconds, timing.spread)),
        format_seconds(timing.cpu_median),
        "" if timing.moves is None else f"{_short(timing.moves / 1e6)} MB",
        f"{_short(timing.flops / 1e9)} G" if timing.flops else "",
        "" if timing.floor is None else format_seconds(timing.floor),
        "" if timing.reached is None else f"{timing.reached:.0%}",
    ]


def _short(value: float) -> str:
    """At least three digits, and never a power of ten in place of zeros."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def memory_row(use: MemoryUse) -> list[str]:
    """Its cells, in the order of ``MEMORY``."""
    parts = (use.peak, use.weights, use.state, use.gradients, use.activations, use.rest)
    cells = [mebibytes(part) for part in parts]
    allocated = mebibytes(use.allocated)
    if use.allocations is not None:
        allocated += f" in {use.allocations:,}"
    return [use.group, use.name, use.covers, *cells, allocated]


def mebibytes(count: int | None) -> str:
    """Bytes for people; nothing where they are not known."""
    if count is None:
        return ""
    size = count / 2**20
    return f"{size:,.0f} MiB" if size >= 10 else f"{size:.2g} MiB"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns in which every row is empty are left out."""
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line[i] for i in used)} |" for line in lines)
