"""Layout of texts in pictures: blocks of lines that fit, inks that are legible, canvases.

    block = sample_block(rng, mixture, "greek", 1, Limits(...))
    picture, ink = crop_canvas(rng, mixture, block)     the canvas is the block and its padding
    placed = place_block(block, x, y, ink)              layers of the picture

Limits that no text of the script fits make `sample_block` return None.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from qwen2vl.synth.canvas import sample_canvas
from qwen2vl.synth.colors import COLORS, MORE_COLORS, contrast, sample_color, sample_text_colors
from qwen2vl.synth.compositing.layers import Composite, Ground, Text
from qwen2vl.synth.compositing.text import has_cached_glyphs, text_extent
from qwen2vl.synth.scripts.alphabets import find_script
from qwen2vl.synth.scripts.faces import Face, covers, sample_face, unclear_in
from qwen2vl.synth.scripts.words import sample_text
from qwen2vl.synth.spec import RGB, Box, Mixture

__all__ = [
    "Block",
    "Ink",
    "Limits",
    "box_of",
    "crop_canvas",
    "degrade_text",
    "free_place",
    "limits_of",
    "place_block",
    "sample_block",
    "sample_ink",
    "sample_style",
]

_MARGIN = 3  # pixels between a text and the edge of its canvas
_LEADING = (1.15, 1.7)  # of the font size: distance between the baselines of a block
_MIN_CONTRAST = 3.0  # of an ink on both colors of a ground
_ATTEMPTS = 12
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_ANY_PAIR_SHARE = 0.5  # of the pictures that are not black on white: any two colors
_CACHED_SHARE = 0.8  # of the texts that are drawn from cached glyphs
_MAX_BLUR = 1 / 28  # of the font size
_QUALITY = (45, 95)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a block must fit, in pixels."""

    width: int
    height: int
    area: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ink:
    """Color of a text."""

    rgb: RGB
    name: str = ""  # empty: a color without a name


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One or more lines in one face and size; its ink begins at (0, 0)."""

    script: str
    texts: tuple[str, ...]
    font: str
    size: int  # pixels per em
    pens: tuple[tuple[int, int], ...]  # (x, y) of the left end of each line, on its baseline
    width: int
    height: int


def sample_block(
    rng: Random, mixture: Mixture, script: str, lines: int, limits: Limits
) -> Block | None:
    """Sample texts, a face and a font size that fit; None if there are no such.

    Raises:
        ConfigError, DatasetNotFoundError: as `sample_text` and `sample_face` do.
    """
    low, high = mixture.text_length
    leading = rng.uniform(*_LEADING) if lines > 1 else 1.0
    align = rng.choice((0.0, 0.0, 0.5, 1.0))  # left, centered, right
    for _ in range(_ATTEMPTS):
        face = sample_face(rng, script)
        smallest, size = _sample_size(rng, mixture, script, face, lines, limits)
        fitting = int(limits.width / (find_script(script).width * size))
        longest = max(1, min(high, fitting))
        texts = _sample_texts(rng, mixture, script, face, lines, (min(low, longest), longest))
        while texts and size >= smallest:
            block = _arrange(script, texts, face.file, size, leading, align)
            share = min(
                limits.width / block.width,
                limits.height / block.height,
                (limits.area / (block.width * block.height)) ** 0.5,
            )
            if share >= 1:
                return block
            size = min(size - 1, int(size * share))
        high = max(low, round(0.8 * longest))
    return None


def place_block(block: Block, x: int, y: int, ink: Ink) -> tuple[Text, ...]:
    """Return the layers of a block whose ink begins at (x, y)."""
    return tuple(
        Text(text=text, font=block.font, size=block.size, x=x + dx, y=y + dy, rgb=ink.rgb)
        for text, (dx, dy) in zip(block.texts, block.pens, strict=True)
    )


def crop_canvas(rng: Random, mixture: Mixture, block: Block) -> tuple[Composite, Ink]:
    """Draw a block on a canvas that has its size and a padding."""
    left, top, right, bottom = (rng.randint(*mixture.padding) for _ in range(4))
    size = (left + block.width + right, top + block.height + bottom)
    canvas, ink = sample_style(rng, mixture, size)
    return replace(canvas, layers=place_block(block, left, top, ink)), ink


def sample_style(
    rng: Random, mixture: Mixture, size: tuple[int, int], *, named: bool = False
) -> tuple[Composite, Ink]:
    """Sample an empty picture and an ink that is legible on it.

    Args:
        size: (width, height), pixels.
        named: only colors that have a name.
    """
    width, height = size
    if rng.random() < mixture.plain_share:
        plain = Composite(width=width, height=height)
        return plain, Ink(rgb=_BLACK, name="black")
    if not named and rng.random() < _ANY_PAIR_SHARE:
        ink, ground = sample_text_colors(rng)
        return Composite(width=width, height=height, ground=Ground(rgb=ground)), Ink(rgb=ink)
    canvas = sample_canvas(rng, mixture, size=size)
    return canvas, sample_ink(rng, canvas.ground)


def sample_ink(rng: Random, ground: Ground, excluded: tuple[str, ...] = ()) -> Ink:
    """Sample a color with a name that is legible on both colors of a ground."""
    under = (ground.rgb,) if ground.kind == "plain" else (ground.rgb, ground.rgb2)
    names = [name for name in (*COLORS, *MORE_COLORS) if name not in excluded]
    for name in rng.sample(names, len(names)):
        rgb = sample_color(rng, name)
        if min(contrast(rgb, other) for other in under) >= _MIN_CONTRAST:
            return Ink(rgb=rgb, name=name)
    is_dark = contrast(_WHITE, under[0]) > contrast(_BLACK, under[0])
    return Ink(rgb=_WHITE, name="white") if is_dark else Ink(rgb=_BLACK, name="black")


def degrade_text(rng: Random, picture: Composite, mixture: Mixture) -> Composite:
    """Blur and compress a share of the pictures, no more than their smallest text bears."""
    if rng.random() >= mixture.degraded_share:
        return picture
    smallest = min(layer.size for layer in picture.layers if isinstance(layer, Text))
    how = rng.randrange(3)
    blur = round(rng.uniform(0.2, 1) * min(1.2, _MAX_BLUR * smallest), 2) if how != 1 else 0.0
    quality = rng.randint(*_QUALITY) if how != 0 else 0
    return replace(picture, blur=blur, jpeg_quality=quality)


def free_place(rng: Random, canvas: Composite, block: Block) -> tuple[int, int]:
    """Sample where the ink of a block begins on a canvas that holds it."""
    free = (canvas.width - block.width - _MARGIN, canvas.height - block.height - _MARGIN)
    return rng.randint(_MARGIN, max(_MARGIN, free[0])), rng.randint(_MARGIN, max(_MARGIN, free[1]))


def box_of(block: Block, x: int, y: int) -> Box:
    """Return the box of a block whose ink begins at (x, y)."""
    return x, y, x + block.width, y + block.height


def limits_of(canvas: Composite) -> Limits:
    """Return what fits a canvas with its margins."""
    width, height = canvas.width - 2 * _MARGIN, canvas.height - 2 * _MARGIN
    return Limits(width=width, height=height, area=width * height)


def _sample_size(
    rng: Random, mixture: Mixture, script: str, face: Face, lines: int, limits: Limits
) -> tuple[int, int]:
    """Sample a font size, and return it after the smallest one that is legible."""
    low, high = mixture.font_size
    smallest = max(low, find_script(script).min_size, face.min_size)
    if mixture.large_share and rng.random() < mixture.large_share:
        low, high = high, 3 * high
    highest = int(limits.height / (0.8 * lines))  # the ink of a line is about as high
    size = rng.randint(max(smallest, low), max(smallest, low, high))
    size = max(smallest, min(size, highest))
    if rng.random() < _CACHED_SHARE:
        sizes = range(size, max(smallest, size - 8) - 1, -1)
        size = next((one for one in sizes if has_cached_glyphs(face.file, one)), size)
    return smallest, size


def _sample_texts(
    rng: Random,
    mixture: Mixture,
    script: str,
    face: Face,
    lines: int,
    lengths: tuple[int, int],
) -> tuple[str, ...]:
    """Sample texts that a face draws; none if it draws few of them."""
    texts: list[str] = []
    for _ in range(4 * lines):
        text = sample_text(
            rng,
            script,
            *lengths,
            random_share=mixture.random_share,
            excluded=unclear_in(face),
        )
        text = text.upper() if face.has_capitals_only else text
        if text and covers(face, text):
            texts.append(text)
        if len(texts) == lines:
            return tuple(texts)
    return ()


def _arrange(
    script: str, texts: tuple[str, ...], font: str, size: int, leading: float, align: float
) -> Block:
    """Measure lines and put them below each other."""
    extents = [text_extent(text, font, size) for text in texts]
    step = round(leading * size)
    width = max(right - left for left, _, right, _ in extents)
    top = min(index * step + extent[1] for index, extent in enumerate(extents))
    bottom = max(index * step + extent[3] for index, extent in enumerate(extents))
    pens = tuple(
        (round(align * (width - (right - left))) - left, index * step - top)
        for index, (left, _, right, _) in enumerate(extents)
    )
    return Block(
        script=script,
        texts=texts,
        font=font,
        size=size,
        pens=pens,
        width=max(1, width),
        height=max(1, bottom - top),
    )
