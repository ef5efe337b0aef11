"""What is in data, and what is wrong with them, before anything is trained on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from saft_clip.console import progress
from saft_clip.data.dataset import ImageDataset
from saft_clip.data.duplicates import (
    Place,
    equal_pairs,
    for_each_image,
    hash_of_bytes,
    hash_of_image,
)
from saft_clip.data.images import ImageArray, ImageSource
from saft_clip.data.layouts import recognise
from saft_clip.data.loading import available_splits, load_dataset
from saft_clip.data.names import match_classes, plain_name, printable
from saft_clip.data.spec import parse_spec, resolved
from saft_clip.errors import UnreadableImageError
from saft_kernels.errors import SaftError
from saft_kernels.untrusted import quoted, shown

#: What data without splits of their own are called here.
ALL = "all"

#: How many of a kind are named.
_NAMED = 5


@dataclass
class SplitFacts:
    """One split.

    Attributes:
        split: ``train``, ``val``, ``test``, or ``all`` where the data make no splits.
        images: how many.
        per_class: class name -> images.
        smallest, largest: width and height, each the least and the most of all images; None if they
            were not decoded or cannot be.
        unreadable: ``path: reason`` of each.
    """

    split: str
    images: int
    per_class: dict[str, int]
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    unreadable: list[str] = field(default_factory=list)


@dataclass
class SpecFacts:
    """What a spec names.

    Attributes:
        spec: as the user wrote it.
        kind: what it was recognised as.
        name: of the data set.
        classes: names, in the order of their numbers.
        templates: its prompts.
        splits: what is in each.
    """

    spec: str
    kind: str = ""
    name: str = ""
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    splits: list[SplitFacts] = field(default_factory=list)


@dataclass
class Match:
    """The classes of another spec beside those of the first.

    Attributes:
        spec: the other.
        shared: classes that both have.
        only_first, only_other: names that only one has.
    """

    spec: str
    shared: int
    only_first: tuple[str, ...]
    only_other: tuple[str, ...]


@dataclass
class Findings:
    """Everything that was found.

    Attributes:
        data: one entry for each spec.
        matches: one entry for each spec but the first.
        problems: what is wrong, a sentence each.
        decoded: whether the images were decoded.
    """

    data: list[SpecFacts]
    matches: list[Match]
    problems: list[str]
    decoded: bool


@dataclass(frozen=True)
class _Part:
    """One split of one spec."""

    facts: SpecFacts
    split: str
    dataset: ImageDataset

    @property
    def origin(self) -> tuple[str, ...]:
        """The same for the same split of the same data, corrupted or not."""
        return (*resolved(parse_spec(self.facts.spec).source), self.split)

    def __str__(self) -> str:
        spec = printable(self.facts.spec)
        return spec if self.split == ALL else f"{spec} ({self.split})"


def check_data(
    specs: Sequence[str], *, decode: bool = True, show_progress: bool = True
) -> Findings:
    """Look through all data that the specs name.

    Args:
        specs: see :func:`saft_clip.data.load_dataset`; the others are compared with the first.
        decode: decode every image; else only read what is stored.
        show_progress: show a bar.
    """
    problems: list[str] = []
    data: list[SpecFacts] = []
    parts: list[_Part] = []
    for spec in specs:
        facts = SpecFacts(spec)
        data.append(facts)
        parts += _parts(facts, problems)
    _look_at_images(parts, decode, show_progress, problems)
    for facts in data:
        problems += _wrong_with_classes(facts)
    matches = [_match(data[0], other) for other in data[1:] if data[0].classes and other.classes]
    for match in matches:
        problems += _wrong_with_match(specs[0], match)
    return Findings(data, matches, problems, decode)


def _parts(facts: SpecFacts, problems: list[str]) -> Iterator[_Part]:
    """The splits of one spec, as far as they can be listed."""
    try:
        layout = recognise(parse_spec(facts.spec).source)
        facts.kind = layout.kind
        problems += layout.complaints()
        splits = available_splits(facts.spec) or (ALL,)
    except SaftError as error:
        problems.append(_sentence(error))
        return
    for split in splits:
        try:
            dataset = load_dataset(facts.spec, "test" if split == ALL else split, _as_it_is)
        except SaftError as error:
            if (sentence := _sentence(error)) not in problems:  # the same is wrong with each split
                problems.append(sentence)
            continue
        facts.name, facts.classes = dataset.name, dataset.class_names
        facts.templates = dataset.templates
        yield _Part(facts, split, dataset)


def _as_it_is(image: Any) -> Any:
    return image


# Images -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What one image is: its hash and size, or why it cannot be read."""

    hash: bytes | None = None
    size: tuple[int, int] | None = None
    reason: str = ""


def _decoded(image: ImageSource) -> _Seen:
    try:
        opened = image.original.open()
        if image.original is not image:
            image.check()
    except UnreadableImageError as error:
        return _Seen(reason=printable(f"{error.path}: {error.reason}"))
    return _Seen(hash_of_image(opened), opened.size)


def _stored(image: ImageSource) -> _Seen:
    found = hash_of_bytes(image)
    return _Seen(found, reason="" if found else printable(f"{image.label}: it cannot be read"))


def _look_at_images(
    parts: Sequence[_Part], decode: bool, show_progress: bool, problems: list[str]
) -> None:
    """Fill in what is in each split and say which images are broken or there twice."""
    total = sum(len(part.dataset) for part in parts)
    look: Callable[[ImageSource], _Seen] = _decoded if decode else _stored
    hashes = []
    with progress("looking at images", total, show=show_progress) as advance:
        for part in parts:
            seen = list(for_each_image(part.dataset, look, advance))
            hashes.append([one.hash for one in seen])
            facts = _facts(part, seen)
            part.facts.splits.append(facts)
            if facts.unreadable:
                problems.append(
                    f"{len(facts.unreadable)} image(s) of {part} cannot be read: "
                    f"{_some(facts.unreadable, '; ')}"
                )
    problems += _wrong_with_duplicates(parts, equal_pairs(hashes))


def _facts(part: _Part, seen: Sequence[_Seen]) -> SplitFacts:
    dataset = part.dataset
    counts = dataset.labels.bincount(minlength=len(dataset.class_names)).tolist()
    per_class: dict[str, int] = {}
    for name, count in zip(dataset.class_names, counts, strict=True):
        per_class[name] = per_class.get(name, 0) + count
    sizes = [one.size for one in seen if one.size]
    widths, heights = [width for width, _ in sizes], [height for _, height in sizes]
    return SplitFacts(
        part.split,
        len(dataset),
        per_class,
        (min(widths), min(heights)) if sizes else None,
        (max(widths), max(heights)) if sizes else None,
        [one.reason for one in seen if one.reason],
    )


def _wrong_with_duplicates(
    parts: Sequence[_Part], pairs: Sequence[tuple[Place, Place]]
) -> Iterator[str]:
    """One sentence for each two splits that share images.

    Two specs of the same split of the same data do so by intention: one of them is corrupted, say.
    """
    found: dict[tuple[int, int], list[tuple[Place, Place]]] = {}
    for first, other in pairs:
        found.setdefault((first.dataset, other.dataset), []).append((first, other))
    for (a, b), shared in sorted(found.items()):
        if a != b and parts[a].origin == parts[b].origin:
            continue
        where = "are there twice" if a == b else f"are in {parts[b]}, too"
        apart = sum(_class_at(parts, x) != _class_at(parts, y) for x, y in shared)
        classes = f", {apart} of them in another class" if apart else ""
        examples = [f"{_label_at(parts, x)} = {_label_at(parts, y)}" for x, y in shared]
        yield f"{len(shared)} image(s) of {parts[a]} {where}{classes}: {_some(examples, '; ')}"


def _class_at(parts: Sequence[_Part], place: Place) -> str:
    dataset = parts[place.dataset].dataset
    return plain_name(dataset.class_names[int(dataset.labels[place.index])])


def _label_at(parts: Sequence[_Part], place: Place) -> str:
    image = parts[place.dataset].dataset.source(place.index).original
    return f"number {place.index}" if isinstance(image, ImageArray) else printable(image.label)


# Classes ------------------------------------------------------------------------------------------


def _wrong_with_classes(facts: SpecFacts) -> Iterator[str]:
    spec = printable(facts.spec)
    if len(facts.classes) == 1:
        yield f"{spec} has one class only, {quoted(facts.classes[0])}: there is nothing to tell"
    seen: dict[str, str] = {}
    for name in facts.classes:
        other = seen.setdefault(plain_name(name), name)
        if other is not name:
            yield f"two classes of {spec} have the same name: {quoted(other)} and {quoted(name)}"
    for split in facts.splits:
        absent = [name for name, count in split.per_class.items() if not count]
        if absent:
            where = spec if split.split == ALL else f"{spec} ({split.split})"
            yield f"{len(absent)} class(es) have no image in {where}: {_some(absent)}"


def _match(first: SpecFacts, other: SpecFacts) -> Match:
    match = match_classes(first.classes, other.classes)
    return Match(other.spec, len(match.pairs), match.only_first, match.only_other)


def _wrong_with_match(first: str, match: Match) -> Iterator[str]:
    """Fewer classes than the first has are no mistake: ImageNet-A has 200 of the 1,000."""
    if match.only_other:
        beside = f" (only the first has {_some(match.only_first)})" if match.only_first else ""
        yield (
            f"{len(match.only_other)} class(es) of {printable(match.spec)} are not in "
            f"{printable(first)}: {_some(match.only_other)}{beside}"
        )


def _some(texts: Sequence[str], between: str = ", ") -> str:
    more = f"{between}and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return between.join(shown(text) for text in texts[:_NAMED]) + more


def _sentence(error: SaftError) -> str:
    return " ".join(printable(str(error)).split())
