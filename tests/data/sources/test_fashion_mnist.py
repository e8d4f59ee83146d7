"""Fashion-MNIST: IDX files, and conversations whose prompts are those of the suite."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from qwen2vl.data.sources.fashion_mnist import (
    CLASSES,
    QUESTION,
    FashionMNISTSource,
    LabeledImages,
)
from qwen2vl.errors import InputError
from qwen2vl.eval.suites.fashion_mnist import FashionMNIST
from tests.data.idx_files import write_idx_files


def test_images_and_labels_are_read_in_their_order(tmp_path: Path) -> None:
    digests = write_idx_files(tmp_path, num_images=12)
    images = LabeledImages.load(tmp_path, "train", digests)
    raw = gzip.decompress((tmp_path / "train-images-idx3-ubyte.gz").read_bytes())
    last = np.frombuffer(raw[-28 * 28 :], np.uint8).reshape(28, 28)
    rgb = images.rgb(11)
    assert rgb.shape == (28, 28, 3) and all((rgb[:, :, c] == last).all() for c in range(3))
    assert [images.class_name(index) for index in (0, 9, 10, 11)] == [
        *("T-shirt", "ankle boot", "T-shirt", "trouser")
    ]


def test_the_question_lists_all_classes_once() -> None:
    assert len(set(CLASSES)) == 10
    listed = QUESTION.partition("one of: ")[2].removesuffix(".").split(", ")
    assert listed == list(CLASSES)


def test_prompts_and_answers_are_those_of_the_suite(tmp_path: Path) -> None:
    digests = write_idx_files(tmp_path, num_images=12)
    digests |= write_idx_files(tmp_path, num_images=12, split="test")  # of the same pixels
    source, suite = FashionMNISTSource(tmp_path, digests=digests), FashionMNIST(tmp_path, digests)
    items = suite.items(suite.parts)
    assert len(source) == len(items) == 12
    for index, item in enumerate(items):
        (prompt, answer), (evaluated,) = source.read(index).messages, suite.messages(item)
        assert (prompt["role"], prompt["content"][1]) == ("user", evaluated["content"][1])
        trained, shown = (message["content"][0] for message in (prompt, evaluated))
        assert trained.keys() == shown.keys() and trained["type"] == shown["type"] == "image"
        assert np.array_equal(trained["image"], shown["image"])
        assert answer == {"role": "assistant", "content": item.answers[0]}


def test_only_the_published_files_are_trained_on(tmp_path: Path) -> None:
    write_idx_files(tmp_path, num_images=3)
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz: is not the published file"):
        FashionMNISTSource(tmp_path)
