"""Frame cache: identical items, bounded size, atomic writes, sharing between processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from qwen2vl.data import frame_cache
from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.data.formats import Conversation
from qwen2vl.data.frame_cache import FrameCache
from qwen2vl.data.preprocess import SamplePreprocessor
from qwen2vl.errors import InputError
from qwen2vl.processor.inputs import Item
from tests.media import encoded_video, video
from tests.parallel.process_pool import FORKSERVER
from tests.tiny import tiny_processor

DATA = DataConfig(sources=(SourceConfig(path="x"),))


def counting_decode(data: bytes, calls: list[int]) -> Callable[[], Item]:
    def decode() -> Item:
        calls.append(1)
        return video(data)

    return decode


def must_not_be_called() -> Item:
    raise AssertionError("it should have been cached")


def assert_same(one: Item, two: Item) -> None:
    assert torch.equal(one.patches_NP, two.patches_NP)
    for field in fields(Item):
        if field.name != "patches_NP":
            assert getattr(one, field.name) == getattr(two, field.name), field.name


def test_the_key_is_of_the_content_not_the_path(tmp_path: Path) -> None:
    data = encoded_video(8)
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(data)
    calls: list[int] = []
    cache = FrameCache(tmp_path / "c", max_bytes=1 << 30)
    first = cache.get_or_decode(tmp_path / "a.mp4", "sampling", counting_decode(data, calls))
    assert_same(first, cache.get_or_decode(tmp_path / "b.mp4", "sampling", must_not_be_called))
    assert_same(
        first,
        FrameCache(tmp_path / "c", max_bytes=1).get_or_decode(data, "sampling", must_not_be_called),
    )
    cache.get_or_decode(data, "another sampling", counting_decode(data, calls))
    (tmp_path / "a.mp4").write_bytes(encoded_video(9))
    cache.get_or_decode(tmp_path / "a.mp4", "sampling", counting_decode(data, calls))
    assert len(calls) == 3


def test_the_key_covers_all_settings_of_the_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(encoded_video(8))

    def grids(**options: int) -> list:
        item = {"type": "video", "video": "a.mp4", **options}
        messages = [{"role": "user", "content": [item]}, {"role": "assistant", "content": "x"}]
        cache = FrameCache(tmp_path / "c", max_bytes=1 << 30)
        preparer = SamplePreprocessor(
            tiny_processor(), DATA, media_root=str(tmp_path), frame_cache=cache
        )
        uncached = SamplePreprocessor(tiny_processor(), DATA, media_root=str(tmp_path))
        first, second = (preparer.prepare(Conversation("x", messages)) for _ in range(2))
        for other in (second, uncached.prepare(Conversation("x", messages))):
            assert_same(first.items[0], other.items[0])
        return first.grids

    small = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 2}
    assert grids() != grids(nframes=2) != grids(nframes=2, **small)


def test_least_recently_used_entries_are_evicted(tmp_path: Path) -> None:
    one = video(encoded_video(4)).patches_NP.nbytes
    cache = FrameCache(tmp_path, max_bytes=int(3.5 * one))
    clips = [encoded_video(4, width=64, height=48, rate=10 + i) for i in range(5)]
    for i in range(3):
        cache.get_or_decode(clips[i], "s", counting_decode(clips[i], []))
    for path in tmp_path.glob("*/*.safetensors"):
        os.utime(path, (1, 1))
    cache.get_or_decode(clips[0], "s", must_not_be_called)  # used again
    calls: list[int] = []
    for i in (3, 4):
        cache.get_or_decode(clips[i], "s", counting_decode(clips[i], []))
        num_bytes = sum(p.stat().st_size for p in tmp_path.glob("*/*"))
        assert num_bytes <= cache.max_bytes
    cache.get_or_decode(clips[0], "s", must_not_be_called)
    cache.get_or_decode(clips[1], "s", counting_decode(clips[1], calls))
    assert calls == [1]


@pytest.mark.parametrize("damage", [b"", b"rubbish", bytes(400)])
def test_a_damaged_entry_is_decoded_again(tmp_path: Path, damage: bytes) -> None:
    data, calls = encoded_video(4), []
    cache = FrameCache(tmp_path, max_bytes=1 << 30)
    first = cache.get_or_decode(data, "s", counting_decode(data, calls))
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(damage)
    assert_same(first, cache.get_or_decode(data, "s", counting_decode(data, calls)))
    assert_same(first, cache.get_or_decode(data, "s", must_not_be_called))
    assert len(calls) == 2


@pytest.mark.parametrize("place", [300, -1])
def test_a_flipped_byte_is_detected(tmp_path: Path, place: int) -> None:
    data, calls = encoded_video(4), []
    cache = FrameCache(tmp_path, max_bytes=1 << 30)
    first = cache.get_or_decode(data, "s", counting_decode(data, calls))
    (path,) = tmp_path.glob("*/*.safetensors")
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    assert_same(first, cache.get_or_decode(data, "s", counting_decode(data, calls)))
    assert_same(first, cache.get_or_decode(data, "s", must_not_be_called))
    assert len(calls) == 2


def test_an_interrupted_write_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded_video(4)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        FrameCache(tmp_path, max_bytes=1 << 30).get_or_decode(data, "s", counting_decode(data, []))
    assert not list(tmp_path.glob("*/*"))


def test_a_full_disk_logs_one_warning_and_returns_the_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def raise_disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frame_cache, "save_file", raise_disk_full)
    cache = FrameCache(tmp_path, max_bytes=1 << 30)
    for _ in range(2):
        assert cache.get_or_decode(
            encoded_video(4), "s", counting_decode(encoded_video(4), [])
        ).num_tokens
    assert caplog.text.count("cannot cache decoded videos") == 1


def test_decoding_errors_are_not_cached(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, max_bytes=1 << 30)
    with pytest.raises(InputError):
        cache.get_or_decode(b"not a video", "s", counting_decode(b"not a video", []))
    assert not list(tmp_path.glob("*/*"))


def _use_cache_in_process(folder: Path, data: bytes) -> None:
    for _ in range(3):
        FrameCache(folder, max_bytes=1).get_or_decode(
            data, "s", lambda: video(data)
        )  # evicts after every write


def test_processes_may_share_a_folder(tmp_path: Path) -> None:
    # A fork of a process with threads may hang; one of a server without any does not.
    workers = [
        FORKSERVER.Process(target=_use_cache_in_process, args=(tmp_path, encoded_video(4)))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(180)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert not list(tmp_path.glob("*/.*"))
