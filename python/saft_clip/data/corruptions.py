"""Corrupted images: any data set becomes a shifted one, by the corruptions of ImageNet-C.

Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations": 15 corruptions and 4 more for validation, each in five severities. They are those of
the package imagecorruptions-imaug, applied to the image as it is stored. ImageNet-C's own files
were corrupted after they had been cropped to 224 x 224 pixels, and saved as JPEG: on larger images
the same severity is a weaker shift.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import xxhash
from PIL import Image

from saft_clip.data.dataset import ImageDataset
from saft_clip.data.images import ImageSource, source_of
from saft_clip.errors import DataError, MissingExtraError, UnreadableImageError

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    *("speckle_noise", "gaussian_blur", "spatter", "saturate"),
)
SEVERITIES = range(1, 6)

#: The least width and height that all corruptions can be computed on.
SMALLEST = 32

#: Those that draw from a generator of their own, and so take a seed.
_SEEDED = frozenset(("impulse_noise", "glass_blur"))


@dataclass(frozen=True, slots=True, eq=False)
class CorruptedImage(ImageSource):
    """An image with a corruption; the same each time.

    Attributes:
        image: as it is stored.
        corruption: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        index: its position in its split of the data set: another one has other noise.
    """

    image: Any
    corruption: str
    severity: int
    index: int

    @property
    def label(self) -> str:
        """That of the stored image."""
        return self.original.label

    @property
    def original(self) -> ImageSource:
        """The stored image."""
        return source_of(self.image)

    def open(self) -> Image.Image:
        """The corrupted image, of the same size."""
        image = self.original.open()
        self._require_size(image)
        seed = xxhash.xxh32_intdigest(self._text)
        options = {"seed": seed} if self.corruption in _SEEDED else {}
        with _numpy_seeded(seed):
            pixels = _package().corrupt(
                np.array(image), severity=self.severity, corruption_name=self.corruption, **options
            )
        return Image.fromarray(pixels)

    def check(self) -> None:
        """Open the stored image only: whatever its pixels are, they can be corrupted."""
        self._require_size(self.original.open())

    def read(self) -> bytes:
        """What is stored of the image without the corruption."""
        return self.original.read()

    def mark(self, content: bool) -> bytes:
        """The stored image's, and how it is changed."""
        return self.original.mark(content) + self._text

    @property
    def _text(self) -> bytes:
        return f"#{self.corruption}:{self.severity}:{self.index}".encode()

    def _require_size(self, image: Image.Image) -> None:
        if min(image.size) < SMALLEST:
            width, height = image.size
            raise UnreadableImageError(
                self.label,
                f"its {width} x {height} pixels are too few for a corruption, which needs "
                f"{SMALLEST} x {SMALLEST}",
            )


def corrupted(dataset: ImageDataset, corruption: str) -> ImageDataset:
    """The data set with one corruption on every image.

    Args:
        dataset: N images, each at its position in its split.
        corruption: ``<name>:<severity>``, such as ``fog:3``.

    Raises:
        DataError: if there is no such corruption or severity.
        MissingExtraError: if the package that computes them is not installed.
    """
    name, _, severity = corruption.partition(":")
    if name not in CORRUPTIONS:
        raise DataError(
            f"there is no corruption {name!r}; choose one of {', '.join(sorted(CORRUPTIONS))}"
        )
    if severity not in map(str, SEVERITIES):
        raise DataError(f"the severity of {name} must be 1 to 5, not {severity}")
    _package()  # found missing here, not in a process that loads images
    return replace(
        dataset,
        name=f"{dataset.name} ({name.replace('_', ' ')} {severity})",
        images=[
            CorruptedImage(image, name, int(severity), index)
            for index, image in enumerate(dataset.images)
        ],
    )


@functools.cache
def _package() -> ModuleType:
    try:
        import cv2
        import imagecorruptions
    except ImportError as error:
        raise MissingExtraError(
            "corruptions need the package imagecorruptions-imaug, which cannot be imported "
            f"({error}): install the data extra, pip install 'saft-kernels[data]'"
        ) from error
    cv2.setNumThreads(0)  # its threads do not survive the fork of a process that loads images
    return imagecorruptions


_one_at_a_time = threading.Lock()


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """NumPy's global generator, which the package draws from, at a seed; afterwards as before."""
    with _one_at_a_time:
        before = np.random.get_state()
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before)
