"""What every kind of data gives: which splits it has, and what is in each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saft_clip.errors import DataError
from saft_clip.prompts import DEFAULT_TEMPLATES
from saft_kernels.untrusted import shown

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Listing:
    """One split of N images in C classes.

    Attributes:
        name: what tables call the data.
        images: N, each as :func:`saft_clip.data.images.source_of` takes them.
        labels: N numbers of classes.
        class_names: C names as they appear in prompts; the same in every split.
        templates: the data's own prompts.
    """

    name: str
    images: Sequence[Any]
    labels: Sequence[int]
    class_names: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES


class Layout(ABC):
    """One kind of data, at one place."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """What it was recognised as, for people: ``image folder``."""

    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """The splits that the data itself makes and that hold images; none if it makes none.

        Raises:
            DataError: if the data are malformed.
        """

    @abstractmethod
    def listing(self, split: str) -> Listing:
        """What is in one split; without splits of its own, all there is.

        Raises:
            DataError: if there is no such split, or the data are malformed or empty.
        """

    def complaints(self) -> list[str]:
        """What is wrong with it although it can be read, a sentence each."""
        return []


def require_split(what: object, split: str, splits: Sequence[str]) -> None:
    """Refuse a split that data which make splits do not have.

    Raises:
        DataError: if there are splits, and not this one.
    """
    if splits and split not in splits:
        raise DataError(f"{what} has no {split} split, only {', '.join(splits)}")


def class_name(text: str) -> str:
    """A name as it appears in prompts: underscores are spaces, as in CoOp."""
    return text.replace("_", " ").strip()


def read_lines(file: Path, *, keep_empty: bool = False) -> list[str]:
    """The lines of a text file, without spaces around them.

    Args:
        file: to read.
        keep_empty: keep empty lines, but for those at the end.

    Raises:
        DataError: if it cannot be read or is not text.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not a text file in UTF-8 ({shown(error)})") from error
    lines = [line.strip() for line in text.rstrip().splitlines()]
    return lines if keep_empty else [line for line in lines if line]
