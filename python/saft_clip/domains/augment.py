"""Random renderings of distance fields, for pretraining the tiny CLIP."""

from __future__ import annotations

import torch
from torch import Tensor

from saft_clip.domains import effects

_COARSE = ((8, 0.2), (12, 0.1), (16, 0.1))
"""Pixels per side that an image is reduced to, and how often at full strength."""


def random_renderings(fields: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Draw each shape once, in a random pose, line, colour, background, sharpness and noise.

    Args:
        fields: float32 [N, 64, 64], distances in image pixels.
        strength: from 0 (near-upright, white on black, clean) to 1 (all ranges at their widest).
        generator: source of randomness.

    Returns:
        float32 [N, 3, 32, 32] in [0, 1].
    """
    ink = _random_ink(fields, strength, generator)
    images = _random_colours(ink, strength, generator)
    images = _random_sharpness(images, strength, generator)
    count = len(images)
    sigma = effects.uniform(count, 0.0, 0.3 * strength, generator)
    sigma = sigma * effects.chance(count, 0.35, generator)
    return effects.add_noise(images, sigma, generator)


def _random_ink(fields: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Filled shapes of random thickness, and outlines of some: float32 [N, 32, 32] in [0, 1]."""
    count = len(fields)
    moved = effects.warp(
        fields,
        generator,
        rotation=5 + 15 * strength,
        shear=0.1 + 0.25 * strength,
        scale=(0.9 - 0.25 * strength, 1.1 + 0.3 * strength),
        stretch=0.1 + 0.5 * strength,
        shift=1 + 2.5 * strength,
        elastic=0.3 + 0.9 * strength,
    )
    thicken = effects.uniform(count, -0.8 * strength, 0.1 + 1.5 * strength, generator)
    # Thinning must leave something of the thinnest glyphs.
    thicken = torch.maximum(thicken, 0.35 - fields.flatten(1).amax(1))
    softness = effects.uniform(count, 0.8, 1.0 + strength, generator)
    filled = effects.fill(moved, thicken, softness)
    line_width = effects.uniform(count, 0.8, 1.8, generator)
    hollow = effects.outline(moved, line_width, softness)
    is_hollow = effects.chance(count, 0.15 * strength, generator)
    return torch.where(is_hollow.view(-1, 1, 1), hollow, filled)


def _random_colours(ink: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """White on black, black on white, or two colours: float32 [N, 3, 32, 32] in [0, 1]."""
    count = len(ink)
    is_grey = effects.chance(count, 1 - 0.4 * strength, generator)
    colours = effects.contrasting_colours(count, 0.25, generator)
    grey = torch.tensor([1.0, 0.0])[None, :, None].expand(count, 2, 3)
    inverted = effects.chance(count, 0.4 * strength, generator)
    grey = torch.where(inverted.view(-1, 1, 1), grey.flip(1), grey)
    grey = grey * effects.uniform(count, 1 - 0.4 * strength, 1.0, generator).view(-1, 1, 1)
    pairs = torch.where(is_grey.view(-1, 1, 1), grey, colours)
    variation = effects.uniform(count, 0.0, 0.2 * strength, generator)
    variation = variation * effects.chance(count, 0.5, generator) * ~is_grey
    background = effects.textured_background(pairs[:, 1], variation, generator)
    return effects.paint(ink, pairs[:, 0], background)


def _random_sharpness(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Reduce some images to few pixels and blur some."""
    count = len(images)
    images = images.clone()
    for side, probability in _COARSE:
        few = effects.chance(count, probability * strength, generator)
        images[few] = effects.coarsen(images[few], side)
    soft = effects.chance(count, 0.25 * strength, generator)
    sigma = effects.uniform(int(soft.sum()), 0.4, 1.6, generator)
    images[soft] = effects.blur(images[soft], sigma)
    return images
