"""What the shorter commands of the command line do."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from saft_clip.batches import ordered_batches
from saft_clip.config import FinetuneConfig
from saft_clip.console import output, progress, say
from saft_clip.data import distinct_names, load_dataset
from saft_clip.errors import ConfigError
from saft_clip.evaluate import Evaluation, evaluate
from saft_clip.methods.base import FROZEN
from saft_clip.methods.saft import Saft
from saft_clip.prompts import ClassPrompts
from saft_clip.shortages import explained_shortages
from saft_clip.train import RunData, finetune, load_base
from saft_clip.tuned import load_tuned
from saft_kernels.files import atomic_write, require_writable
from saft_kernels.mask import CooMask
from saft_kernels.select import select


@explained_shortages()
def evaluate_command(
    data: Sequence[str],
    *,
    model: str | None,
    pretrained: str | None,
    force_quick_gelu: bool,
    delta: Path | None,
    adapter: Path | None,
    split: str,
    templates: Sequence[str] | None,
    batch_size: int,
    precision: str,
    device: str,
    workers: int,
    json_file: Path | None,
) -> list[Evaluation]:
    """Evaluate a model on data sets; print a table and write JSON.

    Without ``model`` it is the one that the delta or the adapter was made for; QuickGELU is used
    where it was made with it. Whatever can be wrong with the arguments is found before the first
    evaluation.
    """
    if json_file is not None:
        require_writable(json_file)
    if delta is not None and adapter is not None:
        raise ConfigError("give --delta or --adapter, not both: a run writes one of them")
    clip, scores = load_tuned(
        model,
        pretrained,
        delta=delta,
        adapter=adapter,
        device=device,
        precision=precision,
        force_quick_gelu=force_quick_gelu,
    )
    datasets = [load_dataset(s, split, clip.preprocess_val, templates=templates) for s in data]
    results = [
        evaluate(
            clip,
            dataset,
            functools.partial(scores, show_progress=True),
            batch_size=batch_size,
            device=device,
            precision=precision,
            workers=workers,
        )
        for dataset in datasets
    ]
    if json_file is not None:
        content = {
            "model": clip.name,
            "pretrained": clip.pretrained,
            "delta": None if delta is None else str(delta),
            "adapter": None if adapter is None else str(adapter),
            "split": split,
            "precision": precision,
            "results": [
                {"data": spec, **result.to_dict()}
                for spec, result in zip(data, results, strict=True)
            ],
        }
        with atomic_write(json_file) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    what = ", ".join(str(each) for each in (clip.name, clip.pretrained, delta, adapter) if each)
    output.print(evaluation_table(data, results, what))
    return results


def finetune_command(config: FinetuneConfig) -> None:
    """Fine-tune a model and print what that did to its accuracy."""
    results = finetune(config).results
    if results["evaluations"]:
        output.print(before_and_after_table(results["evaluations"]))


def before_and_after_table(evaluations: Sequence[Mapping[str, Any]]) -> Table:
    """Top-1 accuracy in percent before and after fine-tuning, one row for each data set."""
    table = Table(caption="top-1 accuracy in %, ± one standard error of the evaluation")
    table.add_column("data", overflow="fold")
    for name in ("images", "before", "after", "change"):
        table.add_column(name, justify="right")
    found = {(line["spec"], line["when"]): line for line in evaluations}
    specs = list(dict.fromkeys(line["spec"] for line in evaluations))
    names = distinct_names(specs, [found[spec, "after"]["dataset"] for spec in specs])
    for spec, name in zip(specs, names, strict=True):
        before, after = found[spec, "before"], found[spec, "after"]
        table.add_row(
            escape(name + _remark(after)),
            f"{after['n']:,}",
            *(f"{100 * x['top1']:.2f} ± {100 * x['top1_stderr']:.2f}" for x in (before, after)),
            f"{100 * (after['top1'] - before['top1']):+.2f}",
        )
    return table


def _remark(evaluation: Mapping[str, Any]) -> str:
    if evaluation.get("includes_training"):
        return " (training images included)"
    return " (shifted)" if evaluation["shifted"] else ""


@explained_shortages()
def select_command(config: FinetuneConfig, density: float, score: str, file: Path) -> CooMask:
    """Select a mask on the training images, as ``saft finetune`` does, and save it."""
    require_writable(file)
    clip = load_base(config)
    dataset = RunData(config, clip).plain
    prompts = ClassPrompts(dataset.class_names, dataset.templates, clip.tokenizer)
    method = Saft(clip, prompts, config)
    batches = ordered_batches(dataset, config.batch_size, config.workers)
    with progress("selecting", len(batches), unit="batches") as advance:
        mask = select(
            clip.model,
            lambda model, batch: method.loss(*batch),
            batches,
            density=density,
            score=score,  # type: ignore[arg-type]  # select() itself checks it
            exclude=FROZEN,
            progress=lambda done, total, what: advance(),
            seed=config.seed,
        )
    mask.save(file)
    say(f"wrote {file}: {mask.nnz:,} of {mask.numel:,} parameters, in {len(mask)} tensors")
    return mask


def evaluation_table(specs: Sequence[str], results: Sequence[Evaluation], title: str) -> Table:
    """Accuracies in percent, one row for each data set and their mean."""
    table = Table(title=escape(title), caption="accuracies in %, ± one standard error")
    table.add_column("data", overflow="fold")
    for name in ("images", "top-1", "top-5", "mean per class"):
        table.add_column(name, justify="right")
    names = distinct_names(specs, [result.dataset for result in results])
    for name, result in zip(names, results, strict=True):
        table.add_row(
            escape(name),
            f"{result.n:,}",
            f"{100 * result.top1:.2f} ± {100 * result.top1_stderr:.2f}",
            f"{100 * result.top5:.2f}",
            f"{100 * result.mean_per_class:.2f} ± {100 * result.mean_per_class_stderr:.2f}",
        )
    if len(results) > 1:
        means = [
            sum(getattr(result, name) for result in results) / len(results)
            for name in ("top1", "top5", "mean_per_class")
        ]
        table.add_section()
        table.add_row("mean", "", *(f"{100 * mean:.2f}" for mean in means))
    return table
