"""easy-VQA: the training set as a data source, and where the published files of both sets lie.

38,575 questions about 4,000 images of one colored shape, 64 x 64 pixels; the answers are a shape, a
color, yes or no. (Victor Zhou, https://victorzhou.com/blog/easy-vqa/; package easy-vqa 1.0, MIT
license.) `qwen2vl.eval.suites.easy_vqa` evaluates on the test set, with the same prompts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from qwen2vl.data.formats import Conversation
from qwen2vl.data.sources.published import Split, build_prompt, read_published

__all__ = ["NAME", "TRAIN_SHA256", "EasyVQASource", "Question", "image_folder", "read_questions"]

NAME = "easy-vqa"
TRAIN_SHA256 = "bb67697636aed0e65631d4266824aebeae5c833b0f37ed781e20752e85617ec5"


class Question(NamedTuple):
    """A question about one image."""

    question: str
    answer: str
    image_number: int


def read_questions(folder: Path, split: Split, digest: str) -> list[Question]:
    """Read the questions of a split, in the published order.

    Args:
        folder: of the unpacked package: it has easy_vqa/data.
        split: whose questions.json is read.
        digest: SHA-256 of that file.

    Raises:
        InputError: the file cannot be read, or is not the published one.
    """
    path = _split_folder(folder, split) / "questions.json"
    rows = json.loads(read_published(path, digest, dataset=NAME))
    return [Question(*row) for row in rows]


def image_folder(folder: Path, split: Split) -> Path:
    """Return the folder of a split's images, which are named by their numbers: 12.png."""
    return _split_folder(folder, split) / "images"


def _split_folder(folder: Path, split: Split) -> Path:
    return folder / "easy_vqa" / "data" / split


class EasyVQASource:
    """Conversations of the training set; images are files. (Implements SampleSource.)"""

    def __init__(self, folder: Path, *, digest: str = TRAIN_SHA256) -> None:
        """Read the questions.

        Args:
            folder: of the unpacked package.
            digest: SHA-256 of the training set's questions.json.

        Raises:
            InputError: the file cannot be read, or is not the published one.
        """
        self._questions = read_questions(folder, "train", digest)
        self._digest = digest
        self.media_root = str(image_folder(folder, "train"))

    def __len__(self) -> int:
        return len(self._questions)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the questions."""
        return f"{NAME} {self._digest}"

    def name(self, index: int) -> str:
        """Return the name of a sample: dataset, split and index."""
        return f"{NAME}/train/{index}"

    def read(self, index: int, *, pixels: bool = True) -> Conversation:
        """Return one question, with its image as a path, and its answer."""
        row = self._questions[index]
        prompt = build_prompt(f"{row.image_number}.png", row.question)
        messages = [prompt, {"role": "assistant", "content": row.answer}]
        return Conversation(self.name(index), messages)
