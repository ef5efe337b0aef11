"""Images that are in the data twice, such as in a training and in a test set."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import xxhash
from PIL import Image

from saft_clip.console import progress
from saft_clip.data.dataset import ImageDataset
from saft_clip.data.images import ImageSource
from saft_clip.errors import UnreadableImageError
from saft_clip.shortages import is_shortage


@dataclass(frozen=True, order=True)
class Place:
    """One image of one data set.

    Attributes:
        dataset: position in the list of data sets.
        index: position in the data set.
    """

    dataset: int
    index: int


def find_duplicates(
    datasets: Sequence[ImageDataset], *, decode: bool = True, show_progress: bool = True
) -> list[tuple[Place, Place]]:
    """Find images that show the same, pixel by pixel, or are stored in the same bytes.

    Near duplicates, such as another size or compression of one picture, are not found; corrupted
    images are compared as they were before. Images that cannot be read are left out. It costs about
    as much as one pass over the images.

    Args:
        datasets: to look in, and across.
        decode: compare pixels; else only what is stored, which is faster and finds fewer.
        show_progress: show a bar.

    Returns:
        Pairs (first place it is at, another place), sorted: k equal images give k - 1 pairs.
    """
    hashed = hash_of_pixels if decode else hash_of_bytes
    total = sum(map(len, datasets))
    with progress("comparing", total, show=show_progress) as advance:
        hashes = [list(for_each_image(dataset, hashed, advance)) for dataset in datasets]
    return equal_pairs(hashes)


def equal_pairs(hashes: Sequence[Sequence[bytes | None]]) -> list[tuple[Place, Place]]:
    """Which places have the same hash, of those that have one; see :func:`find_duplicates`."""
    first: dict[bytes, Place] = {}
    pairs = []
    for position, of_dataset in enumerate(hashes):
        for index, found in enumerate(of_dataset):
            place = Place(position, index)
            if found is not None and first.setdefault(found, place) != place:
                pairs.append((first[found], place))
    return sorted(pairs)


def hash_of_pixels(image: ImageSource) -> bytes | None:
    """16 bytes that tell what the image shows, in 8-bit RGB; None if it cannot be read."""
    try:
        return hash_of_image(image.original.open())
    except UnreadableImageError:
        return None


def hash_of_image(image: Image.Image) -> bytes:
    """16 bytes that tell an image's pixels and size from others."""
    return xxhash.xxh3_128_digest(b"%d,%d:" % image.size + image.tobytes())


def hash_of_bytes(image: ImageSource) -> bytes | None:
    """16 bytes that tell what is stored; None if it cannot be read."""
    try:
        return xxhash.xxh3_128_digest(image.read())
    except (OSError, ValueError) as error:
        if is_shortage(error):  # of this machine
            raise
        return None


#: Images that are handed to the threads at once: a million would take more memory than they do.
_CHUNK = 4096

T = TypeVar("T")


def for_each_image(
    dataset: ImageDataset, function: Callable[[ImageSource], T], advance: Callable[[], None]
) -> Iterator[T]:
    """What a function returns for every image, in order.

    Threads do it, for reading, decoding and hashing release the interpreter lock.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(dataset), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(dataset)))
            for found in pool.map(function, map(dataset.source, chunk)):
                advance()
                yield found
