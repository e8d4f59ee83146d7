"""The cache of drawn icons on disk: shared, and only slow where it cannot be used."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from qwen2vl.synth.compositing import icon_cache
from qwen2vl.synth.compositing.icon_cache import IconCache

PIXELS = bytes(range(256)) * 16


def test_what_one_cache_stores_another_one_loads(tmp_path: Path) -> None:
    first, second = IconCache(tmp_path / "a.sqlite"), IconCache(tmp_path / "a.sqlite")
    assert second.load("noto/cat") is None
    first.store("noto/cat", PIXELS)
    assert second.load("noto/cat") == PIXELS
    second.store("noto/cat", PIXELS[:256])
    assert IconCache(tmp_path / "a.sqlite").load("noto/cat") == PIXELS[:256]
    assert first.load("noto/dog") is None


def test_a_forked_process_opens_a_connection_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(
        icon_cache, "_open", lambda path: opened.append(path) or sqlite3.connect(":memory:")
    )
    cache = IconCache(tmp_path / "a.sqlite")
    cache.load("noto/cat")
    cache.load("noto/dog")
    assert len(opened) == 1
    monkeypatch.setattr("os.getpid", lambda: -1)
    cache.load("noto/cat")
    assert len(opened) == 2


def test_without_a_writable_file_pixels_are_kept_in_memory(tmp_path: Path) -> None:
    cache = IconCache(tmp_path / "absent" / "a.sqlite")
    assert cache.load("noto/cat") is None
    cache.store("noto/cat", PIXELS)
    assert cache.load("noto/cat") == PIXELS


@pytest.mark.parametrize("content", [b"no database at all" * 100, b""])
def test_a_damaged_file_does_no_harm(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.sqlite"
    path.write_bytes(content)
    cache = IconCache(path)
    assert cache.load("noto/cat") is None
    cache.store("noto/cat", PIXELS)
    assert cache.load("noto/cat") == PIXELS


def test_damaged_pixels_are_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    IconCache(path).store("noto/cat", PIXELS)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE icons SET pixels = ?", (b"\x78\x9cbroken",))
    connection.close()
    assert IconCache(path).load("noto/cat") is None


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icon_cache, "_MAX_RECENT", 3)
    cache = IconCache(tmp_path / "a.sqlite")
    for number in range(7):
        cache.store(f"noto/{number}", PIXELS)
        assert len(cache._recent) <= 3
    assert all(cache.load(f"noto/{number}") == PIXELS for number in range(7))
