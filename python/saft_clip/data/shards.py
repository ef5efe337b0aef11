"""Images in tar archives, as the webdataset library writes them (shards).

The files of one sample have one name with different endings: ``000.jpg``, ``000.cls`` with the
number of its class, ``000.json``. The headers are read once; an image is then read where it lies in
the archive, by any process, and nothing is unpacked. Hence Python's own tarfile, not the webdataset
package: that streams whole archives in their order, and this needs any image at any time.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saft_clip.data.folder import IMAGE_SUFFIXES, subfolders
from saft_clip.data.imagenet import CLASSNAMES, is_wnid, read_classnames
from saft_clip.data.images import ImagePart
from saft_clip.data.listing import SPLITS, Layout, Listing, class_name, read_lines, require_split
from saft_clip.errors import DataError
from saft_clip.shortages import is_shortage
from saft_kernels.untrusted import parse_json, quoted, shown

SUFFIX = ".tar"

#: What lies beside an archive to name its classes, one a line.
_NAME_FILES = (CLASSNAMES, "classes.txt")

#: ``{000..003}``
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

#: More archives than anyone has, and more bytes than a number or a description takes.
_MAX_SHARDS = 100_000
_MAX_TEXT = 1 << 20
_MAX_CLASS = 1 << 20
_MAX_DIGITS = 20

_BLOCK = 512

_NO_CLASS = 'a sample needs a .cls file with its class number, or "label" or "class_name" in .json'


class Shards(Layout):
    """Tar archives of images.

    The class of a sample is the number in its ``.cls``, or ``"label"`` (number or name) or
    ``"class_name"`` in its ``.json``; ``.txt`` is a caption, which is no class. Numbers are named
    by ``classnames.txt`` or ``classes.txt`` beside the archives or in the folder above, one name a
    line, or by the samples' own ``"class_name"``.

    Args:
        spec: ``FILE.tar``, ``shards-{000..003}.tar``, or a folder of archives or of ``train``,
            ``val`` and ``test`` folders of those.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.path = Path(spec).expanduser()

    @staticmethod
    def names(spec: str) -> bool:
        """Whether a spec names archives."""
        return spec.endswith(SUFFIX)

    @staticmethod
    def find(root: Path) -> Shards | None:
        """The archives in a folder, if there are any."""
        data = Shards(str(root))
        return data if _archives(root) or data.splits() else None

    @property
    def kind(self) -> str:
        """WebDataset shards."""
        return "WebDataset shards"

    def splits(self) -> tuple[str, ...]:
        """The split folders that hold archives."""
        return tuple(split for split in SPLITS if _archives(self.path / split))

    def listing(self, split: str) -> Listing:
        """The images in the order of the archives."""
        splits = self.splits()
        require_split(self.path, split, splits)
        files = self._files(split if splits else "")
        samples = list(_samples(files))
        if not samples:
            raise DataError(f"{self.spec} holds no image ({' '.join(sorted(IMAGE_SUFFIXES))})")
        known = self._names()
        # A label must mean the same class in every split.
        parts = [] if known else [part for part in splits if part != split]
        others = [sample for part in parts for sample in _samples(self._files(part))]
        numbers, names = _numbered(samples, others, known, self.spec)
        name = self.path.resolve().name.removesuffix(SUFFIX)
        return Listing(name, [sample.image for sample in samples], numbers, names)

    def _files(self, split: str) -> list[Path]:
        if self.path.is_dir():
            return _archives(self.path / split)
        files = [Path(name) for name in _expanded(str(self.path))]
        for file in files:
            if not file.is_file():
                raise DataError(f"there is no archive {file}")
        return files

    def _names(self) -> list[str] | None:
        """The names of the classes, if a file has them."""
        folder = self.path if self.path.is_dir() else self.path.parent
        for place in (folder, folder.absolute().parent):
            for name in _NAME_FILES:
                if (place / name).is_file():
                    return _names_in(place / name)
        return None


def _names_in(file: Path) -> list[str]:
    lines = read_lines(file, keep_empty=True)
    if not lines or not all(lines):
        raise DataError(f"{file} must have the name of one class in each line, and no empty line")
    if all(is_wnid(line.split(" ")[0]) for line in lines):
        return list(read_classnames(file).values())
    return [class_name(line) for line in lines]


@dataclass
class _Sample:
    """One image and what lies beside it.

    Attributes:
        image: where it is; None if there is none.
        number: of its class, if it says so.
        name: of its class, if it says so.
    """

    image: ImagePart | None = None
    number: int | None = None
    name: str | None = None


def _archives(folder: Path) -> list[Path]:
    """The archives in a folder; none beside other folders, which they were unpacked to."""
    if not folder.is_dir() or subfolders(folder):
        return []
    return sorted(
        Path(entry.path)
        for entry in os.scandir(folder)
        if entry.name.endswith(SUFFIX) and entry.name[0] != "." and entry.is_file()
    )


def _expanded(pattern: str) -> Iterator[str]:
    """``a-{00..02}.tar`` -> ``a-00.tar``, ``a-01.tar``, ``a-02.tar``."""
    found = _RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    count = int(last) - int(first) + 1 if max(len(first), len(last)) < 10 else 0
    if not 0 < count <= _MAX_SHARDS:
        raise DataError(f"{pattern} names no range of archives; write it as {{000..003}}")
    for number in range(int(first), int(last) + 1):
        middle = str(number).zfill(len(first))
        yield from _expanded(pattern[: found.start()] + middle + pattern[found.end() :])


# Reading ------------------------------------------------------------------------------------------


def _samples(files: Sequence[Path]) -> Iterator[_Sample]:
    for file in files:
        try:
            yield from _samples_of(file)
        except DataError:
            raise
        except (OSError, tarfile.TarError, ValueError, RecursionError) as error:
            if is_shortage(error):
                raise
            reason = error.strerror if isinstance(error, OSError) else None
            raise DataError(
                f"the archive {file} cannot be read: {shown(reason or error)}; it must be a tar "
                "file that is whole and not compressed"
            ) from error


def _samples_of(file: Path) -> Iterator[_Sample]:
    """The samples of one archive, in the order of their images."""
    samples: dict[str, _Sample] = {}
    size = file.stat().st_size
    with tarfile.open(file, "r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep all headers
            _require_whole(member, archive.offset, size)
            key, ending = _parted(member.name)
            if not member.isreg() or not key:
                continue
            sample = samples.setdefault(key, _Sample())
            if ending in IMAGE_SUFFIXES:
                if sample.image is not None:
                    raise DataError(f"{file} has two images of the name {quoted(key)}")
                sample.image = ImagePart(str(file), member.name, member.offset_data, member.size)
            elif ending in (".cls", ".json") and member.size <= _MAX_TEXT:
                content = archive.extractfile(member)
                assert content is not None  # as for every regular file
                where = f"{file}/{shown(member.name)}"
                _describe(sample, ending, content.read(), where)
        _require_end(file, archive.offset)
    for sample in samples.values():
        if sample.image is not None:
            yield _checked(sample)


def _require_whole(member: tarfile.TarInfo, after: int, size: int) -> None:
    """Refuse a member that reaches beyond the file, or that leads backwards."""
    if member.issparse():
        raise ValueError("it holds files with gaps")
    if member.size < 0 or after <= member.offset:
        raise ValueError("it is broken")
    if member.isreg() and member.offset_data + member.size > size:
        raise ValueError("it is cut short")


def _require_end(file: Path, offset: int) -> None:
    """An archive ends with blocks of zeros; without them it was cut short between two files."""
    with open(file, "rb") as stream:
        stream.seek(offset)
        last = stream.read(_BLOCK)
    if last != bytes(_BLOCK):
        raise ValueError("it is cut short or broken")


def _parted(name: str) -> tuple[str, str]:
    """``a/b.c.jpg`` -> the key ``a/b`` and ``.jpg``; hidden files have no key."""
    folder, slash, file = name.rpartition("/")
    key, _, endings = file.partition(".")
    return folder + slash + key if key else "", f".{endings.rpartition('.')[2].lower()}"


def _describe(sample: _Sample, ending: str, content: bytes, where: str) -> None:
    """Take the class of a sample from a file beside the image; a ``.cls`` has the last word."""
    if ending == ".cls":
        try:
            sample.number = int(content[:_MAX_DIGITS].decode("ascii"))
        except ValueError:
            raise DataError(f"{where} is not a class number") from None
        return
    fields = _json(content, where)
    value = fields.get("label")
    if sample.number is None and isinstance(value, int) and not isinstance(value, bool):
        sample.number = value
    named = fields.get("class_name", value)
    sample.name = class_name(named) if isinstance(named, str) else None


def _json(content: bytes, where: str) -> dict[str, Any]:
    try:
        fields = parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise DataError(f"{where} is broken: {shown(error)}") from error
    return fields if isinstance(fields, dict) else {}


def _checked(sample: _Sample) -> _Sample:
    where = sample.image.label if sample.image else ""
    if sample.number is None and sample.name is None:
        raise DataError(f"{where} has no class: {_NO_CLASS}")
    if sample.number is not None and not 0 <= sample.number < _MAX_CLASS:
        raise DataError(f"{where} has the class number {shown(sample.number, 20)}")
    return sample


# Classes ------------------------------------------------------------------------------------------


def _numbered(
    samples: Sequence[_Sample], others: Sequence[_Sample], known: list[str] | None, what: str
) -> tuple[list[int], tuple[str, ...]]:
    """The class number of each sample, and the names of all classes."""
    everything = [*samples, *others]
    if all(sample.number is not None for sample in everything):
        names = known if known is not None else _own_names(everything, what)
        numbers = [sample.number for sample in samples if sample.number is not None]
        largest = max(sample.number or 0 for sample in everything)
        if largest >= len(names):
            raise DataError(
                f"{what} has the class number {largest}, but there are {len(names)} class names"
            )
        return numbers, tuple(names)
    if any(sample.name is None for sample in everything):
        raise DataError(f"{what} has class numbers and class names, not one of them throughout")
    names = known or sorted({sample.name for sample in everything if sample.name is not None})
    positions = {name: number for number, name in enumerate(names)}
    unknown = [sample.name for sample in everything if sample.name not in positions]
    if unknown:
        raise DataError(f"{what} has the class {quoted(unknown[0])}, which no line names")
    return [positions[sample.name or ""] for sample in samples], tuple(names)


def _own_names(samples: Sequence[_Sample], what: str) -> list[str]:
    """The names of numbered classes, as the samples themselves have them."""
    names: dict[int, str] = {}
    for sample in samples:
        if sample.number is None or sample.name is None:
            raise DataError(
                f"nothing names the classes of {what}: put {CLASSNAMES} beside it, with the name "
                "of one class in each line"
            )
        if names.setdefault(sample.number, sample.name) != sample.name:
            raise DataError(
                f"the class {sample.number} of {what} is called {quoted(names[sample.number])} "
                f"and {quoted(sample.name)}"
            )
    if sorted(names) != list(range(len(names))):
        raise DataError(f"the class numbers of {what} must be 0 to {len(names) - 1} without a gap")
    return [names[number] for number in range(len(names))]
