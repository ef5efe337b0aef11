"""Effects on batches of distance fields and images, vectorised in torch.

Every function takes a ``torch.Generator`` (CPU) where it draws numbers, so that a seed fixes the
result. Images inside this module are float32 in [0, 1].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from saft_clip.domains.glyphs import IMAGE


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """float32 [count], uniform in [low, high)."""
    return low + (high - low) * torch.rand(count, generator=generator)


def chance(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """bool [count], each True with the given probability."""
    return torch.rand(count, generator=generator) < probability


def warp(
    fields: Tensor,
    generator: torch.Generator,
    *,
    rotation: float,
    shear: float,
    scale: tuple[float, float],
    stretch: float,
    shift: float,
    elastic: float,
) -> Tensor:
    """Move, turn, shear, scale and bend each field at random, and sample it at image resolution.

    Args:
        fields: float32 [N, 64, 64], distances in image pixels.
        generator: source of randomness.
        rotation: largest angle, in degrees, to either side.
        shear: largest horizontal shear, to either side.
        scale: range of the size; 1 keeps it.
        stretch: largest logarithm of height over width, to either side.
        shift: largest translation, in image pixels, to either side.
        elastic: standard deviation of the bending displacement, in image pixels.

    Returns:
        float32 [N, 32, 32]. Distances are multiplied by the size, so that they are still in image
        pixels.
    """
    count = len(fields)
    angle = uniform(count, -rotation, rotation, generator) * (math.pi / 180)
    slant = uniform(count, -shear, shear, generator)
    size = torch.exp(uniform(count, math.log(scale[0]), math.log(scale[1]), generator))
    aspect = torch.exp(uniform(count, -stretch, stretch, generator) / 2)
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).view(-1, 2, 2)
    linear = turn @ torch.stack(
        (torch.ones(count), slant, torch.zeros(count), torch.ones(count)), -1
    ).view(-1, 2, 2)
    linear = linear / torch.stack((size / aspect, size * aspect), -1)[:, None, :]
    offset = uniform(2 * count, -shift, shift, generator).view(count, 2, 1) * (2 / IMAGE)
    grid = F.affine_grid(torch.cat((linear, offset), -1), [count, 1, IMAGE, IMAGE], False)
    knots = torch.randn(count, 2, 5, 5, generator=generator) * (elastic * 2 / IMAGE)
    bend = F.interpolate(knots, (IMAGE, IMAGE), mode="bicubic", align_corners=True)
    grid = grid + bend.permute(0, 2, 3, 1)
    moved = F.grid_sample(fields[:, None], grid, padding_mode="border", align_corners=False)
    return moved[:, 0] * size.view(-1, 1, 1)


def fill(fields: Tensor, thicken: Tensor | float = 0.0, softness: Tensor | float = 1.0) -> Tensor:
    """Ink where the distance is positive.

    Args:
        fields: float32 [N, 32, 32], distances in image pixels.
        thicken: image pixels added to every edge; a tensor [N] or one number.
        softness: width of the edge, in image pixels; a tensor [N] or one number.

    Returns:
        float32 [N, 32, 32], the share of each pixel that is covered.
    """
    return (0.5 + (fields + _column(thicken)) / _column(softness)).clamp(0, 1)


def outline(fields: Tensor, width: Tensor | float, softness: Tensor | float = 1.0) -> Tensor:
    """Ink along the edge only, ``width`` image pixels wide; otherwise as :func:`fill`."""
    return (0.5 + (_column(width) / 2 - fields.abs()) / _column(softness)).clamp(0, 1)


def coarsen(images: Tensor, side: int) -> Tensor:
    """Reduce images [N, C, 32, 32] to ``side`` pixels by area, and enlarge them bilinearly."""
    small = F.interpolate(images, (side, side), mode="area")
    return F.interpolate(small, images.shape[-2:], mode="bilinear", align_corners=False)


def blur(images: Tensor, sigma: Tensor | float) -> Tensor:
    """Gaussian blur of images [N, C, H, W]; ``sigma`` in pixels, a tensor [N] or one number."""
    count, channels = images.shape[:2]
    if count == 0:
        return images
    sigmas = torch.as_tensor(sigma, dtype=torch.float32).expand(count)
    radius = max(1, math.ceil(3 * float(sigmas.max())))
    points = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (points / sigmas[:, None].clamp(min=1e-3)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = images.reshape(1, count * channels, *images.shape[2:])
    flat = F.pad(flat, (radius,) * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=count * channels)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=count * channels)
    return flat.view_as(images)


def add_noise(images: Tensor, sigma: Tensor | float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise of standard deviation ``sigma`` to images [N, C, H, W]; clip to [0, 1]."""
    noise = torch.randn(images.shape, generator=generator)
    return (images + noise * _column(sigma)[..., None]).clamp(0, 1)


def paint(ink: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    """Lay a colour over a background where there is ink.

    Args:
        ink: float32 [N, 32, 32] in [0, 1].
        foreground: float32 [N, 3].
        background: float32 [N, 3, 32, 32], or anything that broadcasts to it.

    Returns:
        float32 [N, 3, 32, 32].
    """
    cover = ink[:, None]
    return cover * foreground[:, :, None, None] + (1 - cover) * background


def contrasting_colours(count: int, contrast: float, generator: torch.Generator) -> Tensor:
    """Pairs of colours whose brightness differs by at least ``contrast``.

    Returns:
        float32 [count, 2, 3]: foreground and background, either of which may be the brighter one.
    """
    weights = torch.tensor([0.299, 0.587, 0.114])
    pairs = torch.rand(count, 16, 2, 3, generator=generator)
    difference = ((pairs[:, :, 0] - pairs[:, :, 1]) @ weights).abs()
    # The first of sixteen candidates that is far enough apart; the farthest if none is.
    choice = torch.where(difference >= contrast, 2.0, difference).argmax(1)
    return pairs[torch.arange(count), choice]


def textured_background(colour: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Uneven backgrounds: a colour [N, 3] plus smooth random variation of the given strength [N].

    Returns:
        float32 [N, 3, 32, 32] in [0, 1].
    """
    count = len(colour)
    cells = torch.randn(count, 3, 4, 4, generator=generator)
    cloud = F.interpolate(cells, (IMAGE, IMAGE), mode="bilinear", align_corners=True)
    return (colour[:, :, None, None] + cloud * _column(strength)[..., None]).clamp(0, 1)


def to_uint8(images: Tensor) -> Tensor:
    """float32 [N, C, H, W] in [0, 1] to uint8, three equal channels if there is one."""
    quantised = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return quantised.expand(-1, 3, -1, -1).contiguous()


def _column(value: Tensor | float) -> Tensor:
    """A number, or a tensor [N] as [N, 1, 1]."""
    tensor = torch.as_tensor(value, dtype=torch.float32)
    return tensor.view(-1, 1, 1) if tensor.dim() else tensor.view(1, 1, 1)
