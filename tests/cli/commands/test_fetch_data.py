"""`fetch-data`: lists, fetches and names the folder; errors are one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2vl.fetch import dataset_folder
from tests.cli.conftest import Run
from tests.fetch.archives import Registry, changed, make_dataset


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("QWEN2VL_DATASETS", str(tmp_path / "datasets"))
    return Registry(tmp_path, monkeypatch)


def test_without_a_name_the_datasets_are_listed(run: Run, registry: Registry) -> None:
    dataset = registry.publish_dataset({"round": b"circle", "square": b"box"})
    tested = changed(dataset.packages[1], license="GPL-2.0-only", use="test", num_bytes=7_000_000)
    registry.enter(make_dataset(dataset.packages[0], tested))
    result = run("fetch-data")
    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if "shapes" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["shapes", "shapes", "7.0 MB", "GPL-2.0-only, MIT", "train and test", "no"]
    assert "folder of all datasets: " in result.stderr
    assert not registry.calls


def test_every_dataset_is_in_the_list(run: Run) -> None:
    from qwen2vl.fetch import load_catalog

    result = run("fetch-data")
    for name, dataset in load_catalog().items():
        assert f"| {name} " in result.stdout
        assert dataset.licenses[0].split()[0] in result.stdout


def test_a_dataset_is_fetched_once(run: Run, registry: Registry) -> None:
    registry.publish_dataset({"round": b"circle"})
    result = run("fetch-data", "shapes")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{dataset_folder('shapes')}\n"
    assert "shapes: 0.0 MB in " in result.stderr and "license MIT" in result.stderr
    again = run("fetch-data", "shapes")
    assert (again.stdout, again.stderr) == (result.stdout, "")
    assert "| yes " in run("fetch-data").stdout
    assert "| no " in run("fetch-data", "--to", "elsewhere").stdout


def test_material_for_tests_only_is_said(run: Run, registry: Registry) -> None:
    dataset = registry.publish_dataset({"round": b"circle", "square": b"box"})
    packages = [changed(package, use="test") for package in dataset.packages]
    registry.enter(make_dataset(dataset.packages[0], packages[1]))
    assert "; for tests only: square\n" in run("fetch-data", "shapes", "--to", "a").stderr
    registry.enter(make_dataset(*packages))
    assert "for tests only, not for training" in run("fetch-data", "shapes", "--to", "b").stderr


def test_names_are_checked_before_anything_is_fetched(run: Run, registry: Registry) -> None:
    registry.publish_dataset({"round": b"circle"})
    result = run("fetch-data", "shapes", "shape")
    assert result.exit_code == 2
    assert result.stderr == ("qwen2vl: error: no dataset is called 'shape'; did you mean shapes?\n")
    assert not registry.calls


def test_a_failure_is_one_line(run: Run, registry: Registry) -> None:
    registry.publish_dataset({"round": b"circle"})
    registry.set_client("npm", "echo 'npm error no such host' >&2; exit 1")
    result = run("fetch-data", "shapes")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("qwen2vl: error: round 1.0: npm failed with exit code 1: no such host;")
    assert result.stdout == ""
