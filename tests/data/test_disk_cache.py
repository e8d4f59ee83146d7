"""Disk cache: creation, refresh, atomic writes, eviction; see also test_bin_planner.py."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen2vl.data.disk_cache import STALE_SECONDS, Arrays, evict_lru, load_or_create, touch


def ones() -> Arrays:
    return {"x": np.ones(3)}


def must_not_be_called() -> Arrays:
    pytest.fail("the cached file was not used")


def create_aged_file(path: Path, seconds: float, size: int = 10) -> Path:
    """Create a file that was last used so many seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - seconds,) * 2)
    return path


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


def test_touch_updates_the_modification_time(tmp_path: Path) -> None:
    path = create_aged_file(tmp_path / "text", 5000)
    assert touch(path)
    assert time.time() - path.stat().st_mtime < 1000
    assert not touch(tmp_path / "none")


def test_least_recently_used_files_are_evicted(tmp_path: Path) -> None:
    ages = {"a/old": 300, "b/older": 400, "new": 100, "b/newer": 50}
    paths = {name: create_aged_file(tmp_path / name, age) for name, age in ages.items()}
    evict_lru(tmp_path, 40)
    assert all(path.exists() for path in paths.values())
    evict_lru(tmp_path, 25)
    assert [name for name, path in paths.items() if path.exists()] == ["new", "b/newer"]
    evict_lru(tmp_path / "none", 0)


def test_recently_used_files_are_not_evicted(tmp_path: Path) -> None:
    old, young = create_aged_file(tmp_path / "old", 300), create_aged_file(tmp_path / "young", 100)
    evict_lru(tmp_path, 0, min_idle_seconds=200)
    assert (old.exists(), young.exists()) == (False, True)


def test_stale_partial_files_are_deleted(tmp_path: Path) -> None:
    names = (".x.partial.npz", "ab/.key.123.partial", ".rows.jsonl.77.partial")
    stale = [create_aged_file(tmp_path / name, 2 * STALE_SECONDS) for name in names]
    recent = create_aged_file(tmp_path / ".y.partial.npz", STALE_SECONDS / 2)
    complete = create_aged_file(tmp_path / "partial.npz", 2 * STALE_SECONDS)
    evict_lru(tmp_path, 10**9)
    assert not any(path.exists() for path in stale)
    assert recent.exists() and complete.exists()


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS])
def test_files_that_cannot_be_deleted_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    stale = create_aged_file(tmp_path / ".x.partial.npz", 2 * STALE_SECONDS)
    old, young = create_aged_file(tmp_path / "old", 300), create_aged_file(tmp_path / "young", 100)
    unlink = Path.unlink

    def failing_unlink(path: Path, missing_ok: bool = False) -> None:
        if path != young:
            raise OSError(reason, os.strerror(reason))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", failing_unlink)
    evict_lru(tmp_path, 10)
    assert [path.exists() for path in (stale, old, young)] == [True, True, False]


def test_eviction_with_concurrent_use_and_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oldest, needed, gone, last, new = (
        create_aged_file(tmp_path / f"{age}", age) for age in (500, 400, 300, 200, 100)
    )
    unlink = Path.unlink

    def unlink_with_concurrent_access(path: Path, missing_ok: bool = False) -> None:
        if path == oldest:
            assert touch(needed)
            unlink(gone)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_with_concurrent_access)
    evict_lru(tmp_path, 20)
    assert [path.exists() for path in (oldest, needed, gone, last, new)] == [
        *(False, True, False, False, True)
    ]
