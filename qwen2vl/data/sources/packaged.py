"""Training sets of `qwen2vl fetch-data` by name: data=easy-vqa in place of data=FILE.

A dataset is read where it was fetched to; nothing is fetched here. Only datasets whose packages all
have the use "train" in qwen2vl/fetch/packages.json are opened: those for tests only are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from qwen2vl.data.sources import easy_vqa, fashion_mnist
from qwen2vl.data.sources.easy_vqa import EasyVQASource
from qwen2vl.data.sources.fashion_mnist import FashionMNISTSource
from qwen2vl.errors import ConfigError
from qwen2vl.fetch import dataset_folder, find_dataset, load_catalog

__all__ = [
    "TRAINING_SETS",
    "PackagedSource",
    "check_packaged",
    "is_packaged",
    "open_packaged",
]

PackagedSource = EasyVQASource | FashionMNISTSource

TRAINING_SETS: Mapping[str, Callable[[Path], PackagedSource]] = {
    easy_vqa.NAME: EasyVQASource,
    fashion_mnist.NAME: FashionMNISTSource,
}


def is_packaged(path: str) -> bool:
    """Return whether the path of a source is the name of a dataset in place of a path.

    Names of training sets always are, as "nano" is among models: a folder of that name is
    "./easy-vqa". Names of other datasets are, so that they are refused, unless there is such a
    path.
    """
    if path in TRAINING_SETS:
        return True
    return path in load_catalog() and not Path(path).exists()


def check_packaged(name: str) -> Path:
    """Return the folder of a dataset that may be trained on.

    Args:
        name: for which `is_packaged` is true.

    Raises:
        ConfigError: the dataset is for tests only, or has no training set.
        DatasetNotFoundError: it was not fetched; the text has the command.
    """
    dataset = find_dataset(name)
    known = ", ".join(TRAINING_SETS)
    test_only = [package for package in dataset.packages if package.use == "test"]
    if test_only:
        packages = ", ".join(package.name for package in test_only[:3])
        more = f" and {len(test_only) - 3} more" if len(test_only) > 3 else ""
        raise ConfigError(
            f"data={name}: the dataset has packages that are for tests only ({packages}{more}; "
            f"docs/guides/datasets.md), so that no weights may be trained on it; training sets "
            f"are {known}"
        )
    if name not in TRAINING_SETS:
        raise ConfigError(
            f"data={name}: the dataset has no questions with answers to train on; training sets "
            f"are {known}"
        )
    return dataset_folder(name)


def open_packaged(name: str) -> PackagedSource:
    """Open the training set of a dataset that was fetched.

    Raises:
        ConfigError: as `check_packaged` does.
        DatasetNotFoundError: it was not fetched; the text has the command.
        InputError: its files are damaged, or are not those that were published.
    """
    folder = check_packaged(name)
    return TRAINING_SETS[name](folder)
