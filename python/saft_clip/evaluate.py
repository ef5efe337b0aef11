"""Classification, zero-shot (a class is what its prompts say) or by any other scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from saft_clip.batches import ignore_interrupts
from saft_clip.console import progress
from saft_clip.data import ImageDataset, printable, say_skipped
from saft_clip.errors import DataError, UnreadableImageError
from saft_clip.models import ClipModel, autocast
from saft_clip.prompts import ClassPrompts, encode_prompts


@dataclass(frozen=True)
class Evaluation:
    """What a model gets right on one data set; accuracies are fractions of 1.

    Attributes:
        dataset: its name.
        n: images evaluated.
        top1: share of images whose class ranks first.
        top5: share of images whose class is among the first five (all classes, if there are fewer).
        mean_per_class: mean of the classes' accuracies, over classes that have images.
        top1_stderr: sqrt(p (1 - p) / n), the binomial standard error of ``top1``.
        mean_per_class_stderr: the same for ``mean_per_class``: sqrt(sum_c p_c (1 - p_c) / n_c) / C.
        per_class: class name -> accuracy (None for a class without images).
        per_class_n: class name -> number of images.
        skipped: images that could not be read, as ``path: reason``; they are not in ``n``.
    """

    dataset: str
    n: int
    top1: float
    top5: float
    mean_per_class: float
    top1_stderr: float
    mean_per_class_stderr: float
    per_class: dict[str, float | None]
    per_class_n: dict[str, int]
    skipped: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


#: Images float32 [B, 3, H, W] on any device -> scores [B, C], the higher the likelier.
Scores = Callable[[Tensor], Tensor]


def evaluate_zero_shot(
    clip: ClipModel,
    dataset: ImageDataset,
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    workers: int = 0,
    show_progress: bool = True,
) -> Evaluation:
    """Classify every image by its most similar class embedding.

    The arguments and errors are those of :func:`evaluate`.
    """
    return evaluate(
        clip,
        dataset,
        lambda prompts: zero_shot_scores(clip.model, prompts, device, show_progress=show_progress),
        batch_size=batch_size,
        device=device,
        precision=precision,
        workers=workers,
        show_progress=show_progress,
    )


def evaluate(
    clip: ClipModel,
    dataset: ImageDataset,
    scores: Callable[[ClassPrompts], Scores],
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    workers: int = 0,
    show_progress: bool = True,
) -> Evaluation:
    """Classify every image by the highest score.

    Unreadable images are left out and named in the result. The model ends in the mode (train or
    eval) it came in.

    Args:
        clip: the model, on ``device``.
        dataset: transformed with the model's ``preprocess_val``.
        scores: called once, with the data set's classes; in the given precision.
        batch_size: images per forward pass.
        device: where the model is.
        precision: ``fp32`` or ``amp_bf16``.
        workers: processes that load images; 0 loads them in this one.
        show_progress: show bars with images per second and time left, and warn of unreadable
            images.

    Raises:
        DataError: if not one image can be read.
    """
    modes = {module: module.training for module in clip.model.modules()}
    clip.model.eval()
    try:
        with torch.inference_mode(), autocast(precision, device):
            prompts = ClassPrompts(dataset.class_names, dataset.templates, clip.tokenizer)
            ranks, labels, skipped = _rank_images(
                scores(prompts), dataset, batch_size, workers, show_progress
            )
    finally:
        for module, training in modes.items():
            module.training = training
    if not len(ranks):
        raise DataError(f"none of the {len(dataset)} images of {dataset.name} can be read")
    if show_progress:
        say_skipped(dataset.name, skipped)
    return _summarize(dataset, ranks, labels, skipped)


def zero_shot_scores(
    model: nn.Module,
    prompts: ClassPrompts,
    device: str | torch.device,
    *,
    show_progress: bool = False,
) -> Scores:
    """The cosine of an image's embedding and each class's, in float32."""
    classes = embed_classes(model, prompts.tokens.to(device), show_progress=show_progress)
    return scores_of(lambda images: image_features(model, images.to(device)), classes)


def scores_of(features: Callable[[Tensor], Tensor], classes: Tensor) -> Scores:
    """Products of image features and classes, in float32 whatever autocast is in force.

    Args:
        features: images -> float32 [B, E].
        classes: float32 [C, E].
    """

    def scores(images: Tensor) -> Tensor:
        found = features(images)
        # Under autocast the product would be rounded to bf16, and near classes would tie.
        with torch.autocast(found.device.type, enabled=False):
            return found @ classes.T

    return scores


def image_features(model: nn.Module, images: Tensor) -> Tensor:
    """Normalised image embeddings in float32, whatever autocast is in force: [B, E]."""
    encode_image: Any = model.encode_image
    return F.normalize(encode_image(images).float(), dim=-1)


#: Prompts between two moves of the progress bar.
_PROMPTS_SHOWN = 2048


def embed_classes(model: nn.Module, tokens: Tensor, *, show_progress: bool = False) -> Tensor:
    """Class embeddings: the normalised mean of the normalised embeddings of a class's prompts.

    Args:
        model: an open_clip model.
        tokens: int64 [C, T, L], T prompts for each of C classes, on the model's device.

    Returns:
        float32 [C, E], unit length.
    """
    prompts = tokens.flatten(0, 1)
    embeddings = []
    worth_showing = show_progress and len(prompts) > _PROMPTS_SHOWN
    with progress("encoding prompts", len(prompts), unit="prompts", show=worth_showing) as advance:
        for batch in prompts.split(_PROMPTS_SHOWN):
            embeddings.append(encode_prompts(model, batch))
            advance(len(batch))
    return F.normalize(torch.cat(embeddings).unflatten(0, tokens.shape[:2]).mean(dim=1), dim=-1)


class _Tolerant(Dataset[Any]):
    """A data set whose unreadable images come as the error that names them."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | UnreadableImageError:
        try:
            return self.dataset[index]
        except UnreadableImageError as error:
            return error


def _collate(items: Sequence[Any]) -> tuple[list[Tensor], list[int], list[str]]:
    bad = [
        printable(f"{item.path}: {item.reason}")
        for item in items
        if isinstance(item, UnreadableImageError)
    ]
    good = [item for item in items if not isinstance(item, UnreadableImageError)]
    return [image for image, _ in good], [label for _, label in good], bad


def _rank_images(
    scores: Scores, dataset: ImageDataset, batch_size: int, workers: int, show_progress: bool
) -> tuple[Tensor, Tensor, list[str]]:
    """For every readable image the rank of its true class and its label; the unreadable images."""
    loader = DataLoader(
        _Tolerant(dataset),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # its own, or else it would move the global random state
    )
    ranks, labels, skipped = [], [], list(dataset.skipped)
    with progress(f"evaluating {dataset.name}", len(dataset), show=show_progress) as advance:
        for images, truth, bad in loader:
            skipped += bad
            if images:
                found = scores(torch.stack(images)).cpu()
                ranks.append(_rank(found, torch.tensor(truth)))
                labels += truth
            advance(len(images) + len(bad))
    return torch.cat(ranks) if ranks else torch.empty(0), torch.tensor(labels), skipped


def _rank(scores: Tensor, labels: Tensor) -> Tensor:
    """The rank of the true class, 0 for the best: int64 [B] from scores [B, C] and labels [B].

    A tie counts against the true class, and so does a score that is not a number: a broken model
    must not look good.
    """
    true = scores.gather(1, labels[:, None])
    return (~(scores < true)).sum(dim=1) - (~true.isnan()).squeeze(1).long()


def _summarize(
    dataset: ImageDataset, ranks: Tensor, labels: Tensor, skipped: list[str]
) -> Evaluation:
    right = (ranks == 0).double()
    counts = torch.bincount(labels, minlength=len(dataset.class_names)).double()
    hits = torch.bincount(labels, weights=right, minlength=len(dataset.class_names))
    seen = counts > 0
    accuracy = hits[seen] / counts[seen]
    variance = (accuracy * (1 - accuracy) / counts[seen]).sum().item()
    top1 = right.mean().item()
    return Evaluation(
        dataset=dataset.name,
        n=len(ranks),
        top1=top1,
        top5=(ranks < 5).double().mean().item(),
        mean_per_class=accuracy.mean().item(),
        top1_stderr=sqrt(top1 * (1 - top1) / len(ranks)),
        mean_per_class_stderr=sqrt(variance) / len(accuracy),
        per_class={
            name: hit / count if count else None
            for name, hit, count in zip(
                dataset.class_names, hits.tolist(), counts.tolist(), strict=True
            )
        },
        per_class_n=dict(zip(dataset.class_names, counts.long().tolist(), strict=True)),
        skipped=skipped,
    )
