"""The frame cache: the same item, bounded, atomic, shared, and never stale."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from qwen2vl.data import frame_cache
from qwen2vl.data.config import DataConfig, Source
from qwen2vl.data.formats import Conversation
from qwen2vl.data.frame_cache import FrameCache
from qwen2vl.data.preprocess import Preparer
from qwen2vl.errors import InputError
from qwen2vl.processor.inputs import Item
from tests.media import clip, video
from tests.parallel.gang import FORKS
from tests.tiny import tiny_processor

DATA = DataConfig(sources=(Source(path="x"),))


def counted(data: bytes, calls: list[int]) -> Callable[[], Item]:
    def make() -> Item:
        calls.append(1)
        return video(data)

    return make


def never() -> Item:
    raise AssertionError("it should have been kept")


def assert_same(one: Item, two: Item) -> None:
    assert torch.equal(one.patches_NP, two.patches_NP)
    for field in fields(Item):
        if field.name != "patches_NP":
            assert getattr(one, field.name) == getattr(two, field.name), field.name


def test_a_video_is_decoded_once_whatever_its_name(tmp_path: Path) -> None:
    data = clip(8)
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(data)
    calls: list[int] = []
    cache = FrameCache(tmp_path / "c", limit=1 << 30)
    first = cache.item(tmp_path / "a.mp4", "sampling", counted(data, calls))
    assert_same(first, cache.item(tmp_path / "b.mp4", "sampling", never))
    assert_same(first, FrameCache(tmp_path / "c", limit=1).item(data, "sampling", never))
    cache.item(data, "another sampling", counted(data, calls))
    (tmp_path / "a.mp4").write_bytes(clip(9))
    cache.item(tmp_path / "a.mp4", "sampling", counted(data, calls))
    assert len(calls) == 3


def test_all_that_decides_the_pixels_is_in_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(clip(8))

    def grids(**options: int) -> list:
        item = {"type": "video", "video": "a.mp4", **options}
        asked = [{"role": "user", "content": [item]}, {"role": "assistant", "content": "x"}]
        cache = FrameCache(tmp_path / "c", limit=1 << 30)
        preparer = Preparer(tiny_processor(), DATA, base=str(tmp_path), frames=cache)
        plain = Preparer(tiny_processor(), DATA, base=str(tmp_path))
        made, again = (preparer.prepare(Conversation("x", asked)) for _ in range(2))
        for other in (again, plain.prepare(Conversation("x", asked))):
            assert_same(made.items[0], other.items[0])
        return made.grids

    small = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 2}
    assert grids() != grids(nframes=2) != grids(nframes=2, **small)


def test_the_least_recently_used_leave(tmp_path: Path) -> None:
    one = video(clip(4)).patches_NP.nbytes
    cache = FrameCache(tmp_path, limit=int(3.5 * one))
    clips = [clip(4, width=64, height=48, rate=10 + i) for i in range(5)]
    for i in range(3):
        cache.item(clips[i], "s", counted(clips[i], []))
    for path in tmp_path.glob("*/*.safetensors"):
        os.utime(path, (1, 1))
    cache.item(clips[0], "s", never)  # used again
    calls: list[int] = []
    for i in (3, 4):
        cache.item(clips[i], "s", counted(clips[i], []))
        held = sum(p.stat().st_size for p in tmp_path.glob("*/*"))
        assert held <= cache.limit
    cache.item(clips[0], "s", never)
    cache.item(clips[1], "s", counted(clips[1], calls))
    assert calls == [1]


@pytest.mark.parametrize("damage", [b"", b"rubbish", bytes(400)])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: bytes) -> None:
    data, calls = clip(4), []
    cache = FrameCache(tmp_path, limit=1 << 30)
    whole = cache.item(data, "s", counted(data, calls))
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(damage)
    assert_same(whole, cache.item(data, "s", counted(data, calls)))
    assert_same(whole, cache.item(data, "s", never))
    assert len(calls) == 2


@pytest.mark.parametrize("place", [300, -1])
def test_one_flipped_byte_is_damage(tmp_path: Path, place: int) -> None:
    data, calls = clip(4), []
    cache = FrameCache(tmp_path, limit=1 << 30)
    whole = cache.item(data, "s", counted(data, calls))
    (path,) = tmp_path.glob("*/*.safetensors")
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    assert_same(whole, cache.item(data, "s", counted(data, calls)))
    assert_same(whole, cache.item(data, "s", never))
    assert len(calls) == 2


def test_a_write_that_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = clip(4)
    monkeypatch.setattr(
        frame_cache.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        FrameCache(tmp_path, limit=1 << 30).item(data, "s", counted(data, []))
    assert not list(tmp_path.glob("*/*"))


def test_a_full_disk_costs_a_warning_and_no_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frame_cache, "save_file", full)
    cache = FrameCache(tmp_path, limit=1 << 30)
    for _ in range(2):
        assert cache.item(clip(4), "s", counted(clip(4), [])).num_tokens
    assert caplog.text.count("decoded videos cannot be kept") == 1


def test_what_cannot_be_decoded_is_not_kept(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, limit=1 << 30)
    with pytest.raises(InputError):
        cache.item(b"not a video", "s", counted(b"not a video", []))
    assert not list(tmp_path.glob("*/*"))


def _many(folder: Path, data: bytes) -> None:
    for _ in range(3):
        FrameCache(folder, limit=1).item(data, "s", lambda: video(data))  # evicts at once


def test_processes_may_share_a_folder(tmp_path: Path) -> None:
    # A fork of a process with threads may hang; one of a server without any does not.
    workers = [FORKS.Process(target=_many, args=(tmp_path, clip(4))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(180)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert not list(tmp_path.glob("*/.*"))
