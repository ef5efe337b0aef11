"""DomainNet: 345 classes in six domains, with a list of images for each domain and split.

Peng et al. 2019, "Moment Matching for Multi-Source Domain Adaptation". A list has a line
``sketch/airplane/sketch_003_000001.jpg 2`` for each image.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from saft_clip.data.listing import Layout, Listing, class_name, read_lines, require_split
from saft_clip.errors import DataError
from saft_kernels.untrusted import is_file, quoted, shown

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")

#: DomainNet has no validation set.
_SPLITS = ("train", "test")


class DomainNet(Layout):
    """One domain: the folder of its images, with the lists beside it.

    Classes are numbered as in the lists. Their names are those of the folders in the paths, taken
    from all lists that are there, as not every list has every class (``painting_train.txt`` lacks
    the T-shirt); so the same label means the same class in every domain.

    Args:
        folder: ``ROOT/sketch``.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self.domain = folder.absolute().parent, folder.absolute().name

    @staticmethod
    def find(folder: Path) -> DomainNet | None:
        """The domain, if a folder is one and a list of it lies beside it."""
        data = DomainNet(folder)
        return data if data.domain in DOMAINS and data.splits() else None

    @property
    def kind(self) -> str:
        """A domain of DomainNet."""
        return "domain of DomainNet"

    def splits(self) -> tuple[str, ...]:
        """The splits that there is a list of."""
        return tuple(split for split in _SPLITS if self._list(self.domain, split).is_file())

    def listing(self, split: str) -> Listing:
        """The images in the list's order."""
        require_split(f"the domain {self.root / self.domain}", split, self.splits())
        file = self._list(self.domain, split)
        entries = _entries(file)
        if not entries:
            raise DataError(f"{file} lists no image")
        if not is_file(self.root / entries[0][0]):
            raise DataError(
                f"the first image of {file}, {shown(entries[0][0])}, is not in {self.root}"
            )
        return Listing(
            self.domain,
            [str(self.root / path) for path, _ in entries],
            [label for _, label in entries],
            self._class_names(),
        )

    def _list(self, domain: str, split: str) -> Path:
        return self.root / f"{domain}_{split}.txt"

    def _class_names(self) -> tuple[str, ...]:
        names: dict[int, str] = {}
        lists = [self._list(domain, split) for domain in DOMAINS for split in _SPLITS]
        for file in filter(Path.is_file, lists):
            for path, label in _entries(file):
                name = class_name(PurePosixPath(path).parent.name)
                if names.setdefault(label, name) != name:
                    raise DataError(
                        f"{file} has the label {label} for {quoted(name)}, "
                        f"another list or line has it for {quoted(names[label])}"
                    )
        if sorted(names) != list(range(len(names))):
            raise DataError(
                f"the labels in the lists of {self.root} must be 0 to {len(names) - 1} "
                "without a gap"
            )
        return tuple(names[label] for label in range(len(names)))


def _entries(file: Path) -> list[tuple[str, int]]:
    entries = []
    for line in read_lines(file):
        path, _, label = line.rpartition(" ")
        if not path or not (label.isascii() and label.isdigit() and len(label) < 10):
            raise DataError(
                f"{file} has the line {quoted(line)}; expected the path of an image and a label"
            )
        entries.append((path, int(label)))
    return entries
