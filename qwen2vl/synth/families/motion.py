"""Task family `motion`: direction of motion, order of appearance, and which shape moved first.

Every video is as likely as its reverse, which has the opposite answer; so the answer cannot be
derived from a single frame or from a shuffled set of frames (frames still show the axis: that the
answer is left or right, for example).
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from qwen2vl.synth.colors import colors_on, sample_color, sample_ground
from qwen2vl.synth.scenes import MIN_SIDE
from qwen2vl.synth.shape_masks import SHAPE_KINDS
from qwen2vl.synth.spec import RGB, Box, FamilySample, Mixture, Question, Scene, Shape
from qwen2vl.synth.wordings import sample_question_text

__all__ = ["sample"]

# By axis: toward smaller, toward larger coordinates.
_DIRECTIONS = (("left", "right"), ("up", "down"))
_MIN_TRAVEL = 0.4  # fraction of the free distance


def sample(rng: Random, mixture: Mixture) -> FamilySample:
    """Sample a video and questions about what happens in it."""
    kind = rng.random()
    if kind < 0.55:
        return _direction(rng, mixture)
    return _appearance(rng, mixture) if kind < 0.8 else _sequential_motion(rng, mixture)


def _direction(rng: Random, mixture: Mixture) -> FamilySample:
    """Sample one shape that moves at constant speed, and ask for the direction."""
    empty = _empty_scene(rng, mixture)
    short = min(empty.width, empty.height)
    side = rng.randint(MIN_SIDE, max(MIN_SIDE, short * 45 // 100))
    axis, back = rng.randrange(2), rng.random() < 0.5
    num_frames = rng.choice(mixture.num_frames)
    area = (0, 0, empty.width, empty.height)
    boxes = _path(rng, area, side, axis, [t / (num_frames - 1) for t in range(num_frames)])
    boxes = boxes[::-1] if back else boxes
    shape = _sample_shape(rng, colors_on(empty.ground), boxes[0])
    frames = tuple(replace(empty, shapes=(replace(shape, box=box),)) for box in boxes)
    answer = _DIRECTIONS[axis][0 if back else 1]
    questions = [
        Question(
            task="direction",
            text=sample_question_text(rng, "direction", mixture.split),
            answer=answer,
            choices=4,
        )
    ]
    if mixture.max_questions > 1:  # a single question has to be about motion
        extra = ("color", shape.color) if rng.random() < 0.5 else ("name_shape", shape.kind)
        questions.append(
            Question(
                task=extra[0],
                text=sample_question_text(rng, extra[0], mixture.split),
                answer=extra[1],
            )
        )
        rng.shuffle(questions)
    return FamilySample(tuple(questions), frames, clip=True)


def _appearance(rng: Random, mixture: Mixture) -> FamilySample:
    """Sample two shapes that replace each other, each in half of the frames."""
    empty = _empty_scene(rng, mixture)
    num_frames = rng.choice(mixture.num_frames)
    short = min(empty.width, empty.height)
    shapes: list[Shape] = []
    for color in rng.sample(colors_on(empty.ground), 2):
        side = rng.randint(MIN_SIDE, max(MIN_SIDE, short * 7 // 10))
        x, y = rng.randint(0, empty.width - side), rng.randint(0, empty.height - side)
        shapes.append(_sample_shape(rng, [color], (x, y, x + side, y + side)))
    frames = tuple(
        replace(empty, shapes=(shapes[0 if 2 * t < num_frames else 1],)) for t in range(num_frames)
    )
    questions = [
        Question(
            task=task,
            text=sample_question_text(rng, task, mixture.split),
            answer=shape.color,
            choices=2,
        )
        for task, shape in zip(("appeared_first", "appeared_last"), shapes, strict=True)
    ]
    rng.shuffle(questions)
    return FamilySample(tuple(questions[: mixture.max_questions]), frames, clip=True)


def _sequential_motion(rng: Random, mixture: Mixture) -> FamilySample:
    """Sample two shapes that move one after the other, each in its own half of the image."""
    empty = _empty_scene(rng, mixture)
    num_frames = rng.choice(mixture.num_frames)
    # Steps of each; with an odd number of steps nothing moves in the middle one.
    moves = (num_frames - 1) // 2
    early = [min(t / moves, 1.0) for t in range(num_frames)]
    late = [1 - share for share in reversed(early)]
    colors = rng.sample(colors_on(empty.ground), 2)
    halves = rng.sample(_halves(empty.width, empty.height), 2)
    tracks: list[list[Shape]] = []
    for color, area, shares in zip(colors, halves, (early, late), strict=True):
        wide, high = area[2] - area[0], area[3] - area[1]
        side = rng.randint(MIN_SIDE, max(MIN_SIDE, min(wide, high) * 7 // 10))
        axis = 0 if wide > high else 1
        boxes = _path(rng, area, side, axis, shares if rng.random() < 0.5 else _mirrored(shares))
        shape = _sample_shape(rng, [color], boxes[0])
        tracks.append([replace(shape, box=box) for box in boxes])
    frames = tuple(replace(empty, shapes=pair) for pair in zip(*tracks, strict=True))
    text = sample_question_text(rng, "moved_first", mixture.split)
    question = Question(task="moved_first", text=text, answer=tracks[0][0].phrase, choices=2)
    return FamilySample((question,), frames, clip=True)


def _empty_scene(rng: Random, mixture: Mixture) -> Scene:
    low, high = mixture.clip_canvas
    width, height = rng.randint(low, high), rng.randint(low, high)
    return Scene(width=width, height=height, ground=sample_ground(rng), shapes=())


def _sample_shape(rng: Random, colors: list[str], box: Box) -> Shape:
    color = rng.choice(colors)
    rgb: RGB = sample_color(rng, color)
    return Shape(kind=rng.choice(SHAPE_KINDS), color=color, rgb=rgb, box=box)


def _halves(width: int, height: int) -> list[Box]:
    """Split a canvas along its longer side into two lanes."""
    if width >= height:
        return [(0, 0, width, height // 2), (0, height // 2, width, height)]
    return [(0, 0, width // 2, height), (width // 2, 0, width, height)]


def _path(rng: Random, area: Box, side: int, axis: int, shares: list[float]) -> list[Box]:
    """Place a square along one axis; `shares` is the fraction of its path in each frame."""
    slack = [area[2] - area[0] - side, area[3] - area[1] - side]
    travel = rng.randint(round(_MIN_TRAVEL * slack[axis]), slack[axis])
    start = [area[i] + rng.randint(0, slack[i] - (travel if i == axis else 0)) for i in (0, 1)]
    boxes: list[Box] = []
    for share in shares:
        x = start[0] + (round(share * travel) if axis == 0 else 0)
        y = start[1] + (round(share * travel) if axis == 1 else 0)
        boxes.append((x, y, x + side, y + side))
    return boxes


def _mirrored(shares: list[float]) -> list[float]:
    """Return the same path in the opposite direction."""
    return [1 - share for share in shares]
