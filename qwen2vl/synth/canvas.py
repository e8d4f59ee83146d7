"""Canvases of any size: width, height, background, blur and compression of composite pictures.

    canvas = sample_canvas(rng, mixture)               a Composite without layers
    picture = replace(canvas, layers=(...))

Small pictures are frequent, since most of what is learned does not depend on the size: the area is
sampled between the limits of the mixture with more mass at the lower one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

from qwen2vl.synth.colors import is_light, sample_ground
from qwen2vl.synth.compositing.layers import Composite, Ground
from qwen2vl.synth.spec import RGB, Mixture

__all__ = ["degrade", "sample_canvas", "sample_size"]

_SMALLER = 1.5  # exponent that makes small pictures more frequent; 1: all octaves equally
_MIN_SIDE = 28  # pixels
# The suite `honesty` holds out stripes and checks.
_GROUND_KINDS = ("gradient", "noise", "clouds")
_CELLS = (1, 2, 4, 8, 12, 16, 24)  # pixels


def sample_size(rng: Random, mixture: Mixture) -> tuple[int, int]:
    """Sample width and height, in pixels."""
    low, high = (math.log(side) for side in mixture.picture_side)
    side = math.exp(low + (high - low) * rng.random() ** _SMALLER)
    limit = math.log(mixture.max_aspect)
    # Most pictures are no banners.
    aspect = math.exp(rng.uniform(-limit, limit) * rng.random() ** 0.5)
    width, height = side * aspect**0.5, side / aspect**0.5
    return max(_MIN_SIDE, round(width)), max(_MIN_SIDE, round(height))


def sample_canvas(
    rng: Random, mixture: Mixture, *, size: tuple[int, int] | None = None, strong: float = 0.0
) -> Composite:
    """Sample an empty picture, without blur and compression: `degrade` adds these.

    Args:
        rng: source of the choices.
        mixture: its sizes and shares.
        size: (width, height) in place of a sampled one.
        strong: share of the backgrounds whose two colors differ strongly, as those of photos do.
    """
    width, height = size or sample_size(rng, mixture)
    return Composite(width=width, height=height, ground=_sample_ground(rng, mixture, strong))


def degrade(rng: Random, picture: Composite, mixture: Mixture) -> Composite:
    """Blur and compress a share of the pictures."""
    if rng.random() >= mixture.degraded_share:
        return picture
    how = rng.randrange(3)
    side = min(picture.width, picture.height)
    blur = round(rng.uniform(0.3, min(1.2, side / 200)), 2) if how != 1 and side > 60 else 0.0
    quality = rng.randint(40, 95) if how != 0 else 0
    return replace(picture, blur=blur, jpeg_quality=quality)


def _sample_ground(rng: Random, mixture: Mixture, strong: float) -> Ground:
    rgb = sample_ground(rng)
    if rng.random() >= mixture.textured_share:
        return Ground(rgb=rgb)
    is_strong = rng.random() < strong
    distance = rng.randint(30, 110) if is_strong else rng.randint(6, 18)
    kind = rng.choice(_GROUND_KINDS)
    # Large cells of strong noise look like squares of many colors.
    cell = rng.choice(_CELLS[:4] if kind == "noise" and is_strong else _CELLS)
    return Ground(
        kind=kind,
        rgb=rgb,
        rgb2=_shift(rgb, -distance if is_light(rgb) else distance),
        cell=cell,
        seed=rng.randrange(1, 1_000_000),
    )


def _shift(rgb: RGB, by: int) -> RGB:
    r, g, b = (min(255, max(0, channel + by)) for channel in rgb)
    return r, g, b
