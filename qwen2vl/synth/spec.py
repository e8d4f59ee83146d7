"""What the rooms of the world hand to each other: pictures as plain numbers, with their truth.

A Spec says everything about one example (what is drawn, what is asked, what is true) and nothing
about pixels; it survives JSON, so a frozen test suite is a file of specs. Coordinates are pixels,
x to the right, y down; boxes are (x1, y1, x2, y2), the last two exclusive. It must not know how
anything is drawn or sampled. Next room: world.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_args

from qwen2vl.errors import ConfigError

__all__ = [
    "FAMILY_NAMES",
    "MAX_SHAPES",
    "RGB",
    "Box",
    "Draft",
    "Example",
    "Line",
    "Mixture",
    "Picture",
    "Question",
    "Scene",
    "Shape",
    "Spec",
]

RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]

FAMILY_NAMES = ("text", "shapes", "grounding", "two_pictures", "motion", "text_only")
MAX_SHAPES = 5  # in one scene

_Split = Literal["train", "held_out", "all"]
_Fonts = Literal["mono2", "all", "validation", "judge"]
_Alphabet = Literal["digits", "letters", "all"]
_Layout = Literal["cells", "line"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What to sample: weights of the families, and the knobs that a curriculum turns.

    Ranges are (least, most), both included.

    Raises:
        ConfigError: an unknown family or choice, a negative weight, a range that runs backwards.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(FAMILY_NAMES, 1.0))
    split: _Split = "train"  # of the wordings; three quarters train, a quarter is held out
    questions: int = (
        1  # at most so many about one picture (shapes, grounding, two_pictures, motion)
    )
    # text
    text_length: tuple[int, int] = (1, 16)  # characters, spaces included
    alphabet: _Alphabet = "all"  # all: letters, digits and . , ! ? - : ' &
    random_share: float = 0.6  # strings without meaning; the rest is made of words
    layout: _Layout = "line"  # cells: each character centerd in its own 28 x 28 pixels
    fonts: _Fonts = "all"
    font_size: tuple[int, int] = (12, 40)  # pixels per em
    padding: tuple[int, int] = (1, 12)  # pixels around the ink of a line
    max_width: int = 448  # of a line's canvas; a smaller size is taken, then letters are dropped
    large_share: float = 0.0  # lines one to three times as large as font_size and max_width allow
    sparse_share: float = 0.0  # lines somewhere on a canvas of 1:4 to 40:1, mostly empty
    page_share: float = 0.0  # pictures of several lines: many letters for one question
    page_lines: tuple[int, int] = (2, 4)
    plain_share: float = 0.3  # black on white; the rest has colored ink, grounds and texture
    # shapes, grounding, two_pictures
    num_shapes: tuple[int, int] = (1, 5)
    canvas: tuple[int, int] = (56, 224)  # pixels a side, each side on its own
    textured_share: float = 0.3
    list_share: float = 0.0  # shapes, grounding: several answers at once
    # motion
    num_frames: tuple[int, ...] = (4, 6, 8)  # one of these
    clip_canvas: tuple[int, int] = (56, 112)

    def __post_init__(self) -> None:
        _check_mixture(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question with its only right answer."""

    task: str  # finer than the family: "count_kind"; scores are listed by it
    text: str
    answer: str
    box: Box | None = None  # when the answer is a box: the same in pixels
    choices: int = 0  # equally likely answers, for chance level; 0 where there is no such number


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A picture of text: one line, or several under each other."""

    text: str  # lines are parted by a line feed
    font: str  # file name
    size: int  # pixels per em
    width: int
    height: int
    x: int  # pen of the first character
    y: int  # baseline
    ink: RGB
    ground: RGB
    cell: int = 0  # pixels a character; 0: as wide as the font says
    tracking: int = 0  # pixels added between characters
    leading: int = 0  # pixels from one baseline to the next
    texture: int = 0  # seed of the ground's grain; 0: plain

    def scaled(self, k: int) -> Line:
        """Draw the same at `k` times the size."""
        numbers = ("size", "width", "height", "x", "y", "cell", "tracking", "leading")
        return Line(**{**_shallow(self), **{name: k * getattr(self, name) for name in numbers}})


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One shape of a scene; the box is exactly what its pixels fill."""

    kind: str
    color: str
    rgb: RGB
    box: Box

    @property
    def phrase(self) -> str:
        """What people call it: "red circle"."""
        return f"{self.color} {self.kind}"

    @property
    def center(self) -> tuple[float, float]:
        """Middle of the box, (x, y)."""
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def side(self) -> int:
        """Pixels a side of the box, which is square."""
        return self.box[2] - self.box[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A picture of shapes on a ground, or one frame of a clip."""

    width: int
    height: int
    ground: RGB
    shapes: tuple[Shape, ...]  # painted in this order
    texture: int = 0

    def scaled(self, k: int) -> Scene:
        """Draw the same at `k` times the size."""
        shapes = tuple(
            Shape(kind=s.kind, color=s.color, rgb=s.rgb, box=_times(s.box, k)) for s in self.shapes
        )
        return Scene(
            width=k * self.width,
            height=k * self.height,
            ground=self.ground,
            shapes=shapes,
            texture=self.texture,
        )


Picture = Line | Scene


class Draft(NamedTuple):
    """What a family makes up: a Spec that has no number yet."""

    questions: tuple[Question, ...]
    pictures: tuple[Picture, ...] = ()
    clip: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One example before it is drawn."""

    family: str
    seed: int
    index: int
    questions: tuple[Question, ...]
    pictures: tuple[Picture, ...] = ()
    clip: bool = False  # the pictures are frames of one video

    def scaled(self, k: int) -> Spec:
        """Ask the same about pictures `k` times the size."""
        questions = tuple(
            Question(**{**_shallow(q), "box": q.box and _times(q.box, k)}) for q in self.questions
        )
        pictures = tuple(picture.scaled(k) for picture in self.pictures)
        return Spec(**{**_shallow(self), "questions": questions, "pictures": pictures})

    def to_json(self) -> dict[str, Any]:
        """Write as JSON values; fields that hold their default are left out."""
        pictures = [
            {"type": type(p).__name__.lower(), **_without_defaults(p)} for p in self.pictures
        ]
        return {
            "family": self.family,
            "seed": self.seed,
            "index": self.index,
            "questions": [_without_defaults(q) for q in self.questions],
            "pictures": pictures,
            "clip": self.clip,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Spec:
        """Read what `to_json` wrote."""
        known = {**raw}
        known["questions"] = tuple(Question(**_tuples(q)) for q in raw["questions"])
        known["pictures"] = tuple(_picture(p) for p in raw["pictures"])
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One example, drawn: the conversation to train on, and the truth to judge by."""

    messages: list[dict[str, Any]]  # ends with an assistant turn
    truth: tuple[Question, ...]  # one for each assistant turn
    spec: Spec

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The conversation up to the first question: what one asks a model."""
        return self.messages[:1]


def _shallow(item: Any) -> dict[str, Any]:
    return {f.name: getattr(item, f.name) for f in fields(item)}


def _without_defaults(item: Any) -> dict[str, Any]:
    plain = asdict(item)
    return {f.name: plain[f.name] for f in fields(item) if getattr(item, f.name) != f.default}


def _picture(raw: Mapping[str, Any]) -> Picture:
    values = _tuples({k: v for k, v in raw.items() if k != "type"})
    if raw["type"] == "line":
        return Line(**values)
    values["shapes"] = tuple(Shape(**_tuples(shape)) for shape in values["shapes"])
    return Scene(**values)


def _tuples(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}


def _times(box: Box, k: int) -> Box:
    return (k * box[0], k * box[1], k * box[2], k * box[3])


# Knob -> what it must reach at least.
_LEAST_OF_RANGE = {
    "text_length": 1,
    "font_size": 8,
    "padding": 0,
    "page_lines": 2,
    "num_shapes": 1,
    "canvas": 56,
    "clip_canvas": 56,
}
_LEAST = {"questions": 1, "max_width": 28}
_SHARES = (
    "random_share",
    "large_share",
    "sparse_share",
    "page_share",
    "plain_share",
    "textured_share",
    "list_share",
)
_CHOICES = {"split": _Split, "fonts": _Fonts, "alphabet": _Alphabet, "layout": _Layout}


def _check_mixture(mixture: Mixture) -> None:
    _check_weights(mixture.weights)
    for name, kind in _CHOICES.items():
        _require(mixture, name, getattr(mixture, name) in get_args(kind), get_args(kind))
    for name, limit in _LEAST_OF_RANGE.items():
        low, high = getattr(mixture, name)
        _require(mixture, name, limit <= low <= high, f"it must rise and start at {limit} or more")
    for name, limit in _LEAST.items():
        _require(mixture, name, getattr(mixture, name) >= limit, f"it must be at least {limit}")
    for name in _SHARES:
        _require(mixture, name, 0 <= getattr(mixture, name) <= 1, "it must lie between 0 and 1")
    frames = mixture.num_frames
    _require(mixture, "num_frames", bool(frames) and min(frames) >= 3, "3 frames at least")
    _require(mixture, "num_shapes", mixture.num_shapes[1] <= MAX_SHAPES, f"at most {MAX_SHAPES}")


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


def _require(mixture: Mixture, name: str, holds: bool, remedy: str | tuple[str, ...]) -> None:
    if not holds:
        say = remedy if isinstance(remedy, str) else f"choose {', '.join(remedy)}"
        raise ConfigError(f"mixture: {name} is {getattr(mixture, name)!r}; {say}")
