"""Data types of the synthetic data: `Mixture` (configuration), `Spec` (one example as numbers).

A `Spec` describes one example completely (what is drawn, the questions and their answers) without
pixels; it converts to JSON and back, so a frozen test suite is a file of specs. Its fields are the
keys of that file, hence `pictures` (images, or the frames of a video) and `clip` (a video), which
cannot be renamed. Coordinates are pixels, x to the right, y down; boxes are (x1, y1, x2, y2), the
last two exclusive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_args

from qwen2vl.errors import ConfigError
from qwen2vl.synth.compositing.layers import Composite, lists_to_tuples, without_defaults

__all__ = [
    "FAMILY_NAMES",
    "MAX_SHAPES",
    "RGB",
    "Box",
    "FamilySample",
    "Line",
    "Mixture",
    "Picture",
    "Question",
    "Scene",
    "Shape",
    "Spec",
    "SyntheticExample",
    "picture_from_json",
    "picture_to_json",
]

RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]

_DEFAULT = ("text", "shapes", "grounding", "two_pictures", "motion", "text_only")
FAMILY_NAMES = (
    *_DEFAULT,
    *("objects", "named", "lines", "documents", "refusals", "clips"),
)
MAX_SHAPES = 5  # in one scene
MIN_NAMES = 40  # in pictures of up to 16, with others that share no word with them

# Prefixes of the tasks whose answers are texts of the picture or of the question.
_READING_TASKS = ("read", "repeat", "reverse", "spell", "text")

_Split = Literal["train", "held_out", "all"]
_Fonts = Literal["mono2", "all", "validation", "judge", "bundled"]
_Alphabet = Literal["digits", "letters", "all"]
_Layout = Literal["cells", "line"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Sampling configuration: weights of the task families, and the settings of a curriculum.

    Ranges are (minimum, maximum), both inclusive.

    Raises:
        ConfigError: an unknown family or choice, a negative weight, a range whose ends are swapped.
    """

    # Task family -> its share of the conversations, relative to the others.
    # The default are those that need no dataset.
    weights: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(_DEFAULT, 1.0))
    split: _Split = "train"  # of the wordings; three quarters train, a quarter is held out
    max_questions: int = 1  # about one image (shapes, grounding, two_pictures, motion)
    # text
    text_length: tuple[int, int] = (1, 16)  # characters, spaces included
    alphabet: _Alphabet = "all"  # all: letters, digits and . , ! ? - : ' &
    random_share: float = 0.6  # random strings; the others are made of words
    layout: _Layout = "line"  # cells: each character centered in its own 28 x 28 pixels
    fonts: _Fonts = "all"  # judge and validation are held out; bundled is in the package
    font_size: tuple[int, int] = (12, 40)  # pixels per em
    padding: tuple[int, int] = (1, 12)  # pixels around the ink of a line
    max_width: int = 448  # of a line's canvas; longer text gets a smaller font, then is cut
    large_share: float = 0.0  # lines at one to three times the limits font_size and max_width
    sparse_share: float = 0.0  # lines at a random position on a canvas of 1:4 to 40:1, mostly empty
    page_share: float = 0.0  # images of several lines: many characters for one question
    page_lines: tuple[int, int] = (2, 4)  # lines of a page
    plain_share: float = 0.3  # black on white; the others have colored ink, background and texture
    # shapes, grounding, two_pictures
    num_shapes: tuple[int, int] = (1, 5)  # in one image
    canvas: tuple[int, int] = (56, 224)  # pixels; width and height are sampled independently
    textured_share: float = 0.3  # images with a textured background; the others are plain
    list_share: float = 0.0  # shapes, grounding, two_pictures: one question with several answers
    # objects, named, lines, documents, refusals, clips: composite pictures
    picture_side: tuple[int, int] = (64, 336)  # pixels; square root of the area, log-uniform
    max_aspect: float = 4.0  # of width to height, and of height to width
    degraded_share: float = 0.3  # pictures that are blurred or compressed
    scripts: Mapping[str, float] = field(default_factory=lambda: {"latin": 1.0})  # of lines
    num_names: int = 0  # of icons in named: of so many only, a curriculum; 0: of all
    # motion
    num_frames: tuple[int, ...] = (4, 6, 8)  # one of these
    clip_canvas: tuple[int, int] = (56, 112)  # pixels; as canvas

    def __post_init__(self) -> None:
        _check_mixture(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question with its only correct answer."""

    task: str  # finer than the family, e.g. "count_kind"; scores are reported by task
    text: str
    answer: str
    box: Box | None = None  # if the answer is a box: the same box in pixels
    choices: int = 0  # number of equally likely answers, for the chance level; 0 = undefined

    @property
    def is_reading(self) -> bool:
        """Whether the answer is text that is written in the picture, or in the question."""
        return self.task.startswith(_READING_TASKS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """An image of text: one line, or several below each other."""

    text: str  # lines are separated by a line feed
    font: str  # file name
    size: int  # pixels per em
    width: int
    height: int
    x: int  # pen of the first character
    y: int  # baseline
    ink: RGB
    ground: RGB
    cell: int = 0  # pixels a character; 0: the advance of the font
    tracking: int = 0  # pixels added between characters
    leading: int = 0  # pixels from one baseline to the next
    texture: int = 0  # seed of the background noise; 0: none

    def scaled(self, k: int) -> Line:
        """Return the same picture scaled by the factor `k`."""
        numbers = ("size", "width", "height", "x", "y", "cell", "tracking", "leading")
        return Line(
            **{**_field_values(self), **{name: k * getattr(self, name) for name in numbers}}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One shape of a scene; its pixels fill the box exactly."""

    kind: str
    color: str
    rgb: RGB
    box: Box

    @property
    def phrase(self) -> str:
        """The full phrase of the shape: "red circle"."""
        return f"{self.color} {self.kind}"

    @property
    def center(self) -> tuple[float, float]:
        """Center of the box, (x, y)."""
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def side(self) -> int:
        """Pixels a side of the box, which is square."""
        return self.box[2] - self.box[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """An image of shapes on a background, or one frame of a video."""

    width: int
    height: int
    ground: RGB
    shapes: tuple[Shape, ...]  # painted in this order
    texture: int = 0

    def scaled(self, k: int) -> Scene:
        """Return the same picture scaled by the factor `k`."""
        shapes = tuple(
            Shape(kind=s.kind, color=s.color, rgb=s.rgb, box=_scale_box(s.box, k))
            for s in self.shapes
        )
        return Scene(
            width=k * self.width,
            height=k * self.height,
            ground=self.ground,
            shapes=shapes,
            texture=self.texture,
        )


Picture = Line | Scene | Composite


class FamilySample(NamedTuple):
    """Return type of a task family: the content of a `Spec` without seed and index."""

    questions: tuple[Question, ...]
    pictures: tuple[Picture, ...] = ()
    clip: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One example before its images are drawn."""

    family: str
    seed: int
    index: int
    questions: tuple[Question, ...]
    pictures: tuple[Picture, ...] = ()
    clip: bool = False  # pictures are the frames of one video

    def scaled(self, k: int) -> Spec:
        """Return the same questions about images scaled by the factor `k`."""
        questions = tuple(
            Question(**{**_field_values(q), "box": q.box and _scale_box(q.box, k)})
            for q in self.questions
        )
        pictures = tuple(picture.scaled(k) for picture in self.pictures)
        return Spec(**{**_field_values(self), "questions": questions, "pictures": pictures})

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values; fields that hold their default are omitted."""
        return {
            "family": self.family,
            "seed": self.seed,
            "index": self.index,
            "questions": [without_defaults(q) for q in self.questions],
            "pictures": [picture_to_json(picture) for picture in self.pictures],
            "clip": self.clip,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Spec:
        """Create from the output of `to_json`."""
        known = {**raw}
        known["questions"] = tuple(Question(**lists_to_tuples(q)) for q in raw["questions"])
        known["pictures"] = tuple(picture_from_json(p) for p in raw["pictures"])
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticExample:
    """One rendered example: the conversation to train on, and the ground truth for scoring."""

    messages: list[dict[str, Any]]  # ends with an assistant turn
    truth: tuple[Question, ...]  # one for each assistant turn
    spec: Spec

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The prompt of the first question: its user message."""
        return self.messages[:1]


def picture_to_json(picture: Picture) -> dict[str, Any]:
    """Convert a picture to JSON values; fields that hold their default are omitted."""
    if isinstance(picture, Composite):
        return {"type": "composite", **picture.to_json()}
    return {"type": type(picture).__name__.lower(), **without_defaults(picture)}


def picture_from_json(raw: Mapping[str, Any]) -> Picture:
    """Create a picture from the output of `picture_to_json`."""
    values = lists_to_tuples({k: v for k, v in raw.items() if k != "type"})
    if raw["type"] == "line":
        return Line(**values)
    if raw["type"] == "composite":
        return Composite.from_json(values)
    values["shapes"] = tuple(Shape(**lists_to_tuples(shape)) for shape in values["shapes"])
    return Scene(**values)


def _field_values(item: Any) -> dict[str, Any]:
    return {f.name: getattr(item, f.name) for f in fields(item)}


def _scale_box(box: Box, k: int) -> Box:
    return (k * box[0], k * box[1], k * box[2], k * box[3])


# Field -> lower limit of its range.
_RANGE_MINIMUMS = {
    "text_length": 1,
    "font_size": 8,
    "padding": 0,
    "page_lines": 2,
    "num_shapes": 1,
    "canvas": 56,
    "clip_canvas": 56,
    "picture_side": 28,
}
_MINIMUMS = {"max_questions": 1, "max_width": 28, "max_aspect": 1, "num_names": 0}
_SHARES = (
    "random_share",
    "large_share",
    "sparse_share",
    "page_share",
    "plain_share",
    "textured_share",
    "list_share",
    "degraded_share",
)
_CHOICES = {"split": _Split, "fonts": _Fonts, "alphabet": _Alphabet, "layout": _Layout}


def _check_mixture(mixture: Mixture) -> None:
    _check_weights(mixture.weights)
    for name, kind in _CHOICES.items():
        _require(mixture, name, getattr(mixture, name) in get_args(kind), get_args(kind))
    for name, limit in _RANGE_MINIMUMS.items():
        low, high = getattr(mixture, name)
        _require(mixture, name, limit <= low <= high, f"it must rise and start at {limit} or more")
    for name, limit in _MINIMUMS.items():
        _require(mixture, name, getattr(mixture, name) >= limit, f"it must be at least {limit}")
    for name in _SHARES:
        _require(mixture, name, 0 <= getattr(mixture, name) <= 1, "it must lie between 0 and 1")
    frames = mixture.num_frames
    _require(mixture, "num_frames", bool(frames) and min(frames) >= 3, "3 frames at least")
    _require(mixture, "num_shapes", mixture.num_shapes[1] <= MAX_SHAPES, f"at most {MAX_SHAPES}")
    is_enough = mixture.num_names == 0 or mixture.num_names >= MIN_NAMES
    _require(mixture, "num_names", is_enough, f"0, or {MIN_NAMES} at least")


def _check_weights(weights: Mapping[str, float]) -> None:
    unknown = sorted(set(weights) - set(FAMILY_NAMES))
    if unknown:
        raise ConfigError(
            f"mixture: weights name {', '.join(unknown)}; families are {', '.join(FAMILY_NAMES)}"
        )
    if min(weights.values(), default=0) < 0 or sum(weights.values()) <= 0:
        raise ConfigError(
            f"mixture: weights are {dict(weights)}; none may be negative, and one positive"
        )


def _require(mixture: Mixture, name: str, condition: bool, remedy: str | tuple[str, ...]) -> None:
    if not condition:
        hint = remedy if isinstance(remedy, str) else f"choose {', '.join(remedy)}"
        raise ConfigError(f"mixture: {name} is {getattr(mixture, name)!r}; {hint}")
