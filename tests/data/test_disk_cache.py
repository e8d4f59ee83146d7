"""What is kept on disk: made once, mended, never half there, and bounded; see also test_plan."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen2vl.data.disk_cache import STALE, Arrays, keep, trim, used


def ones() -> Arrays:
    return {"x": np.ones(3)}


def never() -> Arrays:
    pytest.fail("it was there")


def aged(path: Path, seconds: float, size: int = 10) -> Path:
    """Make a file that was used so many seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_what_was_made_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.npz"
    assert keep(path, ones)["x"].tolist() == [1, 1, 1]
    assert keep(path, never)["x"].tolist() == [1, 1, 1]
    assert [p.name for p in path.parent.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut short"])
def test_what_is_damaged_is_made_again(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(damage)
    assert keep(path, ones)["x"].tolist() == [1, 1, 1]
    assert keep(path, never)["x"].tolist() == [1, 1, 1]


def test_what_can_be_better_is_made_better(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"

    def mender(found: Arrays) -> Callable[[], Arrays] | None:
        return None if found["x"][0] == 2 else lambda: {"x": found["x"] * 2}

    keep(path, ones)
    assert keep(path, never, mender=mender)["x"].tolist() == [2, 2, 2]
    assert keep(path, never, mender=mender)["x"].tolist() == [2, 2, 2]


def test_what_fails_leaves_nothing_and_is_raised(tmp_path: Path) -> None:
    def fail() -> Arrays:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        keep(tmp_path / "x.npz", fail)
    assert not list(tmp_path.glob("*.npz"))


def test_reading_is_using(tmp_path: Path) -> None:
    path = aged(tmp_path / "text", 5000)
    assert used(path)
    assert time.time() - path.stat().st_mtime < 1000
    assert not used(tmp_path / "none")


def test_the_longest_unused_leave_until_the_rest_fits(tmp_path: Path) -> None:
    ages = {"a/old": 300, "b/older": 400, "new": 100, "b/newer": 50}
    paths = {name: aged(tmp_path / name, age) for name, age in ages.items()}
    trim(tmp_path, 40)
    assert all(path.exists() for path in paths.values())
    trim(tmp_path, 25)
    assert [name for name, path in paths.items() if path.exists()] == ["new", "b/newer"]
    trim(tmp_path / "none", 0)


def test_what_is_in_use_is_spared_above_the_limit(tmp_path: Path) -> None:
    old, young = aged(tmp_path / "old", 300), aged(tmp_path / "young", 100)
    trim(tmp_path, 0, idle=200)
    assert (old.exists(), young.exists()) == (False, True)


def test_what_dead_writers_left_is_swept(tmp_path: Path) -> None:
    names = (".x.partial.npz", "ab/.key.123.partial", ".rows.jsonl.77.partial")
    dead = [aged(tmp_path / name, 2 * STALE) for name in names]
    alive = aged(tmp_path / ".y.partial.npz", STALE / 2)
    whole = aged(tmp_path / "partial.npz", 2 * STALE)
    trim(tmp_path, 10**9)
    assert not any(path.exists() for path in dead)
    assert alive.exists() and whole.exists()


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS])
def test_what_cannot_be_deleted_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    dead = aged(tmp_path / ".x.partial.npz", 2 * STALE)
    old, young = aged(tmp_path / "old", 300), aged(tmp_path / "young", 100)
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path != young:
            raise OSError(reason, os.strerror(reason))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    trim(tmp_path, 10)
    assert [path.exists() for path in (dead, old, young)] == [True, True, False]


def test_others_use_and_delete_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oldest, needed, gone, last, new = (
        aged(tmp_path / f"{age}", age) for age in (500, 400, 300, 200, 100)
    )
    unlink = Path.unlink

    def meanwhile(path: Path, missing_ok: bool = False) -> None:
        if path == oldest:
            assert used(needed)
            unlink(gone)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", meanwhile)
    trim(tmp_path, 20)
    assert [path.exists() for path in (oldest, needed, gone, last, new)] == [
        *(False, True, False, False, True)
    ]
