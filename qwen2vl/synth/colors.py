"""Sampling of colors: twelve named colors for shapes, backgrounds, and text colors.

Each named color is an RGB segment between two anchors, so that CSS "green" and "lime" are both
green while no two segments meet. Backgrounds ("grounds") are light or dark with a slight tint;
white is used on dark grounds only and black on light ones only. Text uses any pair of colors with
sufficient WCAG contrast.
"""

from __future__ import annotations

from random import Random

from qwen2vl.synth.spec import RGB

__all__ = [
    "COLORS",
    "MORE_COLORS",
    "colors_on",
    "contrast",
    "is_light",
    "sample_color",
    "sample_ground",
    "sample_text_colors",
    "shades_of",
]

COLORS: dict[str, tuple[RGB, RGB]] = {
    "red": ((255, 0, 0), (205, 35, 35)),
    "green": ((0, 128, 0), (30, 235, 40)),
    "blue": ((0, 0, 255), (40, 100, 225)),
    "yellow": ((255, 255, 0), (245, 220, 30)),
    "orange": ((255, 165, 0), (245, 115, 10)),
    "purple": ((128, 0, 128), (160, 60, 215)),
    "black": ((0, 0, 0), (28, 28, 28)),
    "white": ((255, 255, 255), (236, 236, 236)),
}

# Further colors of composite pictures. Frozen suites are sampled from COLORS alone.
MORE_COLORS: dict[str, tuple[RGB, RGB]] = {
    "brown": ((139, 69, 19), (156, 50, 42)),  # CSS "brown" is (165, 42, 42)
    "gray": ((128, 128, 128), (142, 142, 142)),
    "teal": ((0, 128, 128), (20, 160, 150)),
    "pink": ((255, 105, 180), (255, 150, 195)),
}

_MIN_CONTRAST = 3.5  # of ink on ground; WCAG requires 3 for large and 4.5 for small text


def shades_of(name: str) -> tuple[RGB, RGB]:
    """Return the two ends of a named color's segment, of COLORS or MORE_COLORS."""
    return COLORS[name] if name in COLORS else MORE_COLORS[name]


def sample_color(rng: Random, name: str) -> RGB:
    """Sample a shade of the named color."""
    (r1, g1, b1), (r2, g2, b2) = shades_of(name)
    t = rng.random()
    return (round(r1 + t * (r2 - r1)), round(g1 + t * (g2 - g1)), round(b1 + t * (b2 - b1)))


def sample_ground(rng: Random) -> RGB:
    """Sample a light or dark background; one in three is pure white or black."""
    light = rng.random() < 0.6
    if rng.random() < 1 / 3:
        return (255, 255, 255) if light else (0, 0, 0)
    base = rng.randint(222, 246) if light else rng.randint(10, 44)
    return (base + rng.randint(-9, 9), base + rng.randint(-9, 9), base + rng.randint(-9, 9))


def is_light(ground: RGB) -> bool:
    """Return whether a background is light."""
    return sum(ground) > 384


def colors_on(ground: RGB) -> list[str]:
    """Return the names of the colors that are distinguishable on this background."""
    invisible = "white" if is_light(ground) else "black"
    return [name for name in COLORS if name != invisible]


def sample_text_colors(rng: Random) -> tuple[RGB, RGB]:
    """Sample (ink, ground): any two colors of sufficient contrast, either one the lighter."""
    while True:
        ground = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        ink = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        if rng.random() < 0.5:  # real text seldom has a colorful ink and a colorful ground
            ground = sample_ground(rng)
        if contrast(ink, ground) >= _MIN_CONTRAST:
            return ink, ground


def contrast(a: RGB, b: RGB) -> float:
    """Return the ratio of relative luminances, 1 to 21 (WCAG 2, with gamma 2.2)."""
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(rgb: RGB) -> float:
    r, g, b = rgb
    return 0.2126 * (r / 255) ** 2.2 + 0.7152 * (g / 255) ** 2.2 + 0.0722 * (b / 255) ** 2.2
