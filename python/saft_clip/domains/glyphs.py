"""Glyphs of matplotlib's bundled TrueType fonts, as signed distance fields.

A distance field holds, at every point of the canvas, the distance to the glyph's edge: positive
inside, negative outside. Thickness, outline and soft edges are then one elementwise expression on a
batch (see :mod:`saft_clip.domains.effects`), so that each glyph is rendered only once.

The faces are divided once and for all into pretraining, validation and test faces. No file serves
two splits, and every test face is of the Computer Modern family, of which no other split has seen a
glyph.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from saft_clip.domains.extras import require

DIGITS = tuple("0123456789")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

CANVAS = 128
"""Side of the canvas on which a glyph is drawn, in pixels."""
FIELD = 64
"""Side of a distance field, in samples."""
IMAGE = 32
"""Side of an image, in pixels. Distances are measured in these."""
REACH = 8.0
"""Distances are clipped to this many image pixels."""
_CAP_HEIGHT = 88


@dataclass(frozen=True)
class Face:
    """One alphabet in one font file.

    Attributes:
        file: name of a TrueType file in matplotlib's font folder.
        capitals: code point of the alphabet's "A"; Unicode repeats the Latin alphabet in several
            mathematical styles, each of which counts as a face of its own.
        zero: code point of the alphabet's "0", or None if it has no digits.
    """

    file: str
    capitals: int = ord("A")
    zero: int | None = ord("0")

    def character(self, name: str) -> str | None:
        """The character shown for a class name such as "7" or "B"; None if there is none."""
        if name in LETTERS:
            return chr(self.capitals + LETTERS.index(name))
        return None if self.zero is None else chr(self.zero + DIGITS.index(name))


FACES: dict[str, tuple[Face, ...]] = {
    "pretrain": (
        Face("DejaVuSans.ttf"),
        Face("DejaVuSans-Bold.ttf"),
        Face("DejaVuSans-Oblique.ttf"),
        Face("DejaVuSans-BoldOblique.ttf"),
        Face("DejaVuSansMono.ttf"),
        Face("DejaVuSansMono-Bold.ttf"),
        Face("DejaVuSansMono-Oblique.ttf"),
        Face("DejaVuSerif.ttf"),
        Face("DejaVuSerif-Bold.ttf"),
        Face("DejaVuSerif-BoldItalic.ttf"),
        Face("STIXGeneral.ttf"),
        Face("STIXGeneralBol.ttf"),
        Face("STIXGeneralItalic.ttf"),
        Face("STIXGeneral.ttf", 0x1D5A0, 0x1D7E2),  # sans-serif
        Face("STIXGeneral.ttf", 0x1D5D4, 0x1D7EC),  # sans-serif bold
        Face("STIXGeneral.ttf", 0x1D608, None),  # sans-serif italic
        Face("STIXGeneral.ttf", 0x1D670, 0x1D7F6),  # monospace
        Face("STIXGeneral.ttf", 0x1D538, 0x1D7D8),  # double-struck
    ),
    "val": (
        Face("DejaVuSansMono-BoldOblique.ttf"),
        Face("DejaVuSerif-Italic.ttf"),
        Face("STIXGeneralBolIta.ttf"),
    ),
    "test": (
        Face("cmr10.ttf"),
        Face("cmb10.ttf"),
        Face("cmss10.ttf"),
        Face("cmtt10.ttf"),
        Face("cmti10.ttf"),
    ),
}


@functools.cache
def glyph_fields(split: str, names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance fields of the given characters in every face of a split.

    Args:
        split: "pretrain", "val" or "test".
        names: class names, each a capital letter or a digit.

    Returns:
        fields, float32 [G, 64, 64] in image pixels, and labels, int64 [G], indices into ``names``.
        A face that lacks a character is passed over, so the number per class may differ.

    Raises:
        MissingExtraError: matplotlib or scipy is not installed.
    """
    fields: list[torch.Tensor] = []
    labels: list[int] = []
    for face in FACES[split]:
        for label, name in enumerate(names):
            bitmap = render(face, name)
            if bitmap is not None:
                fields.append(distance_field(bitmap))
                labels.append(label)
    return torch.stack(fields), torch.tensor(labels)


def render(face: Face, name: str) -> np.ndarray | None:
    """Draw one glyph, its bounding box centred, capitals 88 pixels high.

    Returns:
        uint8 [128, 128], 255 inside the glyph; None if the face has no such character.
    """
    from PIL import Image, ImageDraw

    character = face.character(name)
    if character is None or ord(character) not in _characters(face.file):
        return None
    font = _font(face)
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (CANVAS, CANVAS))
    origin = ((CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2)
    ImageDraw.Draw(canvas).text(origin, character, fill=255, font=font)
    return np.asarray(canvas)


def distance_field(bitmap: np.ndarray) -> torch.Tensor:
    """Signed distance to the edge of a drawing, positive inside.

    Args:
        bitmap: uint8 [S, S], ink where it exceeds 127. S must be a multiple of 64.

    Returns:
        float32 [64, 64], in image pixels (the canvas is 32 wide), clipped to ±8.
    """
    transform = require("scipy.ndimage", "scipy").distance_transform_edt
    inside = bitmap > 127
    distance = transform(inside) - transform(~inside)
    field = torch.from_numpy(distance * (IMAGE / bitmap.shape[0])).float()
    pooled = torch.nn.functional.avg_pool2d(field[None], bitmap.shape[0] // FIELD)[0]
    return pooled.clamp(-REACH, REACH)


def font_folder() -> Path:
    """Folder of the TrueType fonts that matplotlib ships."""
    return Path(require("matplotlib", "matplotlib").get_data_path()) / "fonts" / "ttf"


@functools.cache
def _font(face: Face):  # type: ignore[no-untyped-def]
    from PIL import ImageFont

    path = str(font_folder() / face.file)
    trial = ImageFont.truetype(path, 100)
    _, top, _, bottom = trial.getbbox(chr(face.capitals + LETTERS.index("E")))
    return ImageFont.truetype(path, round(100 * _CAP_HEIGHT / (bottom - top)))


@functools.cache
def _characters(file: str) -> Sequence[int]:
    ft2font = require("matplotlib.ft2font", "matplotlib")
    return frozenset(ft2font.FT2Font(str(font_folder() / file)).get_charmap())  # type: ignore[return-value]
