"""Objects of clips over time: where they are in every frame, and the frames.

    canvas, tracks = place_tracks(rng, mixture, [Motion(direction="left"), Motion()], num_frames=6)
    frames = build_frames(canvas, tracks)

Objects are shapes, icons and lines of text. They move straight and at constant speed, and the areas
that they cover over time are apart.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from random import Random

from qwen2vl.synth.canvas import degrade, sample_canvas
from qwen2vl.synth.clips.names import ICON_SHARE, ObjectName, sample_names
from qwen2vl.synth.colors import contrast, is_light
from qwen2vl.synth.compositing.layers import Composite, Ground, Icon, ShapeLayer, Text
from qwen2vl.synth.compositing.text import text_extent
from qwen2vl.synth.fonts import files_of
from qwen2vl.synth.objects import (
    RASTER,
    sample_icon,
    sample_shape,
)
from qwen2vl.synth.scenes import overlap
from qwen2vl.synth.spec import RGB, Box, Mixture
from qwen2vl.synth.strings import DIGITS, LETTERS, load_words, random_string

__all__ = [
    "DIRECTIONS",
    "Motion",
    "Track",
    "build_frames",
    "place_tracks",
]

DIRECTIONS = ("left", "right", "up", "down")
_AXES = {"left": 0, "right": 0, "up": 1, "down": 1}
_FORWARD = ("right", "down")

_Layer = ShapeLayer | Icon | Text

_MAX_ASPECT = 3.0  # of width to height, and of height to width
_MIN_SHAPE = 14  # pixels a side
_MIN_ICON = 26  # pixels; details are lost below
_MIN_SHARE = 0.1  # of the shorter side of the canvas
_GAP = 2  # pixels between the areas of objects
_MIN_STEP = 1.5  # pixels that a moving object moves from one frame to the next
_SMALL_RASTER = 64  # pixels at which icons of small boxes are drawn once and cached
_FONT_SIZES = (13, 40)  # pixels per em
_MIN_CONTRAST = 3.5  # of text
_ATTEMPTS = 24
_ATTEMPTS_WITH_ICONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Motion:
    """What an object does over the frames of a clip."""

    direction: str = ""  # of DIRECTIONS; empty: it does not move
    travel: tuple[float, float] = (0.15, 1.0)  # shares of the canvas; if equal, exactly so far
    frames: tuple[int, int] | None = None  # between which it moves; None: the first and the last
    sizes: tuple[float, float] = (1.0, 1.0)  # at the beginning and at the end; the larger one is 1
    kind: str = ""  # "shape" or "text"; empty: a shape or an icon


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """An object over all frames of a clip."""

    what: ObjectName
    called: str  # in questions: its phrase, a shorter form of it, or "object" if there is no other
    layers: tuple[_Layer | None, ...]  # one a frame; None where it is not visible
    boxes: tuple[Box, ...]  # one a frame, of squares that hold the layers

    def visible_in(self, frames: Collection[int]) -> Track:
        """Return the same object, visible in some of its frames only."""
        layers = tuple(layer if i in frames else None for i, layer in enumerate(self.layers))
        return replace(self, layers=layers)

    def center(self, frame: int) -> tuple[float, float]:
        """Center of its box in a frame, (x, y) in pixels."""
        x1, y1, x2, y2 = self.boxes[frame]
        return (x1 + x2) / 2, (y1 + y2) / 2


def place_tracks(
    rng: Random,
    mixture: Mixture,
    motions: Sequence[Motion],
    num_frames: int,
    *,
    largest: float = 0.6,
    apart: bool = True,
) -> tuple[Composite, list[Track]]:
    """Sample the canvas of a clip, and its objects, visible in all frames.

    Args:
        rng: source of the choices.
        mixture: sizes of the canvas, background, degradations, fonts.
        motions: of the objects.
        num_frames: of the clip.
        largest: side of an object as a share of the canvas's shorter side, at most.
        apart: whether the areas of the objects are apart; otherwise they are independent.

    Returns:
        The canvas without layers, and a track for each motion.

    Raises:
        DatasetNotFoundError, ConfigError: icons cannot be drawn (`check_icons`).
        FontError: a font of the mixture is not installed.
    """
    attempt = 0
    while True:
        canvas = sample_canvas(rng, mixture, size=_sample_size(rng, mixture))
        canvas = degrade(rng, canvas, mixture)
        icons = ICON_SHARE if attempt < _ATTEMPTS_WITH_ICONS else 0.0
        names = sample_names(rng, canvas, [motion.kind for motion in motions], icons=icons)
        tracks: list[Track] = []
        for motion, what in zip(motions, names, strict=True):
            taken = [_hull(track.boxes) for track in tracks] if apart else []
            if motion.kind == "text":
                track = _place_text(rng, mixture, canvas, motion, num_frames, taken)
            else:
                track = _place(rng, canvas, motion, what, num_frames, largest, taken)
            if track is None:
                break
            tracks.append(track)
        if len(tracks) == len(motions):
            return canvas, [replace(one, called=_call(rng, one.what, tracks)) for one in tracks]
        attempt += 1
        largest *= 0.95


def build_frames(canvas: Composite, tracks: Sequence[Track]) -> tuple[Composite, ...]:
    """Build the frames of a clip; equal ones are the same object."""
    layers_of = [
        tuple(layer for layer in layers if layer is not None)
        for layers in zip(*(track.layers for track in tracks), strict=True)
    ]
    frames = {layers: replace(canvas, layers=layers) for layers in dict.fromkeys(layers_of)}
    return tuple(frames[layers] for layers in layers_of)


def _sample_size(rng: Random, mixture: Mixture) -> tuple[int, int]:
    low, high = (log(side) for side in mixture.clip_canvas)
    while True:
        width, height = exp(rng.uniform(low, high)), exp(rng.uniform(low, high))
        if max(width, height) <= _MAX_ASPECT * min(width, height):
            return round(width), round(height)


def _call(rng: Random, what: ObjectName, tracks: Sequence[Track]) -> str:
    """Choose what an object is called in questions."""
    if len(tracks) == 1 and what.name != "text" and rng.random() < 0.15:
        return "object"
    how = rng.random()
    if not what.color or how < 0.55:
        return what.phrase
    return what.name if how < 0.85 else f"{what.color} shape"


def _place(
    rng: Random,
    canvas: Composite,
    motion: Motion,
    what: ObjectName,
    num_frames: int,
    largest: float,
    taken: Sequence[Box],
) -> Track | None:
    """Sample the path of an object, and draw it in every frame; None if it finds no place."""
    shorter = min(canvas.width, canvas.height)
    smallest = max(_MIN_SHAPE if what.color else _MIN_ICON, _MIN_SHARE * shorter)
    sides = (smallest / min(motion.sizes), largest * shorter)
    boxes = _sample_boxes(rng, canvas, motion, num_frames, sides, taken)
    if not boxes:
        return None
    cell = max(boxes, key=lambda box: box[2] - box[0])
    layer: ShapeLayer | Icon
    if what.color:
        layer = sample_shape(rng, what.name, what.color, cell).layer
    else:
        layer = sample_icon(rng, what.name, cell, ground=canvas.ground).layer
        assert isinstance(layer, Icon), "sample_icon returns icons"
        # Small rasters are read several times as fast, once a frame.
        raster = _SMALL_RASTER if cell[2] - cell[0] <= _SMALL_RASTER else RASTER
        layer = replace(layer, raster=raster)
    placed = {box: _move(layer, cell, box) for box in dict.fromkeys(boxes)}
    layers = tuple(placed[box] for box in boxes)
    return Track(what=what, called=what.phrase, layers=layers, boxes=tuple(boxes))


def _place_text(
    rng: Random,
    mixture: Mixture,
    canvas: Composite,
    motion: Motion,
    num_frames: int,
    taken: Sequence[Box],
) -> Track | None:
    """Sample a text and its path; None if it finds no place."""
    text, (width, height) = _sample_text(rng, mixture, canvas)
    boxes = _sample_boxes(rng, canvas, motion, num_frames, (width, width), taken, height)
    layers = tuple(replace(text, x=text.x + box[0], y=text.y + box[1]) for box in boxes)
    what = ObjectName("text")
    return Track(what=what, called="text", layers=layers, boxes=tuple(boxes)) if boxes else None


def _sample_boxes(
    rng: Random,
    canvas: Composite,
    motion: Motion,
    num_frames: int,
    sides: tuple[float, float],
    taken: Sequence[Box],
    height: int = 0,
) -> list[Box]:
    """Sample the boxes of an object that moves, apart from others; empty if there is no place.

    Args:
        rng: source of the choices.
        canvas: that it does not leave.
        motion: of the object.
        num_frames: number of boxes.
        sides: minimum and maximum of its side, pixels.
        taken: boxes of the others.
        height: pixels; 0: its boxes are squares.
    """
    size = (canvas.width, canvas.height)
    axis = _AXES.get(motion.direction, 0)
    shortest, longest = 0.0, 0.0
    if motion.direction:
        shortest, longest = (share * size[axis] for share in motion.travel)
        if shortest < longest:
            shortest = max(shortest, _MIN_STEP * (num_frames - 1))
    for attempt in range(_ATTEMPTS):
        side = round(rng.uniform(sides[0], max(sides[0], sides[1] * (1 - attempt / _ATTEMPTS))))
        extent = (side, height or side)
        free = [size[0] - extent[0], size[1] - extent[1]]
        if min(free) < 0 or shortest > free[axis]:
            continue
        travel = round(rng.uniform(shortest, max(shortest, min(longest, free[axis]))))
        start = [rng.randint(0, free[i] - (travel if i == axis else 0)) for i in (0, 1)]
        end = [start[i] + extent[i] + (travel if i == axis else 0) for i in (0, 1)]
        hull = (start[0] - _GAP, start[1] - _GAP, end[0] + _GAP, end[1] + _GAP)
        if all(overlap(hull, box) == 0 for box in taken):
            return _follow(motion, start, extent, axis, travel, num_frames)
    return []


def _hull(boxes: Sequence[Box]) -> Box:
    """Return the area that an object covers over time."""
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def _follow(
    motion: Motion,
    start: Sequence[int],
    extent: tuple[int, int],
    axis: int,
    travel: int,
    num_frames: int,
) -> list[Box]:
    """Compute the box of every frame."""
    begin, end = motion.frames or (0, num_frames - 1)
    boxes: list[Box] = []
    for frame in range(num_frames):
        share = min(1.0, max(0.0, (frame - begin) / (end - begin)))
        size = motion.sizes[0] + (motion.sizes[1] - motion.sizes[0]) * share
        moved = round(travel * (share if motion.direction in _FORWARD else 1 - share))
        wide, high = (max(1, round(side * size)) for side in extent)
        x = start[0] + (moved if axis == 0 else 0) + (extent[0] - wide) // 2
        y = start[1] + (moved if axis == 1 else 0) + (extent[1] - high) // 2
        boxes.append((x, y, x + wide, y + high))
    return boxes


def _move(layer: ShapeLayer | Icon, cell: Box, box: Box) -> ShapeLayer | Icon:
    """Move a layer that was drawn for `cell` to `box`, and scale it."""
    scale = (box[2] - box[0]) / (cell[2] - cell[0])
    x, y = (box[i] + round(scale * (layer.box[i] - cell[i])) for i in (0, 1))
    wide, high = (max(1, round(scale * (layer.box[i + 2] - layer.box[i]))) for i in (0, 1))
    return replace(layer, box=(x, y, x + wide, y + high))


def _sample_text(rng: Random, mixture: Mixture, canvas: Composite) -> tuple[Text, tuple[int, int]]:
    """Sample a line of text at the origin, with width and height of its ink."""
    if rng.random() < 0.4:
        text = rng.choice(load_words())
        text = rng.choice((text, text.capitalize(), text.upper()))
    else:
        alphabet = rng.choice((LETTERS + DIGITS, LETTERS + DIGITS, DIGITS))
        text = random_string(rng, rng.randint(2, 6), alphabet, spaces=False, excluded="IlO")
    font = rng.choice(rng.choice(files_of(mixture.fonts)))
    low, high = _FONT_SIZES
    size = round(exp(rng.uniform(log(low), log(high))))
    while True:
        left, top, right, bottom = text_extent(text, font, size)
        width, height = right - left, bottom - top
        if size <= low or (width <= canvas.width - 2 and height <= canvas.height // 2):
            break
        size = max(low, size * 9 // 10)
    rgb = _sample_ink(rng, canvas.ground)
    return Text(text=text, font=font, size=size, x=-left, y=-top, rgb=rgb), (width, height)


def _sample_ink(rng: Random, ground: Ground) -> RGB:
    under = (ground.rgb,) if ground.kind == "plain" else (ground.rgb, ground.rgb2)
    if rng.random() < 0.4:
        return (0, 0, 0) if is_light(ground.rgb) else (255, 255, 255)
    while True:
        rgb = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        if all(contrast(rgb, one) >= _MIN_CONTRAST for one in under):
            return rgb
