"""The answers of an experiment: tables in several formats, and one self-contained page."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from saft_clip import figures
from saft_clip.config import AUTO
from saft_clip.experiment import formats, pictures
from saft_clip.experiment.bound import DELTA, gaps
from saft_clip.experiment.cells import Contest
from saft_clip.experiment.paper import PAPER
from saft_clip.experiment.protocols import find_protocol
from saft_clip.experiment.record import PLAN, Record, Run, read_record
from saft_clip.experiment.retrieval import RETRIEVAL, read_retrieval
from saft_clip.experiment.tables import (
    Table,
    accuracy_tables,
    cost_table,
    images_per_class,
    names_of,
)
from saft_clip.report import file_size, write_page
from saft_clip.results import KINDS
from saft_kernels.files import atomic_write

REPORT = "report.html"

#: Whose trained parameters are shown by block: the first of them that has run.
_SPARSE = ("saft", "saft-fisher", "random", "magnitude", "bitfit")


def write_answers(folder: Path, report: Path | None = None) -> Record:
    """Write tables and page of what an experiment has found so far.

    Args:
        folder: of the experiment.
        report: where the page goes; None for ``report.html`` in the folder.

    Returns:
        What was found.

    Raises:
        CheckpointError: if the folder holds no experiment, or a file in it is broken.
        FileWriteError: if something cannot be written.
        MissingExtraError: if SciPy is not installed.
    """
    record = read_record(folder)
    tables = accuracy_tables(record)
    texts = {
        "results.csv": formats.results_csv(record),
        "trials.csv": formats.trials_csv(record),
        "densities.csv": formats.densities_csv(record),
        "tables.csv": formats.comma_separated(tables),
        "tables.md": formats.markdown(tables, record),
        "tables.tex": formats.latex(tables, record),
    }
    for name, text in texts.items():
        if not text:
            (folder / name).unlink(missing_ok=True)
            continue
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    write_page(report or folder / REPORT, "experiment.html.j2", page_content(record, tables))
    return record


def page_content(record: Record, tables: list[Table]) -> dict[str, Any]:
    """What the page shows."""
    plan = record.plan
    protocol = find_protocol(plan.protocol)
    models = [entry.name for entry in plan.models]
    shots = plan.most_shots
    drawn = {row.model for row in record.rows}
    present = [name for name in models if name in drawn]
    names = names_of(record)
    return {
        "title": f"{protocol.title}: {', '.join(models)}",
        "lead": _lead(record),
        "legend": formats.LEGEND,
        "tables": tables,
        "number": formats.number,
        "marks": formats.marks,
        "paper": _paper(record),
        "shots_figures": _each(present, lambda m: pictures.shots_figure(record, m))
        if len(plan.shots) > 1
        else [],
        "tradeoffs": _each(present, lambda m: pictures.tradeoff_figure(record, m, shots)),
        "alphas": bool(plan.alphas),
        "densities": _each(present, lambda m: pictures.density_figure(record, m, shots))
        if sum(entry.settings.get("density", AUTO) != AUTO for entry in plan.methods) > 1
        else [],
        "blocks": _blocks(record),
        "bound": _bound(record),
        "delta": DELTA,
        "retrievals": _retrievals(record),
        "costs": [
            {"model": model, "lines": [_cost_line(line) for line in cost_table(record, model)]}
            for model in present
        ],
        "trials": _trials(record, names),
        "automatic": _automatic(record, names),
        "failures": record.failures,
        "missing": record.missing,
        "environment": record.runs[0].results["environment"].items() if record.runs else [],
        "plan": yaml.safe_dump(plan.to_dict(), sort_keys=False, allow_unicode=True),
        "command": shlex.join(
            (
                *("saft", "experiment", plan.protocol, "--config", str(record.folder / PLAN)),
                *("--output", str(record.folder)),
            )
        ),
        "shots": images_per_class(shots),
        "untuned": len(record.untuned),
    }


def _each(models: list[str], draw: Any) -> list[dict[str, Any]]:
    return [{"model": model, "svg": Markup(draw(model))} for model in models]


def _lead(record: Record) -> str:
    plan = record.plan
    shots = ", ".join(str(k) if k else "all" for k in plan.shots)
    protocol = find_protocol(plan.protocol)
    tuned = (
        f"; settings chosen on validation images, {len(next(iter(record.trials.values())))} trials "
        "for each method"
        if record.trials
        else "; settings as given"
    )
    return (
        f"{len(plan.methods)} methods, {shots} training images per class, {len(plan.seeds)} seeds"
        f"{tuned}. The protocol of {protocol.source}."
    )


def _paper(record: Record) -> dict[str, Any] | None:
    if record.plan.protocol not in PAPER:
        return None
    what, rows = PAPER[record.plan.protocol]
    columns = list(dict.fromkeys(key for row in rows for key in row.values))
    lines = [
        {
            "method": r.method,
            "cells": [formats.paper_number(r, c) for c in columns],
            "source": r.source,
        }
        for r in rows
    ]
    return {"what": what, "columns": columns, "lines": lines}


def _blocks(record: Record) -> list[dict[str, Any]]:
    """Of each model the first run of a sparse method."""
    found = {}
    for run in record.runs:
        model, train, method = run.cell.contest
        if run.cell.config.method in _SPARSE and model not in found:
            title = f"{method} on {record.names.get(train, train)}, {model}"
            found[model] = {"title": title, "svg": Markup(_blocks_of(run))}
    return list(found.values())


def _blocks_of(run: Run) -> str:
    blocks = run.results["blocks"]
    return figures.blocks_figure(blocks, [k for k in KINDS if any(b["kind"] == k for b in blocks)])


def _bound(record: Record) -> dict[str, Any] | None:
    found = gaps(record)
    if not found:
        return None
    shots = record.plan.most_shots
    last = [gap for gap in found if gap.shots == shots]
    names = names_of(record)
    return {
        "svg": Markup(pictures.bound_figure(last, record)),
        "lines": [
            {
                "model": gap.model,
                "data": names[gap.train],
                "method": gap.method,
                "trained": f"{gap.trained:,}",
                "bits": f"{gap.bits:,.0f}",
                "n": gap.n,
                "measured": f"{100 * gap.measured.mean:+.1f}",
                "bound": f"{100 * gap.bound:,.0f}",
            }
            for gap in last
        ],
    }


def _retrievals(record: Record) -> list[dict[str, Any]]:
    """Of each data set and class: before, and after by each method that has run."""
    names = names_of(record)
    found: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for run in record.runs:
        file = record.folder / run.cell.name / RETRIEVAL
        if not run.cell.retrieval or not file.exists():
            continue
        model, train, method = run.cell.contest
        for grid in read_retrieval(file):
            key = (model, train, grid["dataset"], grid["class"])
            lines = found.setdefault(key, {"before": grid["before"], "after": {}})
            if run.cell.config.method != "zero-shot":
                lines["after"][method] = grid["after"]
    return [
        {
            "title": f"{name!r} in {dataset}, {model} trained on {names[train]}",
            "lines": [("zero-shot", grid["before"]), *grid["after"].items()],
        }
        for (model, train, dataset, name), grid in found.items()
    ]


def _cost_line(cost: Any) -> dict[str, str]:
    step, peak = cost.step_seconds, cost.peak_memory
    return {
        "method": cost.method,
        "trained": f"{cost.trained:,}",
        "share": f"{100 * cost.share:.3g}%",
        "step": "–" if step is None else f"{1000 * step:,.1f} ms",  # noqa: RUF001
        "memory": "–" if peak is None else file_size(peak),  # noqa: RUF001
        "file": file_size(cost.artefact),
    }


def _trials(record: Record, names: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "data": names.get(train, train),
            "method": method,
            "tried": len(trials),
            "missing": sum(score is None for _, score in trials),
            "chosen": _settings(record.chosen.get((model, train, method))),
            "best": _percent(max((s for _, s in trials if s is not None), default=None)),
            "worst": _percent(min((s for _, s in trials if s is not None), default=None)),
        }
        for (model, train, method), trials in record.trials.items()
    ]


def _automatic(record: Record, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Of runs with ``--density auto``: how often each density was chosen."""
    found: dict[Contest, Counter[float]] = {}
    for run in record.runs:
        for trial in run.results["density_trials"]:
            counts = found.setdefault(run.cell.contest, Counter())
            counts[trial["density"]] += trial["chosen"]
    return [
        {
            "model": model,
            "data": names.get(train, train),
            "method": method,
            "runs": counts.total(),
            "chosen": ", ".join(f"{density:g}: {n}" for density, n in sorted(counts.items())),
        }
        for (model, train, method), counts in found.items()
    ]


def _settings(chosen: Mapping[str, Any] | None) -> str:
    if chosen is None:
        return "nothing (yet)"
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in chosen.items()
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"  # noqa: RUF001
