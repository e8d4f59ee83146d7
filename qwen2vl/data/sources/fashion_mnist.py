"""Fashion-MNIST: the training set as a data source, and the reader of its IDX files.

70,000 gray images of 28 x 28 pixels, of ten classes of equal size: 60,000 for training, 10,000 for
testing. (Xiao et al. 2017, arXiv:1708.07747; Copyright (c) 2017 Zalando SE, MIT license.) The
question lists the classes, so that the answer is defined. `qwen2vl.eval.suites.fashion_mnist`
evaluates on the test set, with the same prompts.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwen2vl.data.formats import Conversation
from qwen2vl.data.sources.published import Split, build_prompt, read_published

__all__ = ["CLASSES", "NAME", "QUESTION", "SHA256", "FashionMNISTSource", "LabeledImages"]

NAME = "fashion-mnist"
SIZE = 28  # height and width of an image, in pixels

# Names of the labels 0 to 9. The published names are the same, but for "T-shirt/top".
CLASSES = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
QUESTION = f"Which article is in the image? Answer with one of: {', '.join(CLASSES)}."

_FILES: Mapping[Split, tuple[str, str]] = {  # images and labels
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
SHA256: Mapping[str, str] = {  # of the published files, compressed
    "train-images-idx3-ubyte.gz": (
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
    ),
    "train-labels-idx1-ubyte.gz": (
        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
    ),
}
_IMAGES_MAGIC, _LABELS_MAGIC = 0x0803, 0x0801  # IDX: unsigned bytes, with three axes or one


class LabeledImages(NamedTuple):
    """The images and labels of a split."""

    pixels: np.ndarray  # (number, 28, 28) uint8
    labels: np.ndarray  # (number,) uint8, indices of CLASSES

    @classmethod
    def load(cls, folder: Path, split: Split, digests: Mapping[str, str] = SHA256) -> LabeledImages:
        """Decompress a split into memory: 47 MB of the training set.

        Args:
            folder: of the unpacked package.
            split: which one.
            digests: SHA-256 of its compressed files by name.

        Raises:
            InputError: a file cannot be read, or is not the published one.
        """
        images, labels = (
            gzip.decompress(read_published(folder / name, digests[name], dataset=NAME))
            for name in _FILES[split]
        )
        return cls(
            _parse_idx(images, _IMAGES_MAGIC, (SIZE, SIZE)), _parse_idx(labels, _LABELS_MAGIC, ())
        )

    def rgb(self, index: int) -> np.ndarray:
        """Return an image with three equal channels: (28, 28, 3) uint8."""
        return np.repeat(self.pixels[index][:, :, None], 3, axis=2)

    def class_name(self, index: int) -> str:
        """Return the class of an image."""
        return CLASSES[self.labels[index]]


def _parse_idx(content: bytes, magic: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array of an IDX file: (number, *shape) uint8."""
    header = np.frombuffer(content, ">u4", 2 + len(shape))
    values = np.frombuffer(content, np.uint8, offset=header.nbytes)
    # A file with the published digest has the published layout.
    assert header[0] == magic and tuple(header[2:]) == shape, f"IDX header {header}"
    return values.reshape(int(header[1]), *shape)


class FashionMNISTSource:
    """Conversations of the training set, whose images are arrays. (Implements SampleSource.)"""

    media_root = ""

    def __init__(self, folder: Path, *, digests: Mapping[str, str] = SHA256) -> None:
        """Load the images.

        Args:
            folder: of the unpacked package.
            digests: SHA-256 of its compressed files by name.

        Raises:
            InputError: a file cannot be read, or is not the published one.
        """
        self._images = LabeledImages.load(folder, "train", digests)
        self._digests = [digests[name] for name in _FILES["train"]]

    def __len__(self) -> int:
        return len(self._images.labels)

    def fingerprint(self) -> str:
        """Return the digests of the files, the question and the answers."""
        return "\n".join((*self._digests, QUESTION, *CLASSES))

    def name(self, index: int) -> str:
        """Return the name of a sample: dataset, split and index."""
        return f"{NAME}/train/{index}"

    def read(self, index: int, *, pixels: bool = True) -> Conversation:
        """Return one image, as an array, with the question and its class."""
        prompt = build_prompt(self._images.rgb(index), QUESTION)
        answer = {"role": "assistant", "content": self._images.class_name(index)}
        return Conversation(self.name(index), [prompt, answer])
