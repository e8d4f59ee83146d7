"""Grounding output of a completion: boxes, quads and points in pixels, as text and drawn.

Coordinates are pixels of the original image (after EXIF orientation, unless the video preset
ignores it), not of the resized one. Where a prompt has several images, boxes are assigned to the
first, since the output does not name an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen2vl import grounding
from qwen2vl.cli import terminal

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

    from qwen2vl.engine.outputs import ItemReport
    from qwen2vl.processor.processor import Processor

__all__ = [
    "PixelShape",
    "draw_shapes",
    "parse_shapes",
    "save_annotated_image",
    "strip_grounding_tokens",
]

COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelShape:
    """One shape of a completion, in pixels of the original image."""

    phrase: str
    corners: tuple[tuple[float, float], ...]  # one for a point, two for a box, four for a quad

    @property
    def text(self) -> str:
        """The shape as a line of escaped text: `the cat: (176, 106) to (232, 160)`."""
        points = [f"({x:.0f}, {y:.0f})" for x, y in self.corners]
        separator = " to " if len(points) == 2 else " "
        return f"{terminal.escape_control_characters(self.phrase)}: {separator.join(points)}"


def parse_shapes(text: str, items: Sequence[ItemReport]) -> list[PixelShape]:
    """Parse the shapes of a completion, in pixels of the first item at its original size."""
    if not items:
        return []
    shapes: list[PixelShape] = []
    entries = grounding.parse(text)
    for number, entry in enumerate(entries, 1):
        numbers = entry.shape.to_pixels(items[0].original_size)
        corners = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        unnamed = f"box {number}" if len(entries) > 1 else "box"
        shapes.append(PixelShape(phrase=entry.phrase or unnamed, corners=corners))
    return shapes


def save_annotated_image(
    source: str, shapes: Sequence[PixelShape], output: str, processor: Processor
) -> None:
    """Draw shapes on an image file, oriented as by `processor`, and write it to `output`.

    Without shapes nothing is written.

    Raises:
        InputError: the file cannot be written.
    """
    from qwen2vl.processor.media.rgb import open_image
    from qwen2vl.processor.video import find_video_preset

    if not shapes:
        terminal.note(f"the answer has no boxes: {output} was not written")
        return
    # Boxes refer to the orientation in which the preset passes the image to the model.
    preset = find_video_preset(processor.video_preset)
    image, _ = open_image(
        source,
        processor.limits,
        source,
        apply_exif_orientation=preset.apply_exif_orientation,
    )
    draw_shapes(image, shapes)
    terminal.save_image(image, output)
    terminal.note(f"wrote {output}")


def draw_shapes(image: Image.Image, shapes: Sequence[PixelShape]) -> None:
    """Draw shapes with their phrases on an image, in place."""
    from PIL import ImageDraw

    pen = ImageDraw.Draw(image)
    width = max(2, round(max(image.size) / 300))
    for number, shape in enumerate(shapes):
        _draw_shape(pen, shape, COLORS[number % len(COLORS)], width)


def strip_grounding_tokens(text: str) -> str:
    """Remove the grounding tokens from a text."""
    for token in grounding.GROUNDING_TOKENS:
        text = text.replace(token, "")
    return text


def _draw_shape(pen: ImageDraw.ImageDraw, shape: PixelShape, color: str, width: int) -> None:
    size = max(12, 6 * width)
    (left, top), *rest = shape.corners
    if not rest:
        pen.circle((left, top), 3 * width, outline=color, width=width)
    elif len(rest) == 1:
        pen.rectangle((left, top, *rest[0]), outline=color, width=width)
    else:
        pen.line((*shape.corners, shape.corners[0]), fill=color, width=width)
    label = shape.phrase.encode("ascii", "replace").decode()
    position = (left + width, top - size - width if top > size + width else top + width)
    pen.text(position, label, fill=color, font_size=size, stroke_width=1, stroke_fill="white")
