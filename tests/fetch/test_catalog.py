"""The table of packages: complete, consistent, and in NOTICE by license and use."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path, PurePosixPath

import pytest

from qwen2vl.errors import InputError
from qwen2vl.fetch import Package, find_dataset, load_catalog
from qwen2vl.fetch.catalog import PERMISSIVE_LICENSES
from tests.fetch.archives import SUFFIXES, changed, make_dataset, make_package

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [package for dataset in load_catalog().values() for package in dataset.packages]
every_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)


@every_package
def test_pins_are_complete(package: Package) -> None:
    assert re.fullmatch("[0-9a-f]{64}", package.sha256)
    assert package.file.endswith(SUFFIXES[package.client])
    version = package.version.replace(":", "%3a")
    assert version in package.file
    assert 0 < package.num_bytes < 10**8
    assert 0 < package.unpacked_bytes < 10**9
    assert package.use in ("train", "test")


@every_package
def test_only_permissive_licenses_enter_training(package: Package) -> None:
    if package.use == "train":
        assert package.license in PERMISSIVE_LICENSES


@every_package
def test_no_path_leads_out_of_the_folder(package: Package) -> None:
    for source, target in package.files.items():
        assert source.endswith("/") == (target.endswith("/") or not target)
        for path in (source, target):
            assert not path.startswith("/") and ".." not in PurePosixPath(path).parts


def test_each_file_and_target_is_there_once() -> None:
    for dataset in load_catalog().values():
        targets = Counter(t for package in dataset.packages for t in package.files.values())
        assert max(targets.values()) == 1, dataset.name
    assert max(Counter(package.file for package in PACKAGES).values()) == 1


def test_no_host_is_named() -> None:
    for path in (ROOT / "qwen2vl" / "fetch").iterdir():
        if path.is_file():
            assert "://" not in path.read_text(encoding="utf-8").replace("(?<=://)", "")


@every_package
def test_the_notice_has_the_attribution(package: Package) -> None:
    """In the section of its use, below its license."""
    text = (ROOT / "NOTICE").read_text(encoding="utf-8")
    parts = {"train": "permitted in training", "test": "for tests only"}
    section = text.partition(parts[package.use])[2].partition("Not part of this distribution")[0]
    lines = section.splitlines()
    end = lines.index(f"  {package.attribution} ({package.name} {package.version})")
    assert [line for line in lines[:end] if line and line[0] != " "][-1] == package.license


def test_a_dataset_sums_up_its_packages() -> None:
    one = changed(make_package("npm", "one"), num_bytes=3, license="MIT")
    two = changed(make_package("pip", "two"), num_bytes=4, license="OFL-1.1", use="test")
    dataset = make_dataset(one, two, changed(two, name="three", unpacked_bytes=90))
    assert dataset.num_bytes == 11
    assert dataset.unpacked_bytes == 100
    assert dataset.licenses == ["OFL-1.1", "MIT"]
    assert dataset.clients == ["npm", "pip"]
    assert dataset.uses == ["train", "test"]


def test_another_file_or_another_selection_is_another_revision() -> None:
    package = make_package("npm")
    revisions = [
        make_dataset(package).revision,
        make_dataset(changed(package, sha256="0" * 64)).revision,
        make_dataset(changed(package, files={"in/a.txt": "a.txt"})).revision,
        make_dataset(package, package).revision,
    ]
    assert len(set(revisions)) == 4
    described = changed(package, attribution="Somebody else", license="OFL-1.1")
    assert make_dataset(described).revision == revisions[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("easyvqa", "no dataset is called 'easyvqa'; did you mean easy-vqa?"),
        ("imagenet-21k-full", "known: easy-vqa, efficientnet-lite0, "),
        (None, "no dataset is called None; known: "),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(name: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        find_dataset(name)
