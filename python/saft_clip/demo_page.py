"""The demo's table and page, from what it measured (``demo.json``)."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.table import Table

from saft_clip import figures
from saft_clip.errors import CheckpointError
from saft_clip.forms import (
    Form,
    is_count,
    is_name,
    is_number,
    is_positive,
    is_share,
    is_text,
    one_of,
    require_form,
)
from saft_clip.report import file_size, write_page
from saft_clip.run_folder import read_json
from saft_kernels.untrusted import shown

#: What the demo measured, in its folder.
SUMMARY = "demo.json"

Statistic = tuple[float, float]
"""A mean over seeds and its standard error; nan where there is one value only."""


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The table for the terminal: a row per domain, a column per method."""
    contenders = contender_outcomes(summary)
    table = Table(
        title="accuracy in %, mean ± standard error over seeds",
        caption=_sizes(summary),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("domain")
    for name in contenders:
        table.add_column(name, justify="right")
    for section in sections(summary):
        for domain in section["domains"]:
            table.add_row(domain, *_cells(contenders, [domain]))
        if len(section["domains"]) > 1:
            table.add_row("[b]mean of these", *_cells(contenders, section["domains"]))
        table.add_section()
    trained = (f"{outcomes[0]['trained']:,}" for outcomes in contenders.values())
    table.add_row("trained parameters", *trained)
    return table


def sections(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The domains by their role."""
    roles = summary["roles"]
    return [
        {"title": "in distribution", "domains": [roles["trained"]]},
        {"title": "shifted", "domains": list(roles["shifted"])},
        {"title": "classes not trained", "domains": [roles["new_classes"]]},
    ]


def contender_outcomes(summary: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Zero-shot, full fine-tuning, and SAFT at the chosen density: outcomes over seeds."""
    density = summary["chosen"]["saft"]["density"]
    return {
        "zero-shot": outcomes_of(summary, "zero-shot"),
        "full fine-tuning": outcomes_of(summary, "full"),
        f"SAFT {percentage(density)}": outcomes_of(summary, "saft", density),
    }


def outcomes_of(
    summary: Mapping[str, Any], method: str, density: float | None = None
) -> list[Mapping[str, Any]]:
    """The final outcomes of a method, one per seed."""
    return [
        outcome
        for outcome in summary["finals"]
        if outcome["trial"]["method"] == method and density in (None, outcome["trial"]["density"])
    ]


def accuracy(outcomes: Sequence[Mapping[str, Any]], domains: Sequence[str]) -> Statistic:
    """Mean over seeds of the mean over domains, and its standard error over seeds."""
    values = [sum(o["accuracy"][d] for d in domains) / len(domains) for o in outcomes]
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, float("nan")
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, sqrt(variance / len(values))


def percentage(density: float) -> str:
    """A density for people: 0.1%."""
    return f"{100 * density:g}%"


def written(statistic: Statistic) -> str:
    """``91.2 ± 0.4``, or ``91.2`` where there is no error."""
    mean, error = statistic
    return f"{100 * mean:.1f}" if error != error else f"{100 * mean:.1f} ± {100 * error:.1f}"


def _cells(contenders: Mapping[str, list[Mapping[str, Any]]], domains: Sequence[str]) -> list[str]:
    return [written(accuracy(outcomes, domains)) for outcomes in contenders.values()]


def _sizes(summary: Mapping[str, Any]) -> str:
    delta, model = (summary["artefacts"][f"{n}.safetensors"] for n in ("delta", "model"))
    return f"SAFT's delta: {file_size(delta)}; the whole model: {file_size(model)}"


def _is_density_and_rates(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2
    return pair and is_positive(value[0]) and is_share(value[0])


_TRIAL: Form = {
    **{"method": one_of("saft", "full", "zero-shot"), "lr": is_number, "density": is_share}
}
_OUTCOME: Form = {"trial": _TRIAL, "accuracy": {str: is_share}, "trained": is_count}

#: What the table and the page use of ``demo.json``.
_FORM: Form = {
    "plan": {
        **{"shots": is_count, "trained": is_name, "epochs": is_count, "seeds": [is_count]},
        "saft_lrs": [_is_density_and_rates],
    },
    "domains": {str: is_text},
    "roles": {"trained": is_name, "shifted": [is_name], "new_classes": is_name},
    **{"images": {str: is_count}, "tuning": [_OUTCOME], "finals": [_OUTCOME]},
    "chosen": {"full": {"lr": is_number}, "saft": {"lr": is_number, "density": is_share}},
    "artefacts": {"delta.safetensors": is_count, "model.safetensors": is_count},
    **{"seconds": is_number, "environment": {str: is_text}},
}


def _read(path: Path) -> dict[str, Any]:
    summary: dict[str, Any] = read_json(path)
    require_form(summary, _FORM, str(path))
    known = summary["images"].keys() & summary["domains"].keys()
    used = {domain for section in sections(summary) for domain in section["domains"]}
    # A picture is looked for under the name of its domain, which is no path.
    if not used <= known or not all(map(is_name, summary["domains"])):
        raise CheckpointError(f"{path} is not what this release writes: a domain is unknown")
    return summary


# The page ---------------------------------------------------------------------------------------


def write_demo_page(folder: Path) -> Path:
    """Build ``report.html`` from the files in a demo's folder.

    Raises:
        CheckpointError: if a file is missing or broken.
        FileWriteError: if the page cannot be written.
    """
    summary = _read(folder / SUMMARY)
    page = folder / "report.html"
    try:
        content = _content(summary, lambda name: _picture(folder / "samples" / f"{name}.png"))
    except (LookupError, ZeroDivisionError) as error:  # of outcomes that do not belong together
        raise CheckpointError(
            f"{folder / SUMMARY} is not what this release writes: it lacks {shown(repr(error))}"
        ) from error
    write_page(page, "demo.html.j2", content)
    return page


def _content(summary: Mapping[str, Any], picture: Callable[[str], str]) -> dict[str, Any]:
    contenders = contender_outcomes(summary)
    return {
        "lead": _lead(summary),
        "tiles": _tiles(summary, contenders),
        "names": list(contenders),
        "bars": Markup(figures.contenders_figure(_bars(summary, contenders))),
        "sections": [_section(section, contenders) for section in sections(summary)],
        "trained": [f"{outcomes[0]['trained']:,}" for outcomes in contenders.values()],
        "sweep": Markup(figures.sweep_figure(*_sweep(summary))),
        "sweep_rows": _sweep_rows(summary),
        "tuning": Markup(figures.tuning_figure(_tuning_lines(summary))),
        "tuning_note": _tuning_note(summary),
        "samples": [
            {"name": name, "text": text, "picture": picture(name)}
            for name, text in summary["domains"].items()
        ],
        "sizes": _sizes(summary),
        "images": summary["images"],
        "surroundings": [("took", f"{summary['seconds']:,.0f} s"), *summary["environment"].items()],
    }


def _lead(summary: Mapping[str, Any]) -> str:
    plan = summary["plan"]
    return (
        f"The built-in tiny CLIP, trained on {plan['shots']} images per digit of one domain, "
        f"{plan['trained']} ({summary['domains'][plan['trained']]}), for {plan['epochs']} epochs, "
        f"with {len(plan['seeds'])} seeds. A tiny stand-in: it shows that everything works and how "
        "to look at it; it does not repeat the paper's experiments."
    )


def _tiles(
    summary: Mapping[str, Any], contenders: Mapping[str, list[Mapping[str, Any]]]
) -> list[dict[str, str]]:
    tiles = []
    *_, full, saft = contenders.values()
    for section in sections(summary):
        ours, theirs = (accuracy(outcomes, section["domains"]) for outcomes in (saft, full))
        tiles.append(
            {
                "value": f"{100 * ours[0]:.1f}%",
                "label": f"SAFT, {section['title']}",
                "detail": f"full fine-tuning {100 * theirs[0]:.1f}%",
            }
        )
    sizes = summary["artefacts"]
    tiles.append(
        {
            "value": file_size(sizes["delta.safetensors"]),
            "label": "SAFT's delta file",
            "detail": f"the whole model takes {file_size(sizes['model.safetensors'])}",
        }
    )
    return tiles


def _bars(
    summary: Mapping[str, Any], contenders: Mapping[str, list[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    bars = []
    for section in sections(summary):
        domains = section["domains"]
        name = section["title"] + (f"\n(mean of {len(domains)})" if len(domains) > 1 else "")
        statistics = {key: accuracy(outcomes, domains) for key, outcomes in contenders.items()}
        bars.append({"name": name, "statistics": statistics})
    return bars


def _section(
    section: Mapping[str, Any], contenders: Mapping[str, list[Mapping[str, Any]]]
) -> dict[str, Any]:
    domains = section["domains"]
    rows = [{"name": domain, "cells": _cells(contenders, [domain])} for domain in domains]
    mean = _cells(contenders, domains) if len(domains) > 1 else None
    return {"title": section["title"], "rows": rows, "mean": mean}


def _sweep(summary: Mapping[str, Any]) -> tuple[list[float], list[dict[str, Any]]]:
    densities = [density for density, _ in summary["plan"]["saft_lrs"]]
    panels = []
    for section in sections(summary):
        domains = section["domains"]
        panels.append(
            {
                "title": section["title"],
                "saft": [accuracy(outcomes_of(summary, "saft", d), domains) for d in densities],
                "full": accuracy(outcomes_of(summary, "full"), domains),
                "zero-shot": accuracy(outcomes_of(summary, "zero-shot"), domains),
            }
        )
    return densities, panels


def _sweep_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for density, _ in summary["plan"]["saft_lrs"]:
        outcomes = outcomes_of(summary, "saft", density)
        rows.append(_sweep_row(f"SAFT {percentage(density)}", outcomes, summary))
        rows[-1]["chosen"] = density == summary["chosen"]["saft"]["density"]
    rows.append(_sweep_row("full fine-tuning", outcomes_of(summary, "full"), summary))
    return rows


def _sweep_row(
    name: str, outcomes: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "chosen": False,
        "trained": f"{outcomes[0]['trained']:,}",
        "lr": f"{outcomes[0]['trial']['lr']:.2g}",
        "cells": [written(accuracy(outcomes, s["domains"])) for s in sections(summary)],
    }


def _tuning_lines(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    lines: dict[str, dict[str, Any]] = {}
    for outcome in summary["tuning"]:
        trial = outcome["trial"]
        full = trial["method"] == "full"
        name = "full fine-tuning" if full else f"SAFT {percentage(trial['density'])}"
        line = lines.setdefault(name, {"name": name, "full": full, "lr": [], "accuracy": []})
        line["lr"].append(trial["lr"])
        line["accuracy"].append(outcome["accuracy"]["val"])
    return list(lines.values())


def _tuning_note(summary: Mapping[str, Any]) -> str:
    counts = {
        name: sum(outcome["trial"]["method"] == name for outcome in summary["tuning"])
        for name in ("saft", "full")
    }
    chosen = summary["chosen"]
    return (
        f"{counts['full']} trials of full fine-tuning (learning rates) and {counts['saft']} of "
        "SAFT (learning rates and densities), all with the first seed, compared on "
        f"{summary['images']['val']} validation images of the training domain. Chosen: rate "
        f"{chosen['full']['lr']:.2g} for full fine-tuning, {chosen['saft']['lr']:.2g} at density "
        f"{percentage(chosen['saft']['density'])} for SAFT."
    )


def _picture(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
