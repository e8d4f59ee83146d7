"""Files: atomic writes are all or nothing; eviction is LRU, bounded, safe with other processes."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl.files import (
    STALE_SECONDS,
    atomic_file,
    atomic_folder,
    evict_lru,
    partial_folder,
    touch,
)
from qwen2vl.files import atomic as files


@contextmanager
def empty_folder() -> Iterator[Path]:
    """Yield a new folder; hypothesis runs many examples with one tmp_path."""
    with TemporaryDirectory() as name:
        yield Path(name)


def create_aged_file(path: Path, seconds: float, size: int = 10) -> Path:
    """Create a file that was last used so many seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - seconds,) * 2)
    return path


# Atomic writes --------------------------------------------------------------------------------


class InterruptionError(Exception):
    """Raised in the middle of a write."""


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=64), st.booleans()), max_size=6))
def test_a_file_has_the_content_of_the_last_completed_write(
    writes: list[tuple[bytes, bool]],
) -> None:
    with empty_folder() as folder:
        path, expected = folder / "sub" / "x.bin", None
        for content, is_interrupted in writes:
            try:
                with atomic_file(path) as partial:
                    partial.write_bytes(content)
                    assert (path.read_bytes() if path.exists() else None) == expected
                    if is_interrupted:
                        raise InterruptionError
            except InterruptionError:
                pass
            else:
                expected = content
            assert (path.read_bytes() if path.exists() else None) == expected
            assert [p.name for p in path.parent.iterdir()] == ["x.bin"] * (expected is not None)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from("abc"), st.binary(max_size=8), max_size=3),
            st.booleans(),
        ),
        max_size=4,
    ),
    st.booleans(),
    st.booleans(),
)
def test_a_folder_has_all_files_of_a_completed_write_or_is_absent(
    writes: list[tuple[dict[str, bytes], bool]], fsync: bool, has_leftover: bool
) -> None:
    with empty_folder() as parent:
        for number, (contents, is_interrupted) in enumerate(writes):
            path = parent / "runs" / str(number)
            if has_leftover:  # of a killed process
                partial_folder(path).mkdir(parents=True)
                (partial_folder(path) / "leftover").touch()
            try:
                with atomic_folder(path, fsync=fsync) as partial:
                    assert partial == partial_folder(path) and not list(partial.iterdir())
                    for name, content in contents.items():
                        (partial / name).write_bytes(content)
                    assert not path.exists()
                    if is_interrupted:
                        raise InterruptionError
            except InterruptionError:
                assert not path.exists()
            else:
                assert {p.name: p.read_bytes() for p in path.iterdir()} == contents
            assert not partial_folder(path).exists()


def test_an_empty_folder_is_replaced_and_another_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as partial:
        (partial / "x").touch()
    assert (tmp_path / "empty" / "x").exists()
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "empty"):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["empty", "x"]


@pytest.mark.parametrize(("fsync", "expected"), [(True, {"x", "y"}), (False, set())])
def test_files_of_a_folder_are_on_disk_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: bool, expected: set[str]
) -> None:
    flushed: set[str] = set()
    replace = os.replace

    def record_fsync(descriptor: int) -> None:
        flushed.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def check_flushed(source: Path, target: Path) -> None:
        assert flushed == expected
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", record_fsync)
    monkeypatch.setattr(files.os, "replace", check_flushed)
    with atomic_folder(tmp_path / "a", fsync=fsync) as partial:
        for name in ("x", "y"):
            (partial / name).write_text(name)
    assert (tmp_path / "a").is_dir()


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_an_oserror_is_passed_on_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def raise_disk_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, function, raise_disk_full)
    with (
        pytest.raises(OSError, match="No space left"),
        atomic_folder(tmp_path / "folder", fsync=True) as partial,
    ):
        (partial / "x").touch()
    if function == "replace":
        with pytest.raises(OSError, match="No space left"), atomic_file(tmp_path / "file"):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_ordinary_new_files(tmp_path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        with atomic_file(tmp_path / "file") as partial:
            partial.write_text("x")
        with atomic_file(tmp_path / "private", mode=0o600) as partial:
            partial.write_text("x")
            assert partial.stat().st_mode & 0o777 == 0o600  # already while it is written
        with atomic_folder(tmp_path / "folder") as partial:
            (partial / "x").touch()
    finally:
        os.umask(previous)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    assert modes == {
        "file": 0o666 & ~umask,
        "private": 0o600,
        "folder": 0o777 & ~umask,
        "x": 0o666 & ~umask,
    }


def test_concurrent_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "x"
    contents = [bytes([number]) * 20_000 for number in range(8)]

    def write(content: bytes) -> bytes:
        with atomic_file(path) as partial, partial.open("wb") as file:
            for start in range(0, len(content), 100):
                file.write(content[start : start + 100])
        return path.read_bytes()

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(write, contents * 4)) <= set(contents)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_killed_writer_leaves_a_partial_file_that_eviction_deletes(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from qwen2vl.files import atomic_file
with atomic_file(Path({str(tmp_path / "x")!r})) as partial:
    partial.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (leftover,) = tmp_path.iterdir()
    assert evict_lru(tmp_path, 0) == 4  # it may still be written
    os.utime(leftover, (time.time() - 2 * STALE_SECONDS,) * 2)
    assert evict_lru(tmp_path, 10**9) == 0
    assert not list(tmp_path.iterdir())


# Eviction -------------------------------------------------------------------------------------


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
    names = (".x.npz.0f.partial", "ab/.key.123.partial", ".rows.jsonl.77.partial")
    stale = [create_aged_file(tmp_path / name, 2 * STALE_SECONDS) for name in names]
    recent = create_aged_file(tmp_path / ".y.npz.0f.partial", STALE_SECONDS / 2)
    complete = create_aged_file(tmp_path / "partial.npz", 2 * STALE_SECONDS)
    evict_lru(tmp_path, 10**9)
    assert not any(path.exists() for path in stale)
    assert recent.exists() and complete.exists()


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS])
def test_files_that_cannot_be_deleted_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    stale = create_aged_file(tmp_path / ".x.npz.0f.partial", 2 * STALE_SECONDS)
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


FILES = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), max_size=12)


@settings(deadline=None)
@given(FILES, st.integers(-5, 150), st.none() | st.integers(-5, 150), st.integers(0, 60))
def test_what_remains_is_the_longest_most_recently_used_run_that_fits(
    sizes_and_ages: list[tuple[int, int]], max_bytes: int, target: int | None, idle: int
) -> None:
    """For any files; ages are in units of 100 seconds, and never within one of `idle`."""
    with empty_folder() as folder:
        paths = [
            create_aged_file(folder / "ab"[number % 2] / str(number), 100 * age + 50, size)
            for number, (size, age) in enumerate(sizes_and_ages)
        ]
        by_use = sorted(
            (path.stat().st_mtime_ns, size_and_age, path)
            for path, size_and_age in zip(paths, sizes_and_ages, strict=True)
        )
        total = sum(size for size, _ in sizes_and_ages)
        limit = max_bytes if target is None or total <= max_bytes else target
        expected = list(by_use)
        while expected and sum(size for _, (size, _), _ in expected) > limit:
            if 100 * expected[0][1][1] + 50 < 100 * idle:
                break
            expected.pop(0)
        remaining = evict_lru(folder, max_bytes, target_bytes=target, min_idle_seconds=100 * idle)
        assert {p for p in paths if p.exists()} == {path for *_, path in expected}
        assert remaining == sum(size for _, (size, _), _ in expected)


@settings(deadline=None)
@given(FILES, st.integers(0, 150))
def test_other_names_neither_count_nor_are_deleted(
    sizes_and_ages: list[tuple[int, int]], max_bytes: int
) -> None:
    with empty_folder() as folder:
        paths = [
            create_aged_file(folder / f"{number}.{'own' if number % 2 else 'other'}", age, size)
            for number, (size, age) in enumerate(sizes_and_ages)
        ]
        remaining = evict_lru(folder, max_bytes, names=re.compile(r"\d+\.own"))
        assert remaining == sum(p.stat().st_size for p in folder.glob("*.own")) <= max_bytes
        assert all(path.exists() for path in paths[::2])


def test_a_file_of_a_clock_in_advance_is_the_most_recently_used(tmp_path: Path) -> None:
    ahead, now = create_aged_file(tmp_path / "a", -5000), create_aged_file(tmp_path / "b", 0)
    evict_lru(tmp_path, 10)
    assert (ahead.exists(), now.exists()) == (True, False)
    evict_lru(tmp_path, 0, min_idle_seconds=1)
    assert ahead.exists()
    evict_lru(tmp_path, 0)
    assert not ahead.exists()


def test_errors_are_raised_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        evict_lru(tmp_path / "none", 0, ignore_errors=False)
    create_aged_file(tmp_path / "a", 100)

    def failing_unlink(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", failing_unlink)
    assert evict_lru(tmp_path, 0) == 10
    with pytest.raises(OSError, match="Read-only"):
        evict_lru(tmp_path, 0, ignore_errors=False)
