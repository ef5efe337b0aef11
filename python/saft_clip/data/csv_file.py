"""Lists of images in CSV: a header, then a row for each image."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from saft_clip.data.listing import SPLITS, Layout, Listing, class_name, require_split
from saft_clip.data.spec import SEPARATOR
from saft_clip.errors import DataError
from saft_kernels.untrusted import is_file, quoted, shown

SUFFIXES = (".csv", ".tsv")

_PATHS = ("path", "filepath", "image")
_LABEL = "label"
_CAPTIONS = ("caption", "title")
_SPLIT = "split"


@dataclass(frozen=True)
class _Row:
    path: str
    label: str
    split: str


class CsvFile(Layout):
    """A CSV file, or one with tabs (``.tsv``).

    The columns: ``path`` (or ``filepath``, or ``image``), relative to the file; ``label``, the name
    of the class; and if the file divides its images, ``split`` (train, val or test). Other columns
    are left alone: a caption is no class. ``FILE.csv::COLUMN`` takes the names of the classes from
    another column, a caption's included.

    The classes are those of all splits together, sorted by name. Underscores become spaces.

    Args:
        spec: ``FILE.csv`` or ``FILE.csv::COLUMN``.
    """

    def __init__(self, spec: str) -> None:
        name, _, column = spec.partition(SEPARATOR)
        self.file = Path(name).expanduser()
        self.column = column or _LABEL

    @staticmethod
    def names(spec: str) -> bool:
        """Whether a spec names a file of this kind."""
        return spec.partition(SEPARATOR)[0].lower().endswith(SUFFIXES)

    @property
    def kind(self) -> str:
        """A CSV file."""
        return "CSV file"

    def splits(self) -> tuple[str, ...]:
        """The splits that rows are of; none without such a column."""
        found = {row.split for row in self._rows()}
        return tuple(split for split in SPLITS if split in found)

    def listing(self, split: str) -> Listing:
        """The images in the order of the rows."""
        rows = list(self._rows())
        require_split(self.file, split, [name for name in SPLITS if _has(rows, name)])
        names = sorted({row.label for row in rows})
        numbers = {name: number for number, name in enumerate(names)}
        chosen = [row for row in rows if row.split in ("", split)]
        if not chosen:
            raise DataError(f"{self.file} lists no image")
        folder = self.file.parent
        if not is_file(folder / chosen[0].path):
            raise DataError(
                f"the first image of {self.file}, {shown(chosen[0].path)}, is not there; "
                "paths are relative to the file"
            )
        return Listing(
            self.file.stem,
            [str(folder / row.path) for row in chosen],
            [numbers[row.label] for row in chosen],
            tuple(names),
        )

    def _rows(self) -> Iterator[_Row]:
        delimiter = "\t" if self.file.suffix.lower() == ".tsv" else ","
        try:
            with open(self.file, encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, delimiter=delimiter)
                header = [name.strip().lower() for name in next(reader, [])]
                columns = self._columns(header)
                for cells in reader:
                    if any(cells):
                        yield self._row(columns, cells, reader.line_num)
        except OSError as error:
            raise DataError(f"{self.file} cannot be read: {error.strerror}") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{self.file} is not a CSV file in UTF-8 ({shown(error)})") from error

    def _columns(self, header: Sequence[str]) -> tuple[int, int, int | None]:
        """The positions of path, label and split."""
        found = ", ".join(shown(name) for name in header) or "nothing"
        path = next((header.index(name) for name in _PATHS if name in header), None)
        if path is None:
            raise DataError(
                f"the header of {self.file} has no column path (or filepath, or image), "
                f"but {shown(found)}"
            )
        wanted = self.column.strip().lower()
        if wanted not in header:
            captions = [name for name in _CAPTIONS if name in header]
            hint = (
                f": a {captions[0]} is no class; to take each for one, give "
                f"{self.file}{SEPARATOR}{captions[0]}"
                if captions
                else f", but {shown(found)}"
            )
            raise DataError(f"the header of {self.file} has no column {shown(wanted)}{hint}")
        split = header.index(_SPLIT) if _SPLIT in header else None
        return path, header.index(wanted), split

    def _row(self, columns: tuple[int, int, int | None], cells: Sequence[str], line: int) -> _Row:
        where = f"line {line} of {self.file}"
        path, label, split = ("" if at is None else _cell(cells, at) for at in columns)
        if not path or not label:
            raise DataError(f"{where} has no {'path' if not path else self.column}")
        if columns[2] is not None and split not in SPLITS:
            raise DataError(f"{where} is of the split {quoted(split)}; write train, val or test")
        return _Row(path, class_name(label), split)


def _cell(cells: Sequence[str], at: int) -> str:
    return cells[at].strip() if at < len(cells) else ""


def _has(rows: Sequence[_Row], split: str) -> bool:
    return any(row.split == split for row in rows)
