"""Folders of datasets: complete or absent, whatever fails; fetched once, by one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwen2vl.errors import ConfigError, InputError
from qwen2vl.fetch import (
    DatasetNotFoundError,
    FetchError,
    dataset_folder,
    datasets_root,
    fetch_dataset,
    is_fetched,
)
from tests.fetch.archives import Registry, changed, make_dataset, package_data
from tests.fetch.test_clients import wait_for

CONTENTS = {"round": b"circle", "square": b"box!!"}
PYTHON = sys.executable  # a test replaces it


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_fetched_dataset_has_its_files_and_a_manifest(registry: Registry) -> None:
    dataset = registry.publish_dataset(CONTENTS)
    assert not is_fetched("shapes")
    folder = fetch_dataset("shapes")
    assert folder == dataset_folder("shapes") == datasets_root() / "shapes" / dataset.revision
    assert is_fetched("shapes")
    assert files_below(folder) == {"round/a.txt", "square/a.txt", "manifest.json"}
    assert (folder / "square" / "a.txt").read_bytes() == b"box!!"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["revision"] == dataset.revision
    assert [package["sha256"] for package in manifest["packages"]] == [
        package.sha256 for package in dataset.packages
    ]
    assert {path.name for path in folder.parent.iterdir()} == {".lock", dataset.revision}


def test_a_second_call_runs_no_client(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish_dataset(CONTENTS)
    folder = fetch_dataset("shapes")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch_dataset("shapes") == folder
    assert len(registry.calls) == 2


def test_an_absent_dataset_is_answered_with_the_command(registry: Registry, tmp_path: Path) -> None:
    registry.publish_dataset(CONTENTS)
    with pytest.raises(DatasetNotFoundError) as raised:
        dataset_folder("shapes")
    assert isinstance(raised.value, ConfigError)
    assert str(raised.value) == (
        f"the dataset shapes is not in {tmp_path}/datasets; run `qwen2vl fetch-data shapes` once "
        "(0.0 MB, by npm)"
    )
    with pytest.raises(DatasetNotFoundError, match="`qwen2vl fetch-data shapes --to there`"):
        dataset_folder("shapes", root="there")
    with pytest.raises(InputError, match="no dataset is called 'sounds'; known: shapes"):
        dataset_folder("sounds")
    assert not (tmp_path / "datasets").exists()


def test_a_dataset_of_other_pins_is_absent(registry: Registry) -> None:
    dataset = registry.publish_dataset(CONTENTS)
    old = fetch_dataset("shapes")
    registry.enter(make_dataset(*dataset.packages[:1]))
    assert not is_fetched("shapes")
    assert fetch_dataset("shapes") != old
    assert (old / "square" / "a.txt").exists()


def test_the_root_is_the_argument_or_the_variable_or_the_cache(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish_dataset(CONTENTS)
    assert fetch_dataset("shapes", root=tmp_path / "mine").parent == tmp_path / "mine" / "shapes"
    assert dataset_folder("shapes", root=tmp_path / "mine").is_dir()
    assert datasets_root() == tmp_path / "datasets"
    monkeypatch.delenv("QWEN2VL_DATASETS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert datasets_root() == tmp_path / "cache" / "qwen2vl" / "datasets"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert datasets_root() == tmp_path / "home" / ".cache" / "qwen2vl" / "datasets"


def test_a_failure_of_the_last_package_leaves_nothing(registry: Registry) -> None:
    dataset = registry.publish_dataset(CONTENTS)
    registry.publish(dataset.packages[1], b"another file")
    with pytest.raises(FetchError, match=r"square-1.0.*deleted and not unpacked"):
        fetch_dataset("shapes")
    assert files_below(datasets_root()) == {"shapes/.lock"}
    registry.publish(dataset.packages[1], package_data("npm", CONTENTS["square"]))
    assert fetch_dataset("shapes").is_dir()


def test_a_package_without_the_pinned_files_leaves_nothing(registry: Registry) -> None:
    dataset = registry.publish_dataset(CONTENTS)
    wrong = changed(dataset.packages[1], files={"elsewhere/": "elsewhere/"})
    registry.enter(make_dataset(dataset.packages[0], wrong))
    with pytest.raises(FetchError, match="has no elsewhere/"):
        fetch_dataset("shapes")
    assert files_below(datasets_root()) == {"shapes/.lock"}


def test_a_package_of_more_bytes_than_pinned_leaves_nothing(registry: Registry) -> None:
    dataset = registry.publish_dataset(CONTENTS)
    registry.enter(make_dataset(changed(dataset.packages[0], unpacked_bytes=5)))
    with pytest.raises(FetchError, match="more bytes than are pinned"):
        fetch_dataset("shapes")
    assert files_below(datasets_root()) == {"shapes/.lock"}


def test_a_process_that_is_killed_leaves_no_dataset(registry: Registry, tmp_path: Path) -> None:
    dataset = registry.publish_dataset(CONTENTS)
    client = (registry.programs / "npm").read_text()
    hang = f'case "$*" in *square*) echo $$ >{tmp_path}/client; exec sleep 60;; esac\n'
    registry.set_client("npm", client.replace("#!/bin/sh\n", f"#!/bin/sh\n{hang}"))
    code = (
        "from qwen2vl.fetch import catalog, fetch_dataset\n"
        "from tests.fetch.archives import make_dataset, make_package\n"
        f"packages = [make_package('npm', *item) for item in {CONTENTS}.items()]\n"
        "catalog.load_catalog = lambda: {'shapes': make_dataset(*packages)}\n"
        "fetch_dataset('shapes')"
    )
    with subprocess.Popen([PYTHON, "-c", code], cwd=Path(__file__).parents[2]) as process:
        pid = int(wait_for(tmp_path / "client"))
        process.kill()
    os.kill(pid, signal.SIGKILL)
    assert any("round" in name for name in files_below(datasets_root())), "killed in the middle"
    assert not is_fetched("shapes")
    registry.set_client("npm", client)
    folder = fetch_dataset("shapes")
    assert files_below(folder) == {"round/a.txt", "square/a.txt", "manifest.json"}
    assert {path.name for path in folder.parent.iterdir()} == {".lock", dataset.revision}


def test_several_processes_fetch_a_dataset_once(registry: Registry) -> None:
    registry.publish_dataset(CONTENTS)
    with ThreadPoolExecutor(8) as pool:  # a lock of each thread's own file, as of processes
        folders = list(pool.map(lambda _: fetch_dataset("shapes"), range(8)))
    assert len(set(folders)) == 1
    assert len(registry.calls) == 2


def test_package_files_that_are_there_are_not_downloaded(
    registry: Registry, tmp_path: Path
) -> None:
    dataset = registry.publish_dataset(CONTENTS)
    given = tmp_path / "given"
    given.mkdir()
    path = given / dataset.packages[1].file
    path.write_bytes(package_data("npm", CONTENTS["square"]))
    folder = fetch_dataset("shapes", packages_from=given)
    assert (folder / "square" / "a.txt").read_bytes() == CONTENTS["square"]
    assert len(registry.calls) == 1
    assert path.exists()


def test_package_files_that_are_there_are_verified(registry: Registry, tmp_path: Path) -> None:
    dataset = registry.publish_dataset(CONTENTS)
    path = tmp_path / dataset.packages[0].file
    path.write_bytes(b"another file")
    with pytest.raises(FetchError, match=f"^{tmp_path}: round-1.0.*: 12 bytes with SHA-256"):
        fetch_dataset("shapes", packages_from=tmp_path)
    assert path.exists(), "a file of the user is not deleted"
    assert not is_fetched("shapes")


def test_a_folder_that_cannot_be_written_is_named(registry: Registry, tmp_path: Path) -> None:
    registry.publish_dataset(CONTENTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match=r"file/shapes/.* cannot be written: .*choose another"):
        fetch_dataset("shapes", root=tmp_path / "file")


def test_progress_counts_packages(registry: Registry) -> None:
    registry.publish_dataset(CONTENTS)
    reports: list[tuple[str, int, int]] = []
    fetch_dataset("shapes", on_progress=lambda *report: reports.append(report))
    assert reports == [("round 1.0, 0.0 MB", 0, 2), ("square 1.0, 0.0 MB", 1, 2), ("shapes", 2, 2)]
