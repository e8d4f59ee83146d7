"""easy-VQA: the published test set of questions about one colored shape of 64 x 64 pixels.

9,673 questions about 1,000 images with 13 answers: three shapes, eight colors, yes and no. (Victor
Zhou, https://victorzhou.com/blog/easy-vqa/; package easy-vqa 1.0, MIT license.) easy_vqa.json has
its question patterns, of which each is a kind here, its digest, and two maps of names: `spellings`
are always accepted. `similar_names` are the words that stand for a name in a vocabulary without
it, such as nano's: of the nearest hue, or without hue. They count in a second score only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from qwen2vl.data.sources.easy_vqa import image_folder, read_questions
from qwen2vl.data.sources.published import build_prompt
from qwen2vl.errors import InputError
from qwen2vl.eval.suites.suite import SuiteItem, constant_answer_chances, exchange_media
from qwen2vl.eval.suites.thresholds import CHANCE, NO_THRESHOLD, Threshold
from qwen2vl.eval.task import Messages

__all__ = ["EasyVQA", "EasyVQADefinition", "load_definition", "open_easy_vqa"]

FETCH = "qwen2vl fetch-data easy-vqa"

NOTES = {
    "shape": "of the only shape in the image",
    "shape_of_color": "the color in the question is that of the only shape",
    "has_shape": "most answers are no, which the chance level has in it",
    "has_color": "most answers are no, which the chance level has in it",
    "lacks_shape": "most answers are yes, which the chance level has in it",
    "lacks_color": "most answers are yes, which the chance level has in it",
}
BLIND_NOTE = "control: the image belongs to another question of the same pattern"


@dataclass(frozen=True, slots=True, kw_only=True)
class EasyVQADefinition:
    """What easy_vqa.json says about the published set."""

    num_questions: int
    sha256: str  # of its questions.json
    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    patterns: Mapping[str, tuple[str, ...]]  # part -> questions with {shape} or {color} in them
    spellings: Mapping[str, tuple[str, ...]]  # answer -> other spellings of it
    similar_names: Mapping[str, tuple[str, ...]]  # answer -> words for it, without its own

    def find_pattern(self, question: str) -> tuple[str, str] | None:
        """Return the part and the pattern of a question; None if it has none."""
        for part, patterns in self.patterns.items():
            for pattern in patterns:
                if self._expression(pattern).fullmatch(question):
                    return part, pattern
        return None

    def _expression(self, pattern: str) -> re.Pattern[str]:
        names = {"{shape}": self.shapes, "{color}": self.colors}
        pieces = re.split(r"(\{\w+\})", pattern)
        return re.compile(
            "".join(
                f"(?:{'|'.join(names[piece])})" if piece in names else re.escape(piece)
                for piece in pieces
            )
        )


class EasyVQA:
    """The test set in an unpacked package. (Implements Suite.)"""

    name = "easy-vqa"
    max_tokens = 64
    max_model_len = None
    paired_parts: Sequence[tuple[str, str]] = ()

    def __init__(self, folder: Path, definition: EasyVQADefinition) -> None:
        """Read the questions; images are named when they are asked for.

        Args:
            folder: of the unpacked package: it has easy_vqa/data/test.
            definition: of the set.

        Raises:
            InputError: the files cannot be read, or are not those that were published.
        """
        self._image_folder = image_folder(folder, "test")
        self._questions = read_questions(folder, "test", definition.sha256)
        self._definition = definition
        assert len(self._questions) == definition.num_questions, "the digest names one file"
        self.parts: Sequence[str] = tuple(definition.patterns)
        self.blind_parts: Sequence[str] = self.parts

    @property
    def digest(self) -> str:
        """SHA-256 of the questions, the images and the rules of scoring."""
        hasher = sha256(repr(self._definition).encode())
        for number in sorted({number for _, _, number in self._questions}):
            hasher.update(sha256(self._read_image(number)).digest())
        return hasher.hexdigest()

    def note(self, part: str, *, blind: bool = False) -> str:
        """Return how a part differs from what a reader might assume."""
        return BLIND_NOTE if blind else NOTES.get(part, "")

    def threshold(self, part: str, *, blind: bool = False) -> Threshold:
        """Return the threshold of a part: chance for the blind control, else none."""
        return CHANCE if blind else NO_THRESHOLD

    def items(self, parts: Sequence[str], *, blind: bool = False) -> Sequence[SuiteItem]:
        """Return the questions of some parts, in the published order."""
        items = exchange_media(self._items) if blind else self._items
        return [item for item in items if item.part in parts]

    def messages(self, item: SuiteItem) -> Messages:
        """Return the image file and the question."""
        return [build_prompt(str(self._image_path(item.media)), item.question)]

    def check_part(self, part: str) -> None:
        """Do nothing: the images of all parts are files."""

    @cached_property
    def _items(self) -> list[SuiteItem]:
        rows = list(self._parse_rows())
        chances = constant_answer_chances([(row.kind, row.answers) for row in rows])
        similar = constant_answer_chances(
            [(row.kind, (*row.answers, *row.similar_answers)) for row in rows]
        )
        return [
            SuiteItem(
                id=f"{index:04d}",
                part=row.part,
                kind=row.kind,
                question=row.question,
                answers=row.answers,
                similar_answers=row.similar_answers,
                metric="exact_match",
                chance=chance,
                similar_chance=similar_chance,
                media=row.image_number,
            )
            for index, (row, chance, similar_chance) in enumerate(
                zip(rows, chances, similar, strict=True)
            )
        ]

    def _parse_rows(self) -> Iterator[_Row]:
        definition = self._definition
        for question, answer, number in self._questions:
            found = definition.find_pattern(question)
            assert found is not None, f"a published question without a pattern: {question}"
            yield _Row(
                *found,
                question=question,
                answers=(answer, *definition.spellings.get(answer, ())),
                similar_answers=definition.similar_names.get(answer, ()),
                image_number=number,
            )

    def _image_path(self, number: int) -> Path:
        return self._image_folder / f"{number}.png"

    def _read_image(self, number: int) -> bytes:
        path = self._image_path(number)
        try:
            return path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read: {error.strerror}; fetch the set again: {FETCH}"
            ) from error


@dataclass(frozen=True, slots=True)
class _Row:
    """A published question."""

    part: str
    kind: str
    question: str
    answers: tuple[str, ...]
    similar_answers: tuple[str, ...]
    image_number: int


def open_easy_vqa() -> EasyVQA:
    """Open the test set in the folder that `qwen2vl fetch-data` has filled.

    Raises:
        Qwen2VLError: it was not fetched, and the text names the command.
        InputError: as `EasyVQA` does.
    """
    from qwen2vl.fetch import dataset_folder

    return EasyVQA(dataset_folder("easy-vqa"), load_definition())


def load_definition() -> EasyVQADefinition:
    """Read easy_vqa.json."""
    text = files("qwen2vl.eval").joinpath("suites", "easy_vqa.json").read_text(encoding="utf-8")
    raw = json.loads(text)
    return EasyVQADefinition(
        num_questions=raw["num_questions"],
        sha256=raw["sha256"],
        shapes=tuple(raw["shapes"]),
        colors=tuple(raw["colors"]),
        patterns=_tuples(raw["patterns"]),
        spellings=_tuples(raw["spellings"]),
        similar_names=_tuples(raw["similar_names"]),
    )


def _tuples(raw: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(values) for name, values in raw.items()}
