"""Bounding boxes drawn on images and on the frames of videos, with labels beside the objects.

A label is placed outside its own box, inside the image, and clear of the other boxes and labels
where there is space: above, below or beside the box, else where it covers least. Line width and
font follow from the size of the image; a small image is enlarged by a whole factor, since no label
would be readable on it. A video is drawn as a contact sheet of its sampled frames.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from qwen2vl.cli import boxes, terminal
from qwen2vl.errors import InputError

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    from qwen2vl.cli.boxes import PixelShape, SizedItem
    from qwen2vl.cli.media_arguments import MediaFile
    from qwen2vl.config import VisionConfig
    from qwen2vl.processor.inputs import Item
    from qwen2vl.processor.processor import Processor

__all__ = ["annotated_image", "check_output", "contact_sheet", "draw_shapes", "save_annotated"]

COLORS = ("#c8102e", "#1f7a33", "#2447b5", "#b34700", "#7a1f99", "#00696b")

MIN_SIDE = 448  # pixels; an image whose longer side is below half of it is enlarged to about this
MIN_FONT_SIZE = 13  # pixels; smaller text of Pillow's font is hard to read
FONT_SHARE = 1 / 45  # of the image's longer side
LINE_SHARE = 1 / 300  # the same
MAX_ANNOTATED_FRAMES = 16
MAX_COLUMNS = 8
CAPTION = 18  # pixels below each frame for its timestamp

# Costs of a place for a label: the hidden share of each box and label, and the distance from the
# label's own box as a share of the image's diagonal.
OWN_BOX_WEIGHT = 3.0
LABEL_WEIGHT = 20.0  # an earlier label would become unreadable
DISTANCE_WEIGHT = 2.0


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def hidden_share(self, other: _Rectangle) -> float:
        """Return the share of this rectangle that `other` covers."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        area = (self.right - self.left) * (self.bottom - self.top)
        return max(0.0, width) * max(0.0, height) / max(1.0, area)

    def distance(self, other: _Rectangle) -> float:
        """Return the distance in pixels; 0 if the rectangles touch or overlap."""
        x = max(self.left - other.right, other.left - self.right, 0.0)
        y = max(self.top - other.bottom, other.top - self.bottom, 0.0)
        return math.hypot(x, y)


def check_output(output: str, num_items: int) -> None:
    """Check the value of -o before a long computation.

    Raises:
        UsageError, InputError: there is nothing to draw on, or the name is not that of an image.
    """
    if num_items == 0:
        raise InputError(
            f"-o {output}: draws boxes on the images and videos of the prompt, got none; give one"
        )
    if _is_folder(output):
        terminal.check_parent_folder(output)  # the folder itself is made when files are written
    else:
        terminal.check_image_path(output)


def save_annotated(
    text: str,
    files: Sequence[MediaFile],
    items: Sequence[SizedItem],
    output: str,
    processor: Processor | None = None,
) -> None:
    """Draw the shapes of a completion on each of the files, and write them to `output`.

    One file is written under the given name, several with -1, -2, ... before its extension, and
    into a folder, which is made, as PNG under their own names. Without shapes nothing is written.

    Args:
        text: the completion, with its grounding tokens.
        files: the images and videos that the shapes may refer to.
        items: the same, preprocessed; without a processor, their names and sizes.
        output: the value of -o, an image file or a folder.
        processor: of the model, for the orientation in which it sees an image, and the frames
            of a video; None: a server has both, so that nothing is drawn on a video.

    Raises:
        InputError: a file cannot be written.
    """
    if not items or not boxes.parse_shapes(text, items):
        terminal.note(f"the answer has no boxes: {output} was not written")
        return
    if len(items) > 1:
        terminal.note(
            f"the answer does not say in which of {len(items)} images or videos its boxes are: "
            "they are drawn on each"
        )
    if _is_folder(output):
        _make_folder(output)
    for file, item, path in zip(files, items, _output_paths(output, items), strict=True):
        if file.kind == "video" and processor is None:
            terminal.note(f"{item.name}: the server chose its frames; nothing is drawn on them")
            continue
        if file.kind == "video" and processor is not None:
            image = contact_sheet(cast("Item", item), processor.config.vision, text)
        else:
            image = _annotated_file(file, item, text, processor)
        terminal.save_image(image, path)
        terminal.note(f"wrote {path}")


def contact_sheet(item: Item, vision: VisionConfig, text: str = "") -> Image.Image:
    """Return the frames of the model input in a grid with timestamps; an image as it is.

    With the `text` of a completion its shapes are drawn on each frame; of a long video on 16
    frames, evenly spaced.
    """
    from PIL import Image, ImageDraw

    from qwen2vl.processor.image import unpatchify

    step = vision.temporal_patch_size

    def frame(number: int) -> Image.Image:
        patches_NP = item.load_pair(number // step)
        frames_FCHW = unpatchify(patches_NP, item.grid._replace(t=1), vision)
        return Image.fromarray(frames_FCHW[number % step].permute(1, 2, 0).numpy())

    if item.kind == "image":
        return frame(0)
    shapes = boxes.shapes_in_size(text, item.resized_size)
    chosen = _chosen_frames(item, step * item.grid.t, annotated=bool(shapes))
    frames = [annotated_image(frame(n), shapes) for n in chosen]
    width, height = frames[0].size
    columns = min(MAX_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    image = Image.new("RGB", (columns * width, rows * (height + CAPTION)), "white")
    drawing = ImageDraw.Draw(image)
    for place, number in enumerate(chosen):
        corner = (place % columns * width, place // columns * (height + CAPTION))
        image.paste(frames[place], corner)
        label = _frame_label(item, number)
        drawing.text((corner[0] + 2, corner[1] + height + 2), label, fill="black")
    return image


def annotated_image(image: Image.Image, shapes: Sequence[PixelShape]) -> Image.Image:
    """Return a copy of an image with shapes drawn, enlarged by a whole factor if it is small."""
    factor = -(-MIN_SIDE // max(image.size)) if shapes and max(image.size) * 2 <= MIN_SIDE else 1
    enlarged = image.resize((image.width * factor, image.height * factor))
    scaled = [
        replace(shape, corners=tuple((x * factor, y * factor) for x, y in shape.corners))
        for shape in shapes
    ]
    draw_shapes(enlarged, scaled)
    return enlarged


def draw_shapes(image: Image.Image, shapes: Sequence[PixelShape]) -> None:
    """Draw shapes on an image, in place, then their phrases beside them."""
    from PIL import ImageDraw, ImageFont

    pen = ImageDraw.Draw(image)
    line_width = max(2, round(max(image.size) * LINE_SHARE))
    size = max(MIN_FONT_SIZE, round(max(image.size) * FONT_SHARE))
    font = ImageFont.load_default(size)
    outlines = [_bounds(shape, line_width) for shape in shapes]
    for number, shape in enumerate(shapes):
        _draw_shape(pen, shape, COLORS[number % len(COLORS)], line_width)
    labels: list[_Rectangle] = []
    for number, shape in enumerate(shapes):
        text = _fit_text(shape.phrase, number, font, image.width)
        label = _place_label(
            _text_size(text, font), number, outlines, labels, image.size, line_width
        )
        labels.append(label)
        _draw_label(pen, text, label, COLORS[number % len(COLORS)], font)


def _annotated_file(
    file: MediaFile, item: SizedItem, text: str, processor: Processor | None
) -> Image.Image:
    from qwen2vl.processor.media.rgb import open_image
    from qwen2vl.processor.media.source import DEFAULT_LIMITS

    limits, apply_exif_orientation = DEFAULT_LIMITS, True
    if processor is not None:
        from qwen2vl.processor.video import find_video_preset

        # Boxes refer to the orientation in which the preset passes the image to the model.
        limits = processor.limits
        apply_exif_orientation = find_video_preset(processor.video_preset).apply_exif_orientation
    opened = open_image(
        file.source, limits, item.name, apply_exif_orientation=apply_exif_orientation
    )
    return annotated_image(opened.image, boxes.parse_shapes(text, [item]))


def _is_folder(output: str) -> bool:
    return os.path.isdir(output) or output.endswith(os.sep)


def _make_folder(output: str) -> None:
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as error:
        raise InputError(f"-o {output}: cannot be made a folder: {error.strerror}") from error


def _output_paths(output: str, items: Sequence[SizedItem]) -> list[str]:
    if not _is_folder(output):
        path = Path(output)
        many = len(items) > 1
        return [
            str(path.with_stem(f"{path.stem}-{number}")) if many else output
            for number in range(1, len(items) + 1)
        ]
    stems = [Path(item.name).stem for item in items]
    unique = [
        stem if stems.count(stem) == 1 else f"{stem}-{number}"
        for number, stem in enumerate(stems, 1)
    ]
    return [os.path.join(output, f"{stem}.png") for stem in unique]


def _chosen_frames(item: Item, num_frames: int, *, annotated: bool) -> list[int]:
    """Return the frames of a contact sheet: all, or for boxes at most 16 that are evenly spaced."""
    if not annotated:
        return list(range(num_frames))
    num_sampled = min(num_frames, len(item.frame_timestamps) or num_frames)  # without padding
    count = min(num_sampled, MAX_ANNOTATED_FRAMES)
    return [round(i * (num_sampled - 1) / max(1, count - 1)) for i in range(count)]


def _frame_label(item: Item, number: int) -> str:
    """Return the timestamp of a frame; frames beyond the last one are padding by repetition."""
    times = item.frame_timestamps
    return f"{times[number]:.2f} s" if number < len(times) else "repeated"


def _draw_shape(pen: ImageDraw.ImageDraw, shape: PixelShape, color: str, width: int) -> None:
    (left, top), *rest = shape.corners
    if not rest:
        pen.circle((left, top), 3 * width, outline=color, width=width)
    elif len(rest) == 1:
        pen.rectangle((left, top, *rest[0]), outline=color, width=width)
    else:
        pen.line((*shape.corners, shape.corners[0]), fill=color, width=width)


def _draw_label(
    pen: ImageDraw.ImageDraw,
    text: str,
    label: _Rectangle,
    color: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    pen.rectangle((label.left, label.top, label.right - 1, label.bottom - 1), fill=color)
    middle = ((label.left + label.right) / 2, (label.top + label.bottom) / 2)
    pen.text(middle, text, fill="white", font=font, anchor="mm")


def _bounds(shape: PixelShape, line_width: int) -> _Rectangle:
    """Return the rectangle that a drawn shape occupies."""
    xs, ys = zip(*shape.corners, strict=True)
    margin = 3 * line_width if len(shape.corners) == 1 else line_width // 2
    return _Rectangle(min(xs) - margin, min(ys) - margin, max(xs) + margin, max(ys) + margin)


def _fit_text(
    phrase: str, number: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    """Return a phrase cut to the width of the image; its number, if the font has no such letters.

    Pillow's own font has the letters of ASCII only.
    """
    is_drawable = phrase.isascii() and phrase.isprintable() and phrase.strip()
    text = " ".join(phrase.split()) if is_drawable else f"box {number + 1}"
    if _text_size(text, font)[0] <= width:
        return text
    while len(text) > 1 and _text_size(f"{text}...", font)[0] > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _text_size(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> tuple[float, float]:
    """Return width and height of a label; the height is that of a line, whatever its letters."""
    left, _, right, _ = font.getbbox(text, anchor="ls")
    _, top, _, bottom = font.getbbox("Agy", anchor="ls")
    padding = (bottom - top) / 4
    return right - left + 2 * padding, bottom - top + padding


def _place_label(
    size: tuple[float, float],
    number: int,
    outlines: Sequence[_Rectangle],
    labels: Sequence[_Rectangle],
    image_size: tuple[int, int],
    gap: int,
) -> _Rectangle:
    """Return the place of the label of shape `number` that covers least; the first of equals."""

    own = outlines[number]

    def cost(label: _Rectangle) -> float:
        shapes = sum(outline.hidden_share(label) for outline in outlines)
        hidden = shapes + (OWN_BOX_WEIGHT - 1) * own.hidden_share(label)
        hidden += LABEL_WEIGHT * sum(earlier.hidden_share(label) for earlier in labels)
        distance = max(0.0, own.distance(label) - 2 * gap) / math.hypot(*image_size)
        return hidden + DISTANCE_WEIGHT * distance

    return min(_label_places(size, own, image_size, gap), key=cost)


def _label_places(
    size: tuple[float, float], box: _Rectangle, image_size: tuple[int, int], gap: int
) -> Iterator[_Rectangle]:
    """Yield places inside the image, the preferred ones first: beside the box, then within it."""
    width, height = size
    centered_x, centered_y = (box.left + box.right - width) / 2, (box.top + box.bottom - height) / 2
    lefts = (box.left, box.right - width, centered_x)
    tops = (box.top, box.bottom - height, centered_y)
    places = [(x, box.top - height - gap) for x in lefts]  # above
    places += [(x, box.bottom + gap) for x in lefts]  # below
    places += [(box.right + gap, y) for y in tops]  # to the right
    places += [(box.left - width - gap, y) for y in tops]  # to the left
    # Corners of the image, for boxes that leave no space beside them; then those of the box.
    rows, columns = (0.0, image_size[1] - height), (0.0, image_size[0] - width)
    places += [(x, y) for y in rows for x in columns]
    places += [(x, y) for y in tops[:2] for x in lefts[:2]]
    for x, y in places:
        left = max(0.0, min(x, image_size[0] - width))
        top = max(0.0, min(y, image_size[1] - height))
        yield _Rectangle(left, top, left + width, top + height)
