"""The best images for a prompt, before and after fine-tuning (SAFT, Figs. 3 and 7)."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from saft_clip.config import FinetuneConfig
from saft_clip.data import ImageDataset, drop_unreadable, load_dataset
from saft_clip.errors import CheckpointError
from saft_clip.evaluate import Scores, zero_shot_scores
from saft_clip.forms import Form, is_count, is_flag, is_text, require_form
from saft_clip.models import ClipModel, autocast, brings_quick_gelu
from saft_clip.prompts import ClassPrompts
from saft_clip.run_folder import read_json, write_json
from saft_clip.train import FinetuneResult, load_base
from saft_clip.tuned import load_tuned

#: In the folder of a run.
RETRIEVAL = "retrieval.json"

#: Images shown for a class.
TOP = 5

#: Edge of an image in pages, in pixels.
_EDGE = 72

#: A model, and how it classifies, see :func:`saft_clip.evaluate.evaluate`.
Classifier = tuple[ClipModel, Callable[[ClassPrompts], Scores]]

_PREFIX = "data:image/png;base64,"


def _is_picture(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(_PREFIX) and len(value) < 1 << 17


_FOUND: Form = [{"index": is_count, "right": is_flag, "picture": _is_picture}]
_GRID: Form = {
    **{"data": is_text, "dataset": is_text, "class": is_text},
    **{"before": _FOUND, "after": _FOUND},
}
_FORM: Form = {"classes": [is_text], "found": [_GRID]}


def save_retrieval(config: FinetuneConfig, result: FinetuneResult, names: Sequence[str]) -> None:
    """Find the best images for these classes in all data that a run was evaluated on.

    Args:
        config: the run's settings.
        result: the finished run, whose artefact must still be there.
        names: of classes; a data set that has none of them is left out.

    Raises:
        CheckpointError: if the artefact is not there any more.
        FileWriteError: if ``retrieval.json`` cannot be written to its folder.
    """
    if not result.artefact.exists():
        raise CheckpointError(
            f"{result.artefact} was not kept, and the best images cannot be found without it"
        )
    found: list[dict[str, Any]] = []
    models = {"before": _pretrained(config), "after": _tuned(config, result)}
    for spec in config.eval_data:
        dataset = load_dataset(
            spec,
            config.eval_split,
            models["before"][0].preprocess_val,
            templates=config.template or None,
        )
        if config.eval_images is not None:
            dataset = dataset.evenly(config.eval_images)
        dataset = drop_unreadable(dataset, show_progress=False)
        shown = [name for name in names if name in dataset.class_names]
        if shown:
            labels = [dataset.class_names.index(name) for name in shown]
            best = dict(
                zip(models, top_images([*models.values()], dataset, labels, config), strict=True)
            )
            found += [
                {
                    "data": spec,
                    "dataset": dataset.name,
                    "class": name,
                    **{when: _described(dataset, label, found[at]) for when, found in best.items()},
                }
                for at, (name, label) in enumerate(zip(shown, labels, strict=True))
            ]
    write_json(result.output / RETRIEVAL, {"classes": list(names), "found": found})


def read_retrieval(path: Path) -> list[dict[str, Any]]:
    """What :func:`save_retrieval` wrote.

    Raises:
        CheckpointError: if the file is missing or broken.
    """
    found: list[dict[str, Any]] = _content(path)["found"]
    return found


def _content(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(path)
    require_form(content, _FORM, str(path))
    return content


def has_retrieval(folder: Path, names: Sequence[str]) -> bool:
    """Whether a run's folder has the best images for these classes, or none are asked for.

    Raises:
        CheckpointError: if the file is broken.
    """
    path = folder / RETRIEVAL
    if not names or not path.exists():
        return not names
    return bool(_content(path)["classes"] == list(names))


def top_images(
    models: Sequence[Classifier],
    dataset: ImageDataset,
    labels: Sequence[int],
    config: FinetuneConfig,
) -> list[list[list[int]]]:
    """For each of these classes the positions of the images that score highest, best first.

    Args:
        models: that images are prepared for in the same way, on ``config.device``.
        dataset: N images, each of which is read once.
        labels: C of its classes.
        config: for precision and loading.

    Returns:
        For each model C lists of min(5, N) positions; of equal scores, the first image.
    """
    loader = DataLoader(
        dataset, batch_size=64, num_workers=config.workers, generator=torch.Generator()
    )
    columns = list(labels)
    with torch.inference_mode(), autocast(config.precision, config.device):
        scores = [_scores(*model, dataset) for model in models]
        parts = [[f(images)[:, columns].float().cpu() for f in scores] for images, _ in loader]
    return [_best(torch.cat(part)) for part in zip(*parts, strict=True)]


def _scores(
    clip: ClipModel, scores: Callable[[ClassPrompts], Scores], dataset: ImageDataset
) -> Scores:
    clip.model.eval()
    return scores(ClassPrompts(dataset.class_names, dataset.templates, clip.tokenizer))


def _best(table: Tensor) -> list[list[int]]:
    """For each column of [N, C] the rows that it is largest in."""
    order = table.argsort(dim=0, descending=True, stable=True)[:TOP]
    found: list[list[int]] = order.T.tolist()
    return found


def _described(dataset: ImageDataset, label: int, best: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "index": index,
            "right": int(dataset.labels[index]) == label,
            "picture": data_uri(dataset.open(index)),
        }
        for index in best
    ]


def data_uri(image: Image.Image) -> str:
    """A small PNG that a page can hold."""
    image = image.copy()
    image.thumbnail((_EDGE, _EDGE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"{_PREFIX}{base64.b64encode(buffer.getvalue()).decode()}"


def _pretrained(config: FinetuneConfig) -> Classifier:
    clip = load_base(config)
    return clip, lambda prompts: zero_shot_scores(clip.model, prompts, config.device)


def _tuned(config: FinetuneConfig, result: FinetuneResult) -> Classifier:
    artefact = result.artefact
    whole = artefact.name == "model.safetensors"
    return load_tuned(
        config.model,
        str(artefact) if whole else config.weights,
        delta=artefact if artefact.name == "delta.safetensors" else None,
        adapter=artefact if artefact.name == "adapter.safetensors" else None,
        device=config.device,
        precision=config.precision,
        # A tag brings it along, a file of weights does not.
        force_quick_gelu=config.force_quick_gelu or brings_quick_gelu(config.model, config.weights),
    )
