"""Disk cache: creation, refresh, damaged files; see also test_bin_planner.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen2vl.data.array_cache import Arrays, load_or_create


def ones() -> Arrays:
    return {"x": np.ones(3)}


def must_not_be_called() -> Arrays:
    pytest.fail("the cached file was not used")


def test_created_arrays_are_loaded_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.npz"
    assert load_or_create(path, ones)["x"].tolist() == [1, 1, 1]
    assert load_or_create(path, must_not_be_called)["x"].tolist() == [1, 1, 1]
    assert [p.name for p in path.parent.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut short"])
def test_a_damaged_file_is_created_again(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(damage)
    assert load_or_create(path, ones)["x"].tolist() == [1, 1, 1]
    assert load_or_create(path, must_not_be_called)["x"].tolist() == [1, 1, 1]


def test_refresh_replaces_cached_arrays(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"

    def refresh(cached: Arrays) -> Callable[[], Arrays] | None:
        return None if cached["x"][0] == 2 else lambda: {"x": cached["x"] * 2}

    load_or_create(path, ones)
    assert load_or_create(path, must_not_be_called, refresh=refresh)["x"].tolist() == [2, 2, 2]
    assert load_or_create(path, must_not_be_called, refresh=refresh)["x"].tolist() == [2, 2, 2]


def test_a_failing_create_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> Arrays:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        load_or_create(tmp_path / "x.npz", fail)
    assert not list(tmp_path.glob("*.npz"))
