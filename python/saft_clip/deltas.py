"""What the commands on deltas do: each returns what ``--json`` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from saft_clip.config import DEFAULT_PRETRAINED
from saft_clip.errors import ConfigError
from saft_clip.export import save_open_clip, save_transformers
from saft_clip.figures import shortened
from saft_clip.models import ClipModel, load_model
from saft_clip.overlap_picture import check_picture, save_overlap
from saft_kernels.delta import (
    SparseDelta,
    compose,
    diff,
    extract,
    open_weights,
    overlap,
    save_patches,
    save_shira,
    save_weights,
)
from saft_kernels.delta.places import Target
from saft_kernels.errors import DeltaError
from saft_kernels.files import require_writable
from saft_kernels.untrusted import shown

#: Metadata of a delta that a table shows at most; ours has a dozen.
MOST_SHOWN = 100

FORMATS = ("open_clip", "transformers", "vllm", "shira")

Facts = dict[str, Any]


# The base -----------------------------------------------------------------------------------------


def load_base(delta: SparseDelta, model: str | None, base: str | None) -> ClipModel | None:
    """The model that a delta was made from; None if no name of open_clip's is known for it.

    Args:
        delta: says which, if it was made by ``saft``.
        model: name of the model, if it is not the delta's.
        base: tag or file of its weights, if they are not the delta's.
    """
    about = delta.metadata
    name = model or about.get("model")
    if name is None:
        return None
    weights = base or about.get("pretrained") or DEFAULT_PRETRAINED.get(name)
    quick = about.get("force_quick_gelu") == "yes"
    return load_model(name, weights, force_quick_gelu=quick)


def base_weights(delta: SparseDelta, model: str | None, base: str | None) -> Target:
    """The same as a model, or as the tensors of the file ``base``.

    Raises:
        ConfigError: if neither the delta nor the caller says what the base is.
    """
    clip = load_base(delta, model, base)
    if clip is not None:
        return clip.model
    if base is None:
        raise ConfigError(
            "the delta does not say which model it was made from; give --base with a file of its "
            "weights, or --model too"
        )
    return open_weights(base)


def know_originals(delta: SparseDelta, model: str | None, base: str | None) -> None:
    """Make sure that the original values are known, from the base if they are not in the file."""
    if not delta.knows_originals:
        delta.learn_originals(base_weights(delta, model, base))


# Looking ------------------------------------------------------------------------------------------


def info(file: Path) -> Facts:
    """What a delta file holds."""
    delta = SparseDelta.load(file)
    size = file.stat().st_size
    return {
        "file": str(file),
        "bytes": size,
        "entries": delta.nnz,
        "bytes_per_entry": size / delta.nnz if delta.nnz else None,
        "parameters": sum(math.prod(shape) for shape in delta.shapes.values()),
        "density": delta.density,
        "created_by": delta.created_by,
        "with_originals": delta.knows_originals,
        "metadata": delta.metadata,
        "tensors": [
            {
                "name": record.name,
                "tied": list(record.tied),
                "dtype": str(record.dtype).removeprefix("torch."),
                "shape": list(record.shape),
                "entries": record.indices.numel(),
                "fingerprint": record.fingerprint,
            }
            for record in delta.records
        ],
    }


def verify(file: Path, model: str | None, base: str | None) -> Facts:
    """Whether a file is whole, and its base the one that is at hand.

    Raises:
        SaftError: saying what is wrong.
    """
    delta = SparseDelta.load(file)
    known = "model" in delta.metadata or model is not None or base is not None
    if known:
        target = base_weights(delta, model, base)
        delta.base.require(delta.base.find(target))
    return {"file": str(file), "whole": True, "fits_base": True if known else None}


def compare(first: Path, second: Path, model: str | None, base: str | None) -> Facts:
    """Two deltas of one base, entry by entry."""
    deltas = [SparseDelta.load(file) for file in (first, second)]
    if model is not None or base is not None:
        for delta in deltas:
            know_originals(delta, model, base)
    found = diff(*deltas)
    return {
        "first": str(first),
        "second": str(second),
        **asdict(found.total),
        "distance": found.distance,
        "metadata": {key: list(pair) for key, pair in found.metadata.items()},
        "tensors": {
            name: asdict(counted) for name, counted in found.parameters.items() if not counted.equal
        },
    }


# Making weights -----------------------------------------------------------------------------------


def apply(file: Path, output: Path, model: str | None, base: str | None, alpha: float) -> Facts:
    """Write the weights of the fine-tuned model, or of one between it and its base."""
    _require_weights(output)
    delta = SparseDelta.load(file)
    target = _own(base_weights(delta, model, base))
    if alpha != 1:
        delta.learn_originals(target)
        delta = delta.scale(alpha)
    delta.apply_(target)
    save_weights(output, _state(target))
    return {"file": str(file), "output": str(output), "entries": delta.nnz, "alpha": alpha}


def revert(file: Path, tuned: Path, output: Path) -> Facts:
    """Write the base's weights, from the fine-tuned ones and the originals in the delta's file."""
    _require_weights(output)
    delta = SparseDelta.load(file)
    if not delta.knows_originals:
        raise DeltaError(
            f"{file} holds no original values, so that the base cannot be made of {tuned}; load "
            "the base itself, or save deltas with originals"
        )
    weights = _own(open_weights(tuned))
    delta.revert_(weights)
    save_weights(output, _state(weights))
    return {"file": str(file), "tuned": str(tuned), "output": str(output), "entries": delta.nnz}


def export(
    file: Path, form: str, output: Path, model: str | None, base: str | None, partial: bool
) -> Facts:
    """Write the fine-tuned model, or its change, as another program reads it."""
    if form not in FORMATS:
        raise ConfigError(f"--format must be {' or '.join(FORMATS)}, not {form!r}")
    delta = SparseDelta.load(file)
    facts = {"file": str(file), "format": form, "output": str(output), "entries": delta.nnz}
    if form == "vllm":
        require_writable(output)
        save_patches(delta, output)
        return facts
    clip = load_base(delta, model, base)
    if clip is None:
        raise ConfigError(
            "the delta does not say which model it was made from; give --model to export it as "
            + form
        )
    if form == "shira":
        delta.learn_originals(clip.model)
        left = save_shira(delta, clip.model, output, base_model=clip.name, partial=partial)
        return {**facts, "left_out": left}
    if form == "open_clip":
        _require_weights(output)
    delta.apply_(clip.model)
    if form == "open_clip":
        save_open_clip(clip.model, output)
    else:
        save_transformers(clip, output)
    return facts


def _require_weights(output: Path) -> None:
    """Programs that load weights go by the name."""
    if output.suffix != ".safetensors":
        raise ConfigError(f"{output} must end in .safetensors, so that it is loaded as what it is")
    require_writable(output)


def _own(target: Target) -> Target:
    """Something that may be written to: weights in a file are not."""
    if isinstance(target, torch.nn.Module):
        return target
    copies: dict[int, torch.Tensor] = {}  # what is tied stays tied
    return {
        name: copies.setdefault(tensor.data_ptr() or id(tensor), tensor.clone())
        for name, tensor in target.items()
    }


def _state(target: Target) -> Mapping[str, torch.Tensor]:
    return target.state_dict() if isinstance(target, torch.nn.Module) else target


# Making deltas ------------------------------------------------------------------------------------


def scale(
    file: Path, alpha: float, output: Path, model: str | None, base: str | None, originals: bool
) -> Facts:
    """Write the delta of a model between the base and the fine-tuned one (WiSE-FT)."""
    require_writable(output)
    delta = SparseDelta.load(file)
    know_originals(delta, model, base)
    scaled = delta.scale(alpha)
    scaled.save(output, originals=originals)
    return {"file": str(file), "output": str(output), "alpha": alpha, "entries": scaled.nnz}


def merge(
    files: Sequence[Path],
    output: Path,
    *,
    rule: str,
    weights: Sequence[float] | None,
    keep: float,
    drop: float,
    seed: int,
    model: str | None,
    base: str | None,
    originals: bool,
    picture: Path | None,
) -> Facts:
    """Write one delta that does what several do, and say where they meet."""
    require_writable(output)
    if picture is not None:
        check_picture(picture)
        require_writable(picture)
    deltas = [SparseDelta.load(file) for file in files]
    for delta in deltas:
        know_originals(delta, model, base)
    made = compose(deltas, rule, weights=weights, keep=keep, drop=drop, seed=seed)
    made.save(output, originals=originals)
    met = overlap(deltas)
    if picture is not None:
        save_overlap(met, _names(files), picture)
    return {
        "files": [str(file) for file in files],
        "output": str(output),
        "rule": rule,
        "entries": made.nnz,
        "overlap": asdict(met),
        "picture": None if picture is None else str(picture),
    }


def _names(files: Sequence[Path]) -> list[str]:
    """What tells the files apart: their names, or their folders' if all have one name."""
    stems = [file.stem for file in files]
    return stems if len(set(stems)) == len(stems) else [str(file) for file in files]


def take(
    tuned: str,
    output: Path,
    *,
    base: str | None,
    model: str | None,
    force_quick_gelu: bool,
    density: float | None,
    exclude: Sequence[str],
    metadata: Mapping[str, str],
    originals: bool,
) -> Facts:
    """Write the delta of two models: of open_clip's ``model``, or of any two files of weights."""
    require_writable(output)
    texts = dict(metadata)
    if model is None:
        if base is None:
            raise ConfigError("give --base, the weights that fine-tuning started from")
        pair: tuple[Target, Target] = open_weights(tuned), open_weights(base)
    else:
        weights = base or DEFAULT_PRETRAINED.get(model)
        start, end = (
            load_model(model, each, force_quick_gelu=force_quick_gelu) for each in (weights, tuned)
        )
        pair = end.model, start.model
        texts = {"model": start.name, "pretrained": str(start.pretrained), **texts}
        if force_quick_gelu:
            texts["force_quick_gelu"] = "yes"
    found = extract(*pair, density, exclude=exclude, metadata=texts)
    found.delta.save(output, originals=originals)
    return {
        "tuned": tuned,
        "output": str(output),
        "bytes": output.stat().st_size,
        "entries": found.delta.nnz,
        "density": found.delta.density,
        "different": found.different,
        "error": found.error,
        "largest": found.largest,
        "left_out": list(found.left_out),
    }


# Showing ------------------------------------------------------------------------------------------


def info_table(facts: Facts) -> Table:
    """What a delta file holds."""
    changed = sum(1 for tensor in facts["tensors"] if tensor["entries"])
    each = facts["bytes_per_entry"]
    more = len(facts["metadata"]) - MOST_SHOWN
    rows = [
        ("file", f"{facts['bytes']:,} bytes" + (f", {each:.2f} for each entry" if each else "")),
        ("changed", f"{facts['entries']:,} of the model's {facts['parameters']:,} parameters"),
        ("tensors", f"{changed:,} of {len(facts['tensors']):,}"),
        ("original values", "in the file" if facts["with_originals"] else "not in the file"),
        ("written by", facts["created_by"]),
        *islice(facts["metadata"].items(), MOST_SHOWN),
        *([("...", f"and {more:,} more")] if more > 0 else []),
    ]
    table = Table(title=escape(shown(facts["file"], 1000)), show_header=False)
    for name, fact in rows:  # whoever made the file chose them: they may not steer the terminal
        table.add_row(escape(shown(name)), escape(shown(fact, 1000)))
    return table


def difference_table(facts: Facts) -> Table:
    """How two deltas differ, in all and in the tensors where they do."""
    title = f"{facts['first']} and {facts['second']}"
    table = Table(title=escape(title), caption=_distance(facts["distance"]))
    table.add_column("tensor", overflow="fold")
    kinds = {
        "only_first": "first only",
        "only_second": "second only",
        "same": "equal",
        "different": "unequal",
    }
    for heading in kinds.values():
        table.add_column(heading, justify="right")
    for name, counted in facts["tensors"].items():
        table.add_row(escape(shown(name)), *(f"{counted[kind]:,}" for kind in kinds))
    table.add_section()
    table.add_row("all", *(f"{facts[kind]:,}" for kind in kinds))
    return table


def metadata_table(facts: Facts) -> Table:
    """What is written differently about two deltas."""
    table = Table(title="What is written about them, where it differs")
    for heading in ("", facts["first"], facts["second"]):
        table.add_column(escape(heading), overflow="fold")
    for key, texts in islice(facts["metadata"].items(), MOST_SHOWN):
        cells = ("" if text is None else shortened(shown(text), 60) for text in texts)
        table.add_row(escape(shown(key)), *map(escape, cells))
    return table


def _distance(distance: float | None) -> str:
    if distance is None:
        return "the distance of the two models is known with --base only"
    return f"Euclidean distance of the two models: {distance:.4g}"


def overlap_table(facts: Facts) -> Table:
    """What several deltas share, pair by pair."""
    met, names = facts["overlap"], _names([Path(file) for file in facts["files"]])
    table = Table(title="Entries that they share, and how many of them change in one direction")
    table.add_column("", overflow="fold")
    for name in names:
        table.add_column(escape(name), justify="right", overflow="fold")
    for name, shared, agree in zip(names, met["shared"], met["agree"], strict=True):
        cells = [f"{s:,} ({a:,})" for s, a in zip(shared, agree, strict=True)]
        table.add_row(escape(name), *cells)
    return table


def said_of_extraction(facts: Facts) -> str:
    """What was written, and what it leaves out."""
    what = "nothing is left out"
    if facts["entries"] < facts["different"]:
        what = (
            f"what is left out is {facts['error']:.2%} of the difference (Euclidean norm), at most "
            f"{facts['largest']:.3g} in one entry"
        )
    return (
        f"wrote {facts['output']} ({facts['bytes']:,} bytes): {facts['entries']:,} of "
        f"{facts['different']:,} entries that differ; {what}"
    )
