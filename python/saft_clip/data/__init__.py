"""Labelled images: what a user names (``spec``) becomes an :class:`ImageDataset`.

Every kind of data is a :class:`~saft_clip.data.listing.Layout` in a file of its own;
:mod:`saft_clip.data.layouts` tells them apart.
"""

from saft_clip.data.dataset import (
    ImageDataset,
    drop_unreadable,
    few_shot,
    require_classes,
    say_skipped,
)
from saft_clip.data.duplicates import Place, find_duplicates
from saft_clip.data.listing import SPLITS
from saft_clip.data.loading import available_splits, divided, load_dataset
from saft_clip.data.names import ClassMatch, distinct_names, match_classes, printable
from saft_clip.data.spec import BUILTIN, HALVES, Spec, parse_spec, resolved

__all__ = [
    "BUILTIN",
    "HALVES",
    "SPLITS",
    "ClassMatch",
    "ImageDataset",
    "Place",
    "Spec",
    "available_splits",
    "distinct_names",
    "divided",
    "drop_unreadable",
    "few_shot",
    "find_duplicates",
    "load_dataset",
    "match_classes",
    "parse_spec",
    "printable",
    "require_classes",
    "resolved",
    "say_skipped",
]
