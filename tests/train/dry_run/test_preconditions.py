"""Preconditions of a run: local files must exist, remote ones are not looked up."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2vl.data.sources import source
from qwen2vl.errors import ConfigError, InputError
from qwen2vl.recipes import lora, stage1_vision
from qwen2vl.train.config import override
from qwen2vl.train.dry_run.preconditions import check_preconditions


def test_remote_data_are_not_looked_up_before_they_are_opened() -> None:
    recipe = lora.recipe()
    config = override(recipe, ["data=s3://bucket/rows.jsonl", "validation=s3://bucket/more.jsonl"])
    check_preconditions(config, recipe)


def test_files_folders_and_patterns_that_exist_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    recipe = lora.recipe()
    for path in ("rows.jsonl", "", "*.jsonl"):
        check_preconditions(override(recipe, [f"data={tmp_path / path}"]), recipe)


def test_data_that_only_the_recipe_names_are_asked_for() -> None:
    recipe = stage1_vision.recipe()
    with pytest.raises(InputError, match="stage1_vision reads data: give data=FILE, since data/"):
        check_preconditions(recipe, recipe)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("fashion-mnist", "run `qwen2vl fetch-data fashion-mnist` once"),
        ("rows.jsonl,photos", "data=photos: .* for tests only"),
    ],
)
def test_datasets_that_are_absent_or_for_tests_only_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.setenv("QWEN2VL_DATASETS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    recipe = lora.recipe()
    with pytest.raises(ConfigError, match=message):
        check_preconditions(override(recipe, [f"data={path}"]), recipe)


@pytest.mark.parametrize("name", ["easy-vqa", "photos"])
def test_a_dataset_is_no_validation_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "easy-vqa").mkdir()  # the name is that of the training set all the same
    recipe = lora.recipe()
    config = override(recipe, ["data=s3://bucket/rows.jsonl", f"validation={name}"])
    with pytest.raises(ConfigError, match=rf"validation={name}: is the name .* validation=0\.05 "):
        check_preconditions(config, recipe)
    config = override(recipe, ["data=s3://bucket/rows.jsonl", "validation=./easy-vqa"])
    check_preconditions(config, recipe)


def test_a_validation_file_must_exist() -> None:
    recipe = lora.recipe()
    config = override(recipe, ["data=s3://bucket/rows.jsonl", "validation=none.jsonl"])
    with pytest.raises(InputError, match=r"validation=none\.jsonl: no such file"):
        check_preconditions(config, recipe)


def test_a_dataset_has_no_media_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "check_packaged", lambda name: tmp_path)  # as if it was fetched
    recipe = lora.recipe()
    config = override(recipe, ["data=easy-vqa"])
    check_preconditions(config, recipe)
    config = override(config, ["data.sources.0.media_root=images"])
    with pytest.raises(ConfigError, match="data=easy-vqa: media_root=images is for files"):
        check_preconditions(config, recipe)
