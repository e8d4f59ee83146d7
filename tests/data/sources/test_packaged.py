"""Training sets by name: opened, packed and held out like files; others are refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from qwen2vl.data.dataset import PackedDataset
from qwen2vl.data.sources import packaged
from qwen2vl.data.sources.easy_vqa import EasyVQASource
from qwen2vl.data.sources.fashion_mnist import FashionMNISTSource
from qwen2vl.data.sources.packaged import (
    TRAINING_SETS,
    check_packaged,
    is_packaged,
    open_packaged,
)
from qwen2vl.errors import ConfigError
from qwen2vl.fetch import DatasetNotFoundError, find_dataset
from tests.data.idx_files import write_idx_files
from tests.data.rows import create_data_config
from tests.eval.suites.package import write_package
from tests.tiny import tiny_processor


@pytest.fixture(autouse=True)
def _datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make both training sets, small, in a folder of datasets."""
    monkeypatch.setenv("QWEN2VL_DATASETS", str(tmp_path / "datasets"))
    digest = write_package(dataset_path(tmp_path, "easy-vqa"), num_images=5, split="train").sha256
    digests = write_idx_files(dataset_path(tmp_path, "fashion-mnist"), num_images=30)
    for name, opener in (
        ("easy-vqa", partial(EasyVQASource, digest=digest)),
        ("fashion-mnist", partial(FashionMNISTSource, digests=digests)),
    ):
        monkeypatch.setitem(TRAINING_SETS, name, opener)


def dataset_path(folder: Path, name: str) -> Path:
    return folder / "datasets" / name / find_dataset(name).revision


def open_named(folder: Path, *names: str, **fields: float) -> PackedDataset:
    data = create_data_config(folder, *(Path(name) for name in names), global_batch_size=1)
    return PackedDataset.open(replace(data, **fields), tiny_processor(), seed=0)


def test_samples_are_packed_and_prepared_as_they_were_measured(tmp_path: Path) -> None:
    dataset = open_named(tmp_path, "easy-vqa", "fashion-mnist")
    assert dataset.labels == ("easy-vqa", "fashion-mnist")
    assert [len(table) for table in dataset.lengths] == [5 * 24, 30]
    examples, bad = dataset.read(dataset.plan.entries.tolist())
    assert len(examples) == 150 and not bad
    assert dataset.name_of(121) == ("fashion-mnist", "fashion-mnist/train/1")


def test_images_that_differ_are_different_conversations_in_a_validation_split(
    tmp_path: Path,
) -> None:
    dataset = open_named(tmp_path, "fashion-mnist", validation_size=7.0)
    assert len(dataset.held_out) == 7 and len(dataset.plan.entries) == 23


def test_a_name_is_the_dataset_and_a_path_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_packaged("easy-vqa") and is_packaged("photos")
    for name in ("easy-vqa", "photos"):
        Path(name).mkdir()
    assert is_packaged("easy-vqa") and not is_packaged("./easy-vqa")
    assert not is_packaged("photos")  # can only be refused, but is somebody's folder here
    assert not any(map(is_packaged, ("", "rows.jsonl", "easy-vqa/rows.jsonl", "synthetic")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("photos", r"data=photos: .* for tests only \(scikit-image; .*\), so that no weights may"),
        ("test-fonts", r"for tests only \(.* and 17 more; .* training sets are easy-vqa, fashion"),
        ("named-pictures", "for tests only .*openmoji"),
        ("names", "data=names: the dataset has no questions with answers to train on"),
    ],
)
def test_what_must_not_or_cannot_be_trained_on_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_packaged(name)


def test_a_training_set_is_refused_once_its_package_is_for_tests_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = find_dataset("easy-vqa")
    (package,) = dataset.packages
    changed = replace(dataset, packages=(replace(package, use="test"),))
    monkeypatch.setattr(packaged, "find_dataset", lambda _: changed)
    with pytest.raises(ConfigError, match=r"for tests only \(easy-vqa; "):
        check_packaged("easy-vqa")


def test_a_dataset_that_was_not_fetched_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN2VL_DATASETS", str(tmp_path / "none"))
    with pytest.raises(DatasetNotFoundError, match="run `qwen2vl fetch-data fashion-mnist` once"):
        open_packaged("fashion-mnist")


def test_a_media_root_is_refused(tmp_path: Path) -> None:
    data = create_data_config(tmp_path, Path("easy-vqa"), global_batch_size=1)
    sources = (replace(data.sources[0], media_root=str(tmp_path)),)
    with pytest.raises(ConfigError, match="data=easy-vqa: media_root="):
        PackedDataset.open(replace(data, sources=sources), tiny_processor(), seed=0)
