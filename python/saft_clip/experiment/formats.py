"""Tables as text: for the terminal, Markdown, LaTeX and CSV. All values in percent."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table as RichTable

from saft_clip.experiment.paper import PAPER, PaperRow
from saft_clip.experiment.record import Record
from saft_clip.experiment.tables import REFERENCES, SIGNIFICANCE, Table, Value, is_known

LEGEND = (
    "top-1 accuracy in %, mean ± standard error over seeds; best and second best of a column are "
    "marked. ↑ and ↓: significantly above or below full fine-tuning (f) and zero-shot (z) on these "
    "data sets, paired over seeds and data sets, sign-flip permutation test with Holm's "
    f"correction, p < {SIGNIFICANCE}"
)


def number(value: Value) -> str:
    """``91.2 ± 0.4``; without an error, if there is one seed only."""
    mean, error = 100 * value.estimate.mean, 100 * value.estimate.error
    return f"{mean:.2f} ± {error:.2f}" if is_known(error) else f"{mean:.2f}"


def marks(value: Value) -> str:
    """``↑f ↓z``."""
    found = [(value.signs[r], r[0]) for r in REFERENCES if r in value.signs]
    return " ".join(f"{'↑' if sign > 0 else '↓'}{letter}" for sign, letter in found)


def for_terminal(table: Table) -> RichTable:
    """Best in bold, second best underlined."""
    made = RichTable(title=escape(table.title), title_justify="left")
    made.add_column("method")
    for column in table.columns:
        made.add_column(escape(column), justify="right")
    styles = {1: "b", 2: "u"}
    for name, values in table.rows.items():
        cells = []
        for value in values:
            text = "–" if value is None else " ".join(filter(None, (number(value), marks(value))))  # noqa: RUF001
            style = styles.get(value.place) if value else None
            cells.append(f"[{style}]{text}[/{style}]" if style else text)
        made.add_row(escape(name), *cells)
    return made


def markdown(tables: Sequence[Table], record: Record) -> str:
    """All tables and the papers' figures; best bold, second best in italics."""
    parts = [f"{LEGEND}.\n"]
    for table in tables:
        parts.append(f"### {_md(table.title)}\n\n{_markdown_rows(table)}")
    if record.plan.protocol in PAPER:
        what, rows = PAPER[record.plan.protocol]
        parts.append(
            f"### The papers' figures, not measured here: {what}\n\n{_markdown_paper(rows)}"
        )
    return "\n".join(parts)


def _markdown_rows(table: Table) -> str:
    lines = [["method", *map(_md, table.columns)], ["---"] + ["---:"] * len(table.columns)]
    around = {1: "**", 2: "*"}
    for name, values in table.rows.items():
        cells = []
        for value in values:
            if value is None:
                cells.append("–")  # noqa: RUF001
                continue
            star = around.get(value.place, "")
            cells.append(" ".join(filter(None, (f"{star}{number(value)}{star}", marks(value)))))
        lines.append([_md(name), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown_paper(rows: Sequence[PaperRow]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row.values))
    lines = [["method", *columns, "source"], ["---"] + ["---:"] * len(columns) + ["---"]]
    lines += [[row.method, *(paper_number(row, c) for c in columns), row.source] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def paper_number(row: PaperRow, column: str) -> str:
    """In percent, with a sign where it is a difference."""
    value = row.values.get(column)
    if value is None:
        return "–"  # noqa: RUF001
    return f"{value:+.2f}" if "minus" in row.method else f"{value:.2f}"


def _md(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\|*_`[]<>#&~" else c for c in " ".join(text.split()))


def latex(tables: Sequence[Table], record: Record) -> str:
    """All tables with booktabs; best bold, second best underlined."""
    parts = [f"% {LEGEND}\n% needs \\usepackage{{booktabs}}\n"]
    parts += [_latex_table(table) for table in tables]
    if record.plan.protocol in PAPER:
        what, rows = PAPER[record.plan.protocol]
        columns = list(dict.fromkeys(key for row in rows for key in row.values))
        lines = [
            [_tex(row.method), *(paper_number(row, c) for c in columns), _tex(row.source)]
            for row in rows
        ]
        caption = f"The papers' figures, not measured here: {what}"
        parts.append(_latex(caption, ["Method", *columns, "Source"], lines, "l"))
    return "\n".join(parts)


def _latex_table(table: Table) -> str:
    around = {1: r"\textbf{%s}", 2: r"\underline{%s}"}
    lines = []
    for name, values in table.rows.items():
        cells = [_tex(name)]
        for value in values:
            if value is None:
                cells.append("--")
                continue
            text = number(value).replace("±", r"$\pm$")
            signs = "".join(
                rf"\{'uparrow' if value.signs[r] > 0 else 'downarrow'} {r[0]}"
                for r in REFERENCES
                if r in value.signs
            )
            cells.append(
                around.get(value.place, "%s") % text + (f"$^{{{signs}}}$" if signs else "")
            )
        lines.append(cells)
    return _latex(table.title, ["Method", *table.columns], lines, "r")


def _latex(caption: str, heads: Sequence[str], lines: Sequence[Sequence[str]], last: str) -> str:
    layout = "l" + "r" * (len(heads) - 2) + last
    # {}: what begins with [ or * would belong to the \\ before it.
    body = "".join(f"{{}}{' & '.join(line)} \\\\\n" for line in lines)
    return (
        f"\\begin{{table}}\n\\centering\n\\caption{{{_tex(caption)}}}\n"
        f"\\begin{{tabular}}{{{layout}}}\n\\toprule\n{' & '.join(map(_tex, heads))} \\\\\n"
        f"\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
    )


_TEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"†": r"$\dagger$", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in " ".join(text.split()))


def comma_separated(tables: Sequence[Table]) -> str:
    """One line per entry of every table: numbers as fractions of 1."""
    return _csv(
        [
            *("table", "model", "shots", "method", "column", "mean", "standard_error", "seeds"),
            *("place", *(f"p_{reference}" for reference in REFERENCES)),
        ],
        (
            (
                *(table.title, table.model, table.shots, name, column, value.estimate.mean),
                value.estimate.error if is_known(value.estimate.error) else "",
                *(value.estimate.n, value.place),
                *(value.p_values.get(reference, "") for reference in REFERENCES),
            )
            for table in tables
            for name, values in table.rows.items()
            for column, value in zip(table.columns, values, strict=True)
            if value is not None
        ),
    )


def results_csv(record: Record) -> str:
    """Every evaluation, one a line, for programs of your own."""
    heads = ["model", "method", "train", "shots", "seed", "data", "role", "alpha", "top1", "images"]
    return _csv(
        heads,
        (
            (
                *(row.model, row.method, row.train, row.shots, row.seed, row.data, row.role),
                *("" if row.alpha is None else row.alpha, row.top1, row.n),
            )
            for row in record.rows
        ),
    )


def trials_csv(record: Record) -> str:
    """Every trial: what it tried, and its accuracy on validation images, if it has run."""
    return _csv(
        ["model", "method", "train", "settings", "top1", "chosen"],
        (
            (
                *(model, method, train, json.dumps(tried), "" if top1 is None else top1),
                "yes" if record.chosen.get((model, train, method)) == tried else "",
            )
            for (model, train, method), trials in record.trials.items()
            for tried, top1 in trials
        ),
    )


def densities_csv(record: Record) -> str:
    """What each run with ``--density auto`` has tried, and which was best; "" without such runs."""
    lines = []
    for run in record.runs:
        model, train, method = run.cell.contest
        for trial in run.results["density_trials"]:
            top1 = "" if trial["top1"] is None else trial["top1"]
            lines.append(
                (
                    *(model, method, train, run.cell.shots, run.cell.seed),
                    *(trial["density"], trial["lr"], top1, "yes" if trial["chosen"] else ""),
                )
            )
    heads = ["model", "method", "train", "shots", "seed", "density", "lr", "top1", "chosen"]
    return _csv(heads, lines) if lines else ""


def _csv(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([heads, *lines])
    return buffer.getvalue()
