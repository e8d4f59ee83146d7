"""Grounding output of a completion: boxes, quads and points as readable text, in pixels.

Coordinates are pixels of the original image (after EXIF orientation, unless the video preset
ignores it), not of the resized one. The output does not say which image of a prompt it means:
where they differ in size, the text has the pixels in each of them. annotate.py draws them.

    <|object_ref_start|>cat<|object_ref_end|><|box_start|>(440,212),(580,320)<|box_end|>
    cat: (176, 106) to (232, 160)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from qwen2vl import grounding
from qwen2vl.cli import terminal

__all__ = [
    "GroundingText",
    "PixelShape",
    "SizedItem",
    "parse_shapes",
    "readable_text",
    "shapes_in_size",
    "strip_grounding_tokens",
]

THOUSANDTHS = (1000, 1000)  # the size in which coordinates of a prompt without images are given
SPECIAL = "<|"  # begins every special token
STARTS = (grounding.REF_START, grounding.BOX_START, grounding.QUAD_START)


class SizedItem(Protocol):
    """An image or video that boxes may refer to: an Item, an ItemReport, or a file's header."""

    @property
    def name(self) -> str:
        """For messages: a file name, or "image 2"."""
        ...

    @property
    def original_size(self) -> grounding.Size:
        """(height, width) in pixels, with the EXIF orientation applied."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelShape:
    """One shape of a completion, in pixels of the original image."""

    phrase: str
    corners: tuple[tuple[float, float], ...]  # one for a point, two for a box, four for a quad

    @property
    def text(self) -> str:
        """The shape as a line of escaped text: `the cat: (176, 106) to (232, 160)`."""
        phrase = terminal.escape_control_characters(self.phrase)
        return f"{phrase}: {_format_corners(self.corners)}"


def parse_shapes(text: str, items: Sequence[SizedItem]) -> list[PixelShape]:
    """Parse the shapes of a completion, in pixels of the first item at its original size."""
    return shapes_in_size(text, items[0].original_size) if items else []


def shapes_in_size(text: str, size: grounding.Size) -> list[PixelShape]:
    """Parse the shapes of a completion, in pixels of an image of `size` (height, width)."""
    shapes: list[PixelShape] = []
    entries = grounding.parse(text)
    for number, entry in enumerate(entries, 1):
        corners = _corners(entry.shape, size)
        unnamed = f"box {number}" if len(entries) > 1 else "box"
        shapes.append(PixelShape(phrase=entry.phrase or unnamed, corners=corners))
    return shapes


def readable_text(text: str, items: Sequence[SizedItem]) -> str:
    """Return a completion with its grounding spans as phrases and pixels."""
    converter = GroundingText(items)
    return converter.feed(text) + converter.finish()


def strip_grounding_tokens(text: str) -> str:
    """Remove the grounding tokens from a text."""
    for token in grounding.GROUNDING_TOKENS:
        text = text.replace(token, "")
    return text


class GroundingText:
    """Streaming conversion of a completion to readable text: `feed` each delta, then `finish`.

    A span is returned when it is complete; other text at once. Two shapes that follow each other
    without a line break are separated by one, or by a comma if they share a phrase.
    """

    def __init__(self, items: Sequence[SizedItem]) -> None:
        """Convert coordinates to pixels of `items`, the images and videos that may be meant."""
        # One of each size: boxes have the same pixels in images of the same size.
        sizes = {item.original_size: item.name for item in reversed(items)}
        self._names = {size: sizes[size] for size in dict.fromkeys(i.original_size for i in items)}
        self._pending = ""
        self._previous = "text"  # what the last converted piece was: text, phrase or shape

    def feed(self, delta: str) -> str:
        """Convert a piece of text; return what is complete."""
        self._pending += delta
        return "".join(self._convert(is_last=False))

    def finish(self) -> str:
        """Return what was held back, at the end of the text."""
        return "".join(self._convert(is_last=True))

    def _convert(self, *, is_last: bool) -> Iterator[str]:
        while self._pending:
            start = self._pending.find(SPECIAL)
            if start < 0:
                is_cut = self._pending.endswith(SPECIAL[0]) and not is_last
                yield self._take_text(len(self._pending) - is_cut)
                return
            if start > 0:
                yield self._take_text(start)
            token = next((t for t in grounding.GROUNDING_TOKENS if self._pending.startswith(t)), "")
            if not token:
                may_become_one = any(
                    t.startswith(self._pending) for t in grounding.GROUNDING_TOKENS
                )
                if may_become_one and not is_last:
                    return
                yield self._take_text(len(SPECIAL))
            elif token not in STARTS:
                self._pending = self._pending.removeprefix(token)
            else:
                # A span ends at any special token: small models forget end tokens.
                end = self._pending.find(SPECIAL, len(token))
                if end < 0 and not is_last:
                    return
                end = len(self._pending) if end < 0 else end
                body, self._pending = self._pending[len(token) : end], self._pending[end:]
                yield self._format_span(token, body)

    def _take_text(self, length: int) -> str:
        text, self._pending = self._pending[:length], self._pending[length:]
        if text:
            self._previous = "text"
        return text

    def _format_span(self, token: str, body: str) -> str:
        previous = self._previous
        if token == grounding.REF_START:
            self._previous = "phrase"
            return ("\n" if previous == "shape" else "") + body
        self._previous = "shape"
        separator = {"text": "", "phrase": ": ", "shape": ", "}[previous]
        shapes = [entry.shape for entry in grounding.parse(token + body)]
        # Without a valid count of numbers nothing can be drawn; what the model wrote is shown.
        return separator + (", ".join(map(self._format_shape, shapes)) or body)

    def _format_shape(self, shape: grounding.GroundingShape) -> str:
        sizes = self._names or {THOUSANDTHS: ""}
        texts = [_format_corners(_corners(shape, size)) for size in sizes]
        if len(texts) == 1:
            return texts[0]
        names = [terminal.escape_control_characters(name) for name in self._names.values()]
        return ", ".join(f"{text} in {name}" for text, name in zip(texts, names, strict=True))


def _corners(
    shape: grounding.GroundingShape, size: grounding.Size
) -> tuple[tuple[float, float], ...]:
    numbers = shape.to_pixels(size)
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _format_corners(corners: Sequence[tuple[float, float]]) -> str:
    points = [f"({x:.0f}, {y:.0f})" for x, y in corners]
    return (" to " if len(points) == 2 else " ").join(points)
