"""The report of a run: one self-contained page, built from the files in the run's folder."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from saft_clip import figures
from saft_clip.adapter_file import ADAPTER
from saft_clip.config import FinetuneConfig, dashed
from saft_clip.data import distinct_names
from saft_clip.errors import CheckpointError
from saft_clip.forms import require_form
from saft_clip.methods import find
from saft_clip.metrics import LINES, read_metrics
from saft_clip.models import brings_quick_gelu
from saft_clip.results import KINDS, read_results
from saft_clip.run_folder import RunFolder
from saft_kernels.files import atomic_write

TEMPLATES = Path(__file__).parent / "templates"


def write_report(path: str | Path) -> Path:
    """Build ``report.html`` of a finished run (or demo) from the files in its folder.

    Args:
        path: the folder.

    Returns:
        The page.

    Raises:
        CheckpointError: if the folder holds no finished run, or a file of it is broken.
        FileWriteError: if the page cannot be written.
    """
    folder = RunFolder(path)
    if (folder.path / "demo.json").exists():
        from saft_clip.demo_page import write_demo_page  # that module builds on this one

        return write_demo_page(folder.path)
    if not folder.finished():
        raise CheckpointError(
            f"{folder.path} holds no finished run (there is no {folder.results.name}): finish it "
            f"with saft finetune --resume --output {folder.path}, or give another folder"
        )
    config = FinetuneConfig.load(folder.config)
    results, metrics = read_results(folder.results), read_metrics(folder.metrics)
    for number, line in enumerate(metrics, start=1):
        require_form(line, LINES[line["kind"]], f"line {number:,} of {folder.metrics}")
    content = page_content(folder.path, config, results, metrics)
    write_page(folder.report, "report.html.j2", content)
    return folder.report


def write_page(
    path: Path, template: str, content: Mapping[str, Any], folder: Path = TEMPLATES
) -> None:
    """Fill a template and write the page, atomically.

    Args:
        path: of the page.
        template: its name.
        content: what it shows.
        folder: that holds it; what it extends may also be one of this package's.

    Raises:
        FileWriteError: if it cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(percent=percent, points=points, signed=signed)
    page = environment.get_template(template).render(content)
    with atomic_write(path) as temporary:
        # A file name that is not UTF-8 shows its bytes as \udcff.
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def page_content(
    folder: Path,
    config: FinetuneConfig,
    results: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What the report's template shows of the run in this folder."""
    rows = accuracy_rows(results["evaluations"])
    trained = any(line["kind"] == "train" for line in metrics)
    return {
        "title": f"{results['model']}: {results['method']} on {Path(config.train_data).name}",
        "lead": _lead(config, results),
        "tiles": _tiles(rows, results),
        "rows": rows,
        "accuracy_note": _accuracy_note(results),
        "accuracy": Markup(figures.accuracy_figure(rows)) if rows else "",
        "curves": Markup(figures.curves_figure(metrics)) if trained else "",
        "densities": results["density_trials"],
        "blocks": Markup(_blocks(results["blocks"])),
        "blocks_note": _blocks_note(config, results),
        "kinds": _kind_rows(results["blocks"]),
        "usage_note": _usage_note(results),
        "usage": shlex.join(["saft", "evaluate", *_usage(folder, config, results)]),
        "settings": _settings(config, results),
        "surroundings": _surroundings(config, results),
        "command": config.changed(resume=False).command(),
    }


def accuracy_rows(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per data set that was evaluated before and after, those in distribution first."""
    before = {line["spec"]: line for line in evaluations if line["when"] == "before"}
    after = {line["spec"]: line for line in evaluations if line["when"] == "after"}
    names = distinct_names(list(after), [line["dataset"] for line in after.values()])
    rows = [
        {
            "name": name,
            "shifted": new["shifted"],
            "includes_training": new.get("includes_training", False),
            "n": new["n"],
            "before": before[spec]["top1"],
            "after": new["top1"],
            "before_stderr": before[spec]["top1_stderr"],
            "after_stderr": new["top1_stderr"],
            "top5": new["top5"],
            "mean_per_class": new["mean_per_class"],
        }
        for name, (spec, new) in zip(names, after.items(), strict=True)
    ]
    return sorted(rows, key=lambda row: row["shifted"])


def percent(value: float) -> str:
    """A fraction of 1 as percent."""
    return f"{100 * value:.1f}%"


def points(value: float) -> str:
    """A difference of fractions in percentage points."""
    return f"{100 * value:.1f}"


def signed(value: float) -> str:
    """The same, with its sign."""
    return f"{100 * value:+.1f}"


def file_size(count: float) -> str:
    """Bytes for people: 1 kB is 1,000 bytes."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _lead(config: FinetuneConfig, results: Mapping[str, Any]) -> str:
    if config.method == "zero-shot":
        return f"Nothing was trained: the weights {results['pretrained']!r} as they are."
    images = f"{config.shots} images per class" if config.shots else "all images"
    length = f"{config.epochs} epochs"
    if config.min_steps:
        length = f"at least {length} and {config.min_steps:,} steps"
    return (
        f"Trained on {images} of {config.train_data}, {length}, "
        f"seed {config.seed}, starting from the weights {results['pretrained']!r}."
    )


def _tiles(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> list[dict[str, str]]:
    tiles = []
    for shifted, label in ((False, "in distribution"), (True, "on shifted data")):
        part = [row for row in rows if row["shifted"] == shifted]
        if part:
            before, after = (sum(r[when] for r in part) / len(part) for when in ("before", "after"))
            mean = f", mean of {len(part)}" if len(part) > 1 else ""
            detail = f"{signed(after - before)} points, from {percent(before)}"
            if any(row["includes_training"] for row in part):
                detail += "; training images included"
            tone = "up" if after > before else "down" if after < before else ""
            tiles.append(_tile(percent(after), f"accuracy {label}{mean}", detail, tone))
    share = results["trained"] / results["parameters"]
    tiles.append(
        _tile(
            f"{results['trained']:,}",
            "trained parameters",
            f"{100 * share:.3g}% of {results['parameters']:,}",
        )
    )
    ratio = results["model_bytes"] / results["artefact_bytes"]
    tiles.append(
        _tile(
            file_size(results["artefact_bytes"]),
            results["artefact"],
            f"the model's weights take {file_size(results['model_bytes'])}"
            + (f", {ratio:,.0f} times as much" if ratio >= 2 else ""),
        )
    )
    return tiles


def _tile(value: str, label: str, detail: str = "", tone: str = "") -> dict[str, str]:
    return {"value": value, "label": label, "detail": detail, "tone": tone}


def _kinds(blocks: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(k for k in KINDS if any(b["kind"] == k for b in blocks))


def _kind_rows(blocks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for kind in _kinds(blocks):
        cells = []
        for encoder in ("image", "text"):
            mine = [b for b in blocks if (b["encoder"], b["kind"]) == (encoder, kind)]
            trained, size = (sum(b[key] for b in mine) for key in ("trained", "parameters"))
            share = f"{100 * trained / size:.3g}%" if size else "–"  # noqa: RUF001
            cells.append({"trained": trained, "share": share})
        rows.append({"kind": kind, "cells": cells})
    return rows


def _accuracy_note(results: Mapping[str, Any]) -> str:
    if results["artefact"] == ADAPTER:
        return (
            f"Top-1: before, zero-shot by class prompts; after, as {results['method']} classifies."
        )
    return "Zero-shot classification by class prompts, top-1."


def _blocks(blocks: Sequence[Mapping[str, Any]]) -> str:
    """The figure of trained parameters; nothing, if none of the encoders' are."""
    if not any(block["trained"] for block in blocks):
        return ""
    return figures.blocks_figure(blocks, _kinds(blocks))


def _blocks_note(config: FinetuneConfig, results: Mapping[str, Any]) -> str:
    if config.method == "full":
        return "Full fine-tuning trains every parameter of both encoders."
    if config.method != "saft":
        method = find(config.method)
        return f"{method.title} trains {method.does}. After: {method.source}."
    entries = (
        "entries with the largest mean gradient, one ranking over both encoders"
        if config.mask is None
        else f"entries of the given mask {config.mask}"
    )
    return (
        f"The {results['trained']:,} {entries}. Blocks are numbered along the data's way; in: "
        "embeddings and stem, out: final norm and projection. Every other parameter has its "
        "pretrained value, bit for bit."
    )


def _usage_note(results: Mapping[str, Any]) -> str:
    if results["artefact"] == ADAPTER:
        return (
            "The file holds what was trained beside the model's own weights, or in place of some. "
            "Classes that were not trained on can be evaluated with it, too."
        )
    if not _is_delta(results):
        return "The file holds all weights of the model."
    return (
        "The delta is applied to the pretrained model that it was made from, and can be reverted."
    )


def _usage(folder: Path, config: FinetuneConfig, results: Mapping[str, Any]) -> list[str]:
    """The options, other than their defaults, with which ``saft evaluate`` gives these results."""
    model, pretrained = results["model"], results["pretrained"]
    artefact = str(folder / results["artefact"])
    options = {
        "--pretrained": [pretrained] if pretrained != "builtin" else [],
        "--delta": [artefact],
        "--template": config.template,
        "--precision": [config.precision] if config.precision != "fp32" else [],
        "--device": [config.device] if config.device != "cpu" else [],
        "--data": config.eval_data or (config.train_data,),
    }
    quick_gelu = config.force_quick_gelu
    if results["artefact"] == ADAPTER:
        options |= {"--delta": [], "--adapter": [artefact]}
    elif not _is_delta(results):
        options |= {"--pretrained": [artefact], "--delta": []}
        # A tag brings it along, a file of weights does not.
        quick_gelu |= brings_quick_gelu(model, pretrained)
    words = [word for flag, values in options.items() for one in values for word in (flag, one)]
    return ["--model", model, *(["--force-quick-gelu"] if quick_gelu else []), *words]


def _is_delta(results: Mapping[str, Any]) -> bool:
    return bool(results["artefact"] == "delta.safetensors")


def _settings(config: FinetuneConfig, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    values = config.to_dict()
    del values["resume"]
    for item in fields(config):  # what this method has no use for
        if item.metadata.get("by_method") and values[item.name] is None:
            del values[item.name]
    for trial in results["density_trials"]:
        if trial["chosen"]:
            values["density"] = f"{trial['density']:g} (chosen by auto)"
            values["lr"] = f"{trial['lr']:.3g} ({values['lr']:g} at density 0.001)"
    if config.mask is not None:  # --density had no say
        share = results["trained"] / results["parameters"]
        values["density"] = f"{share:.3g} (of the given mask)"
    return [(dashed(name), _plain(value)) for name, value in values.items()]


def _surroundings(config: FinetuneConfig, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    seconds = [(f"{what} took", f"{value:,.1f} s") for what, value in results["seconds"].items()]
    cost = results["cost"]
    if cost["step_seconds"] is not None:
        seconds.append(("a step took", f"{1000 * cost['step_seconds']:,.1f} ms (median)"))
    if cost["peak_memory_bytes"] is not None:
        where = "of the GPU" if config.device.startswith("cuda") else "of the process"
        seconds.append(("peak memory", f"{file_size(cost['peak_memory_bytes'])} {where}"))
    return [*seconds, *results["environment"].items()]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"  # noqa: RUF001
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)  # noqa: RUF001
