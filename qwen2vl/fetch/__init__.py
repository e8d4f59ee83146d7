"""Datasets from package registries: fetched once by the user's clients, kept in the user's cache.

    fetch_dataset("easy-vqa")     runs `pip download`, `npm pack` or `apt-get download`, unpacks
    dataset_folder("easy-vqa")    the folder on this machine, or an error with the command to run

Packages are pinned by version and checksum (`packages.json`). No host is named here: a client uses
the index, mirror and proxy of its own configuration. Only `fetch_dataset` accesses the network.
"""

from qwen2vl.fetch.catalog import Package, PackagedDataset, find_dataset, load_catalog
from qwen2vl.fetch.clients import FetchError
from qwen2vl.fetch.store import (
    DatasetNotFoundError,
    dataset_folder,
    datasets_root,
    fetch_dataset,
    is_fetched,
)

__all__ = [
    "DatasetNotFoundError",
    "FetchError",
    "Package",
    "PackagedDataset",
    "dataset_folder",
    "datasets_root",
    "fetch_dataset",
    "find_dataset",
    "is_fetched",
    "load_catalog",
]
