"""FrozenSuite: a suite that is one file of questions and of pictures as numbers, drawn on demand.

The first line of the file is a header, `FrozenHeader`; each other line is an item, `FrozenItem`:

    {"suite": "honesty", "max_tokens": 64, "parts": {"absent": {"note": "..."}}, "refusals": [...]}
    {"id": "absent/017", "part": "absent", "kind": "color", "question": "...", "pictures": [...]}

dev/suites/ has written these files, once; a file that changes is another suite, with
another digest. The chance level of an item is the accuracy of the best constant answer to its kind,
or one over the number of choices where that is higher.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from qwen2vl.eval.metrics import iou
from qwen2vl.eval.suites.scoring import MIN_IOU, Metric
from qwen2vl.eval.suites.suite import (
    Box,
    SuiteItem,
    constant_answer_chances,
    exchange_media,
)
from qwen2vl.eval.suites.thresholds import CHANCE, NO_THRESHOLD, Threshold
from qwen2vl.eval.task import Messages
from qwen2vl.files.record_file import to_json_line
from qwen2vl.synth.compositing import Composite, check_resources
from qwen2vl.synth.compositing.layers import lists_to_tuples
from qwen2vl.synth.draw import draw_image
from qwen2vl.synth.fonts import font_path
from qwen2vl.synth.spec import Line, Picture, picture_from_json, picture_to_json

__all__ = [
    "FrozenHeader",
    "FrozenItem",
    "FrozenSuite",
    "Part",
    "open_frozen_suite",
    "write_frozen_suite",
]

BLIND_NOTE = "control: the picture belongs to another question of the same kind"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One row of the table."""

    note: str = ""
    is_control: bool = False  # without what answers it needs: its threshold is chance
    has_blind_control: bool = True
    compared_with: str = ""  # part with the same items, asked or shown in another way


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenHeader:
    """What a file says about all of its items."""

    suite: str  # name
    parts: Mapping[str, Part]  # in the order of the table
    max_tokens: int = 64  # of an answer
    max_model_len: int | None = None  # tokens of the longest prompt and its answer; None: any
    # Sentences that say that the picture does not answer the question, where some items ask for it.
    refusals: tuple[str, ...] = ()
    # What the items were made of and must not be trained on, as the suite's documentation.
    held_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        raw = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**raw, "parts": {name: asdict(part) for name, part in self.parts.items()}}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> FrozenHeader:
        """Create from the output of `to_json`."""
        values: dict[str, Any] = {
            **raw,
            "parts": {name: Part(**part) for name, part in raw["parts"].items()},
            "refusals": tuple(raw["refusals"]),
            "held_out": {name: tuple(listed) for name, listed in raw["held_out"].items()},
        }
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenItem:
    """One question, with its pictures as numbers."""

    id: str  # unique in the suite: "absent/017"
    part: str
    kind: str  # finer: within it the blind control exchanges pictures
    question: str
    answers: tuple[str, ...] = ()  # accepted ones; empty: the picture does not answer the question
    metric: Metric = "exact_match"
    pictures: tuple[Picture, ...]  # one image, or the frames of a video
    clip: bool = False  # a video
    box: Box | None = None  # ground truth, as fractions of the picture's size
    choices: int = 0  # number of equally likely answers; 0: unknown
    max_pixels: int | None = None  # of the preprocessed image; None: the model's own

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values; fields that hold their default are omitted."""
        raw = {one.name: getattr(self, one.name) for one in fields(self)}
        raw["pictures"] = [picture_to_json(picture) for picture in self.pictures]
        defaults = {one.name: one.default for one in fields(self)}
        return {name: value for name, value in raw.items() if value != defaults[name]}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> FrozenItem:
        """Create from the output of `to_json`."""
        values = lists_to_tuples(raw)
        values["pictures"] = tuple(picture_from_json(picture) for picture in raw["pictures"])
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenMedia:
    """What the message of an item shows."""

    pictures: tuple[Picture, ...]
    clip: bool
    max_pixels: int | None


class FrozenSuite:
    """The items of a file. (Implements Suite.)"""

    def __init__(self, path: Path) -> None:
        """Read a file that `write_frozen_suite` has written."""
        content = path.read_bytes()
        header, *rows = content.splitlines()
        self._header = FrozenHeader.from_json(json.loads(header))
        self._rows = rows
        self.digest = sha256(content).hexdigest()
        self.name = self._header.suite
        self.max_tokens = self._header.max_tokens
        self.max_model_len = self._header.max_model_len
        parts = self._header.parts
        self.parts: Sequence[str] = tuple(parts)
        self.blind_parts: Sequence[str] = tuple(
            name for name, part in parts.items() if part.has_blind_control
        )
        self.paired_parts: Sequence[tuple[str, str]] = tuple(
            (name, part.compared_with) for name, part in parts.items() if part.compared_with
        )

    @property
    def header(self) -> FrozenHeader:
        """What the file says about all of its items."""
        return self._header

    @cached_property
    def frozen_items(self) -> tuple[FrozenItem, ...]:
        """The items as they stand in the file."""
        return tuple(FrozenItem.from_json(json.loads(row)) for row in self._rows)

    def note(self, part: str, *, blind: bool = False) -> str:
        """Return how a part differs from what a reader might assume."""
        return BLIND_NOTE if blind else self._header.parts[part].note

    def threshold(self, part: str, *, blind: bool = False) -> Threshold:
        """Return the threshold of a part: chance for a control, else none."""
        is_control = blind or self._header.parts[part].is_control
        return CHANCE if is_control else NO_THRESHOLD

    def items(self, parts: Sequence[str], *, blind: bool = False) -> Sequence[SuiteItem]:
        """Return the items of some parts, in the order of the file."""
        items = exchange_media(self._items) if blind else self._items
        return [item for item in items if item.part in parts]

    def messages(self, item: SuiteItem) -> Messages:
        """Draw the pictures of an item, and build its message."""
        media: FrozenMedia = item.media
        frames = [draw_image(picture) for picture in media.pictures]
        options = {} if media.max_pixels is None else {"max_pixels": media.max_pixels}
        content: list[dict[str, Any]]
        if media.clip:
            content = [{"type": "video", "video": np.stack(frames), **options}]
        else:
            content = [{"type": "image", "image": frame, **options} for frame in frames]
        return [{"role": "user", "content": [*content, {"type": "text", "text": item.question}]}]

    def check_part(self, part: str) -> None:
        """Check that the pictures of a part can be drawn.

        Raises:
            ConfigError: a dataset, a font or a library is absent; the text has the remedy.
        """
        pictures = [p for item in self.frozen_items if item.part == part for p in item.pictures]
        check_resources(p for p in pictures if isinstance(p, Composite))
        for font in sorted({p.font for p in pictures if isinstance(p, Line)}):
            font_path(font)

    @cached_property
    def _items(self) -> list[SuiteItem]:
        items = self.frozen_items
        refusals = self._header.refusals
        chances = _chance_levels(items)
        return [
            SuiteItem(
                id=item.id,
                part=item.part,
                kind=item.kind,
                question=item.question,
                answers=item.answers or refusals,
                metric=item.metric,
                chance=chance,
                box=item.box,
                refusals=refusals,
                is_answerable=bool(item.answers),
                media=FrozenMedia(
                    pictures=item.pictures, clip=item.clip, max_pixels=item.max_pixels
                ),
                num_pixels=sum(picture.width * picture.height for picture in item.pictures),
            )
            for item, chance in zip(items, chances, strict=True)
        ]


def open_frozen_suite(name: str) -> FrozenSuite:
    """Open a suite that comes with the package."""
    file = files("qwen2vl.eval").joinpath("suites", "frozen", f"{name}.jsonl")
    return FrozenSuite(Path(str(file)))


def write_frozen_suite(path: Path, header: FrozenHeader, items: Iterable[FrozenItem]) -> None:
    """Write the file of a suite."""
    listed = list(items)
    assert len({item.id for item in listed}) == len(listed), "ids are unique"
    assert {item.part for item in listed} == set(header.parts), "every part has items"
    has_refusals = bool(header.refusals)
    assert has_refusals or all(item.answers for item in listed), "no answer: refusals are listed"
    rows = [header.to_json(), *(item.to_json() for item in listed)]
    path.write_bytes(b"".join(to_json_line(row) for row in rows))


def _chance_levels(items: Sequence[FrozenItem]) -> list[float]:
    """Return the chance level of each item."""
    groups: dict[tuple[str, str], list[FrozenItem]] = defaultdict(list)
    for item in items:
        groups[item.part, item.kind].append(item)
    constant = constant_answer_chances(
        [((item.part, item.kind), item.answers or ("(a refusal)",)) for item in items]
    )
    boxes = {group: _constant_box_accuracy(own) for group, own in groups.items()}
    return [
        max(
            boxes[item.part, item.kind] if item.box is not None else chance,
            1 / item.choices if item.choices else 0.0,
        )
        for item, chance in zip(items, constant, strict=True)
    ]


def _constant_box_accuracy(items: Sequence[FrozenItem]) -> float:
    """Return the accuracy of the best of their boxes as the answer to all of them."""
    boxes = [item.box for item in items if item.box is not None]
    hits = (sum(iou(box, answer) >= MIN_IOU for box in boxes) for answer in boxes)
    return max(hits, default=0) / len(items)
