"""Fashion-MNIST: the published test set of gray images of clothing, 28 x 28 pixels.

10,000 images of ten classes of equal size. (Xiao et al. 2017, arXiv:1708.07747; Copyright (c) 2017
Zalando SE, MIT license.) Every image has the same question, which lists the classes; it and the
reader of the files are in `qwen2vl.data.sources.fashion_mnist`, which training shares. All items
are one part and one kind, since the question does not depend on the class: the best constant answer
is right for a tenth of them, and a blind question has an image of any class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from qwen2vl.data.sources.fashion_mnist import (
    CLASSES,
    NAME,
    QUESTION,
    SHA256,
    LabeledImages,
)
from qwen2vl.data.sources.published import build_prompt
from qwen2vl.eval.suites.suite import SuiteItem, constant_answer_chances, exchange_media
from qwen2vl.eval.suites.thresholds import CHANCE, NO_THRESHOLD, Threshold
from qwen2vl.eval.task import Messages

__all__ = ["SPELLINGS", "FashionMNIST", "open_fashion_mnist"]

PART = "clothing"
NOTE = (
    "one of the ten classes that the question lists; images are gray, 28 x 28 pixels, sent as RGB "
    "of that size, and enlarged to the processor's min_pixels"
)
BLIND_NOTE = "control: the image belongs to another question"

# Other spellings of a class that are accepted, where they cannot mean another of the classes: of
# shoes only the ankle boot is a boot, but any of three classes is a shoe.
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "T-shirt": ("T-shirts", "tshirt", "T shirt", "T-shirt/top", "top"),
    "trouser": ("trousers", "pair of trousers", "pants"),
    "pullover": ("pullovers", "sweater"),
    "dress": ("dresses",),
    "coat": ("coats",),
    "sandal": ("sandals",),
    "shirt": ("shirts",),
    "sneaker": ("sneakers",),
    "bag": ("bags", "handbag"),
    "ankle boot": ("ankle boots", "boot", "boots"),
}


class FashionMNIST:
    """The test set in an unpacked package. (Implements Suite.)"""

    name = NAME
    max_tokens = 64
    max_model_len = None
    paired_parts: Sequence[tuple[str, str]] = ()
    parts: Sequence[str] = (PART,)
    blind_parts: Sequence[str] = (PART,)

    def __init__(self, folder: Path, digests: Mapping[str, str] = SHA256) -> None:
        """Load the images.

        Args:
            folder: of the unpacked package: it has t10k-images-idx3-ubyte.gz and its labels.
            digests: SHA-256 of these files by name.

        Raises:
            InputError: a file cannot be read, or is not the one that was published.
        """
        self._images = LabeledImages.load(folder, "test", digests)

    @property
    def digest(self) -> str:
        """SHA-256 of the images, the labels, the question and the accepted answers."""
        hasher = sha256(self._images.pixels.tobytes())
        hasher.update(self._images.labels.tobytes())
        hasher.update(repr((QUESTION, [_accepted_answers(name) for name in CLASSES])).encode())
        return hasher.hexdigest()

    def note(self, part: str, *, blind: bool = False) -> str:
        """Return how a part differs from what a reader might assume."""
        return BLIND_NOTE if blind else NOTE

    def threshold(self, part: str, *, blind: bool = False) -> Threshold:
        """Return the threshold of a part: chance for the blind control, else none."""
        return CHANCE if blind else NO_THRESHOLD

    def items(self, parts: Sequence[str], *, blind: bool = False) -> Sequence[SuiteItem]:
        """Return the questions, in the published order of the images."""
        if PART not in parts:
            return []
        return exchange_media(self._items) if blind else self._items

    def messages(self, item: SuiteItem) -> Messages:
        """Return the image, as an array (28, 28, 3) uint8, and the question."""
        return [build_prompt(self._images.rgb(item.media), item.question)]

    def check_part(self, part: str) -> None:
        """Do nothing: the images are loaded."""

    @cached_property
    def _items(self) -> list[SuiteItem]:
        count = len(self._images.labels)
        answers = [_accepted_answers(self._images.class_name(index)) for index in range(count)]
        chances = constant_answer_chances([(PART, accepted) for accepted in answers])
        return [
            SuiteItem(
                id=f"{index:04d}",
                part=PART,
                kind=PART,
                question=QUESTION,
                answers=accepted,
                metric="exact_match",
                chance=chance,
                media=index,
            )
            for index, (accepted, chance) in enumerate(zip(answers, chances, strict=True))
        ]


def _accepted_answers(name: str) -> tuple[str, ...]:
    return (name, *SPELLINGS[name])


def open_fashion_mnist() -> FashionMNIST:
    """Open the test set in the folder that `qwen2vl fetch-data` has filled.

    Raises:
        DatasetNotFoundError: it was not fetched, and the text names the command.
        InputError: as `FashionMNIST` does.
    """
    from qwen2vl.fetch import dataset_folder

    return FashionMNIST(dataset_folder(NAME))
