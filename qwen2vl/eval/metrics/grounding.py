"""Referring expressions (RefCOCO, RefCOCO+, RefCOCOg): box parsers, IoU, accuracy at IoU 0.5.

Qwen2-VL writes boxes as "(x1,y1),(x2,y2)" in thousandths of the original image. lmms-eval does not
read that; VLMEvalKit takes the first four numbers of the text, those of words included, and derives
their unit from their size. `strict` reads that form alone, which is how a score of this model is to
be measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwen2vl.eval.metrics.scores import ItemScore, Style

__all__ = ["contains_center", "iou", "parse_box", "referring_accuracy"]

Box = tuple[float, float, float, float]

BRACKETS = re.compile(r"\[\s*" + r",\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*\]")
FLOAT = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?"
SPACED_BRACKETS = re.compile(r"\[\s*" + r"(?:\s*,\s*|\s+)".join([f"({FLOAT})"] * 4) + r"\s*\]")
NATIVE = re.compile(r"\((\d{1,3}),\s*(\d{1,3})\)\s*,\s*\((\d{1,3}),\s*(\d{1,3})\)", re.ASCII)


def parse_box(text: str, size: tuple[int, int], *, style: Style) -> Box | None:
    """Parse the box of an answer; return (x1, y1, x2, y2) in pixels of the original image.

    Args:
        text: the model's answer.
        size: (height, width) of the original image.
        style: `lmms`: the first "[x1, y1, x2, y2]", taken as shares of the image. `vlmevalkit`: the
            first four numbers in brackets, or else of the text; shares where none is above 1.5,
            thousandths where none is above 1000, else pixels; clipped to the image, corners in
            order. `strict`: the only "(x1,y1),(x2,y2)" of the text, integers below 1000, top left
            before bottom right; its special tokens may have been dropped.

    Returns:
        The box, or None where the text has none of that form.

    (lmms-eval: refcoco.utils_rec.parse_float_sequence_within; VLMEvalKit: refcoco.RefCOCODataset.)
    """
    if style == "vlmevalkit":
        return _parse_any_unit(text, size)
    shares = _parse_shares(text, style)
    height, width = size
    return None if shares is None else _scaled(shares, width, height)


def _parse_shares(text: str, style: Style) -> Box | None:
    if style == "lmms":
        match = BRACKETS.search(text)
        return _box(match.groups()) if match else None
    boxes = NATIVE.findall(text)
    if len(boxes) != 1:
        return None
    x1, y1, x2, y2 = (number / 1000 for number in _box(boxes[0]))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _parse_any_unit(text: str, size: tuple[int, int]) -> Box | None:
    height, width = size
    match = SPACED_BRACKETS.search(text)
    numbers = match.groups() if match else re.findall(FLOAT, text)[:4]
    if len(numbers) < 4 or width <= 0 or height <= 0:
        return None
    box = _box(numbers)
    largest = max(map(abs, box))
    if largest <= 1.5:
        box = _scaled(box, width, height)
    elif largest <= 1000:
        x1, y1, x2, y2 = (value / 1000 for value in box)
        box = _scaled((x1, y1, x2, y2), width, height)
    xs = sorted(min(max(x, 0.0), width) for x in box[::2])
    ys = sorted(min(max(y, 0.0), height) for y in box[1::2])
    return xs[0], ys[0], xs[1], ys[1]


def _box(numbers: Sequence[str]) -> Box:
    x1, y1, x2, y2 = map(float, numbers)
    return x1, y1, x2, y2


def _scaled(box: Sequence[float], x: float, y: float) -> Box:
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union (IoU) of two boxes (x1, y1, x2, y2).

    Invariant to scaling an axis of both boxes, so that pixels, thousandths and normalized
    coordinates give the same value. The IoU of two boxes without area is 0.
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    union = _area(a) + _area(b) - intersection
    return intersection / union if union > 0 else 0.0


def contains_center(box: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether the center of `other` lies in `box`, borders included."""
    x, y = (other[0] + other[2]) / 2, (other[1] + other[3]) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def referring_accuracy(
    prediction: str,
    truth: Sequence[float],
    size: tuple[int, int],
    *,
    style: Style,
    threshold: float = 0.5,
) -> ItemScore:
    """Score the box of one referring expression: 1 where its IoU reaches the threshold.

    Args:
        prediction: the model's answer.
        truth: (x1, y1, x2, y2) in pixels of the original image.
        size: (height, width) of the original image.
        style: whose parser; see `parse_box`.
        threshold: 0.5 in the paper's table.
    """
    box = parse_box(prediction, size, style=style)
    if box is None:
        return ItemScore(value=0.0, is_parsed=False)
    height, width = size
    if style == "lmms":  # compares shares, which are rounded in another way
        box = _parse_shares(prediction, style) or box
        truth = truth[0] / width, truth[1] / height, truth[2] / width, truth[3] / height
    return ItemScore(value=float(iou(box, truth) >= threshold))


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
