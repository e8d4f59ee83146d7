"""Boxes and points of an answer, for people: lines in pixels, and a picture with them drawn.

Coordinates are those of the picture as given (EXIF applied, unless the preset leaves it), never of
what the model saw. With several pictures shown at once a box belongs to the first, since the
answer does not say. It must not know the model. Next room: ask.py.
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

__all__ = ["Found", "draw", "draw_shapes", "find", "without_marks"]

COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One shape of an answer in pixels."""

    phrase: str
    corners: tuple[tuple[float, float], ...]  # one for a point, two for a box, four for a quad

    @property
    def text(self) -> str:
        """Write it as a line: `the cat: (176, 106) to (232, 160)`, safe for any terminal."""
        places = [f"({x:.0f}, {y:.0f})" for x, y in self.corners]
        return (
            f"{terminal.plain(self.phrase)}: {(' to ' if len(places) == 2 else ' ').join(places)}"
        )


def find(text: str, items: Sequence[ItemReport]) -> list[Found]:
    """Read the shapes of an answer, in pixels of the first item as given."""
    if not items:
        return []
    found: list[Found] = []
    entries = grounding.parse(text)
    for number, entry in enumerate(entries, 1):
        numbers = entry.shape.to_pixels(items[0].size_given)
        corners = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        unnamed = f"box {number}" if len(entries) > 1 else "box"
        found.append(Found(phrase=entry.phrase or unnamed, corners=corners))
    return found


def draw(source: str, found: Sequence[Found], output: str, processor: Processor) -> None:
    """Draw shapes on the picture as `processor` saw it; without shapes nothing is written.

    Raises:
        InputError: the file cannot be written.
    """
    from qwen2vl.processor.media.rgb import open_image
    from qwen2vl.processor.video import find_preset

    if not found:
        terminal.note(f"the answer has no boxes: {output} was not written")
        return
    # A preset that leaves photos as they lie has boxes that lie with them.
    turn = find_preset(processor.video_preset).turn_pictures
    picture, _ = open_image(source, processor.limits, source, turn=turn)
    draw_shapes(picture, found)
    terminal.save_picture(picture, output)
    terminal.note(f"wrote {output}")


def draw_shapes(picture: Image.Image, found: Sequence[Found]) -> None:
    """Draw shapes with their phrases on a picture, in place."""
    from PIL import ImageDraw

    pen = ImageDraw.Draw(picture)
    width = max(2, round(max(picture.size) / 300))
    for number, shape in enumerate(found):
        _draw_shape(pen, shape, COLORS[number % len(COLORS)], width)


def without_marks(text: str) -> str:
    """Take the grounding tokens out of a text."""
    for token in grounding.GROUNDING_TOKENS:
        text = text.replace(token, "")
    return text


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Found, color: str, width: int) -> None:
    size = max(12, 6 * width)
    (left, top), *rest = shape.corners
    if not rest:
        pen.circle((left, top), 3 * width, outline=color, width=width)
    elif len(rest) == 1:
        pen.rectangle((left, top, *rest[0]), outline=color, width=width)
    else:
        pen.line((*shape.corners, shape.corners[0]), fill=color, width=width)
    label = shape.phrase.encode("ascii", "replace").decode()
    place = (left + width, top - size - width if top > size + width else top + width)
    pen.text(place, label, fill=color, font_size=size, stroke_width=1, stroke_fill="white")
