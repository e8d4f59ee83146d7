"""easy-VQA as training data: conversations whose prompts are those of the suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2vl.data.sources.easy_vqa import EasyVQASource
from qwen2vl.errors import InputError
from qwen2vl.eval.suites.easy_vqa import EasyVQA
from tests.eval.suites.package import write_package


def test_prompts_and_answers_are_those_of_the_suite(tmp_path: Path) -> None:
    write_package(tmp_path, num_images=4, split="train")
    definition = write_package(tmp_path, num_images=4)  # the same questions as the test set
    source, suite = EasyVQASource(tmp_path, digest=definition.sha256), EasyVQA(tmp_path, definition)
    items = suite.items(suite.parts)
    assert len(source) == len(items) == 4 * 24
    for index, item in enumerate(items):
        prompt, answer = source.read(index).messages
        image = prompt["content"][0]
        path = Path(source.media_root, image["image"])
        assert path.is_file() and path.parts[-3:-1] == ("train", "images")
        image["image"] = str(path).replace("train", "test")
        assert [prompt] == suite.messages(item)
        assert answer == {"role": "assistant", "content": item.answers[0]}


def test_paths_are_relative_so_that_the_validation_split_is_the_same_everywhere(
    tmp_path: Path,
) -> None:
    digest = write_package(tmp_path, num_images=1, split="train").sha256
    messages = EasyVQASource(tmp_path, digest=digest).read(0).messages
    assert str(tmp_path) not in repr(messages)


def test_only_the_published_questions_are_trained_on(tmp_path: Path) -> None:
    write_package(tmp_path, num_images=1, split="train")
    with pytest.raises(InputError, match=r"questions\.json: is not the published file of easy-vqa"):
        EasyVQASource(tmp_path)
