"""Where an image of a data set comes from: a file, an array, or another kind with the same methods.

A data set holds file paths and arrays as they are, which keeps a million of them small;
:func:`source_of` is the one place that says what is done with each.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from saft_clip.errors import UnreadableImageError
from saft_clip.shortages import is_shortage
from saft_kernels.untrusted import shown


class ImageSource(ABC):
    """One stored image. It can be pickled, and opened in any process."""

    __slots__ = ()

    @property
    @abstractmethod
    def label(self) -> str:
        """What messages call it, a path if it has one."""

    @property
    def original(self) -> ImageSource:
        """The image that this one was made from, or itself."""
        return self

    @abstractmethod
    def open(self) -> Image.Image:
        """The image in 8-bit RGB, as :meth:`saft_clip.data.ImageDataset.open` says.

        Raises:
            UnreadableImageError: if it cannot be decoded.
        """

    def check(self) -> None:
        """Make sure that :meth:`open` will work.

        Raises:
            UnreadableImageError: if it would not.
        """
        self.open()

    @abstractmethod
    def read(self) -> bytes:
        """All that is stored of it, not decoded.

        Raises:
            OSError: if it cannot be read.
            ValueError: if its path can be none.
        """

    @abstractmethod
    def mark(self, content: bool) -> bytes:
        """What tells it from another image and from itself after a change; it may be unreadable.

        Args:
            content: all that is stored; else only its name, size, beginning and end.
        """


def source_of(image: Any) -> ImageSource:
    """What a data set holds, as something to open: a path, a uint8 array [H, W, 3], or a source."""
    if isinstance(image, ImageSource):
        return image
    return ImageFile(image) if isinstance(image, str) else ImageArray(image)


@dataclass(frozen=True, slots=True)
class ImageFile(ImageSource):
    """An image file.

    Attributes:
        path: of the file.
    """

    path: str

    @property
    def label(self) -> str:
        """The path."""
        return self.path

    @property
    def name(self) -> str:
        """What it is called where it lies, without the folders above."""
        return os.path.basename(self.path)

    def open(self) -> Image.Image:
        """The decoded image."""
        return decode(self.path, self.path)

    def read(self) -> bytes:
        """The file's content."""
        with self._stored() as (file, size):
            return file.read(size)

    def mark(self, content: bool) -> bytes:
        """The name and what is read of the file; the name alone where it cannot be read."""
        name = _encoded(self.name)
        try:
            if content:
                return name + self.read()
            with self._stored() as (file, size):
                return name + _ends(file, size)
        except (OSError, ValueError):  # evaluation names and skips what cannot be read
            return name

    @contextmanager
    def _stored(self) -> Iterator[tuple[BinaryIO, int]]:
        """The file at the first byte of the image, and how many bytes the image has."""
        with open(self.path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size


@dataclass(frozen=True, slots=True)
class ImagePart(ImageFile):
    """An encoded image inside a larger file that is not compressed, such as a tar archive.

    The file is opened for each image, so that no process shares a position in it with another.

    Attributes:
        member: its name in there.
        offset: its first byte.
        size: its bytes.
    """

    member: str
    offset: int
    size: int

    @property
    def label(self) -> str:
        """The path of the file and the name in it."""
        return f"{self.path}/{shown(self.member)}"

    @property
    def name(self) -> str:
        """The name in the file."""
        return self.member

    def open(self) -> Image.Image:
        """The decoded image."""
        try:
            stored = self.read()
        except OSError as error:
            if is_shortage(error):
                raise
            raise UnreadableImageError(self.label, error.strerror or "broken") from error
        return decode(io.BytesIO(stored), self.label)

    @contextmanager
    def _stored(self) -> Iterator[tuple[BinaryIO, int]]:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            yield file, self.size


@dataclass(frozen=True, slots=True, eq=False)
class ImageArray(ImageSource):
    """Pixels in memory.

    Attributes:
        pixels: uint8 [H, W, 3] or [H, W].
    """

    pixels: NDArray[Any]

    @property
    def label(self) -> str:
        """Its size: it has no name."""
        height, width = self.pixels.shape[:2]
        return f"an image of {width} x {height} pixels"

    def open(self) -> Image.Image:
        """The pixels as an image."""
        return Image.fromarray(self.pixels).convert("RGB")

    def check(self) -> None:
        """Pixels are always readable."""

    def read(self) -> bytes:
        """The pixels, row by row."""
        return self.pixels.tobytes()

    def mark(self, content: bool) -> bytes:
        """The pixels: they have no name that could stand for them."""
        return self.read()


def _encoded(name: str) -> bytes:
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:  # a list may have what no file can be called
        return name.encode("utf-8", "surrogatepass")


#: Bytes that are looked at on either end: what is read at once anyway.
_END = 4096


def _ends(file: BinaryIO, size: int) -> bytes:
    start = file.tell()
    begin = file.read(min(_END, size))
    file.seek(start + max(0, size - _END))
    return b"%d" % size + begin + file.read(min(_END, size))


def decode(file: str | BinaryIO, label: str) -> Image.Image:
    """An encoded image in 8-bit RGB.

    Raises:
        UnreadableImageError: naming ``label``, if it is broken or no image.
    """
    try:
        with Image.open(file) as image:
            return to_rgb(image)
    # A broken file makes the decoders raise anything: OSError, SyntaxError, struct.error and more.
    except Exception as error:
        if is_shortage(error):  # of this machine: the image is as good as any other
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImageError(label, reason.splitlines()[0] if reason else "broken") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB.

    Raises:
        ValueError: if nobody knows which of its values is white.
    """
    # PIL's own conversions cut values above 255 off and drop transparency: white and black areas.
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey values of more than 8 bits as 8 bits; ``ImageDataset.open`` says which are which.

    Raises:
        ValueError: if their range is unknown.
    """
    low, high = values.min(), values.max()
    whole = np.issubdtype(values.dtype, np.integer)
    if not (low >= 0 and high <= (65535 if whole else 255)):  # nan is in no range
        raise ValueError(f"values from {low} to {high}, of which none is known to be white")
    if values.dtype.itemsize == 2 or (whole and high > 255):
        values = values >> 8
    elif not whole and high <= 1:
        values = (255 * values).round()
    return values.astype(np.uint8)
