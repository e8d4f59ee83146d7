"""Frame pairs of long videos: decoded a few ahead, again where they are wanted again, ended."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Generator

import pytest
import torch
from torch import Tensor

from qwen2vl.errors import EngineError, InputError
from qwen2vl.processor.video import frame_pairs
from qwen2vl.processor.video.frame_pairs import DecodedPair, FramePairStream

PATCHES = 4
PAIR_BYTES = PATCHES * 1176


def patches_of(index: int) -> Tensor:
    return torch.full((PATCHES, 1176), index % 256, dtype=torch.uint8)


class Video:
    """A video of `num_pairs` pairs, which counts what is decoded and whether it is closed."""

    def __init__(self, num_pairs: int, fails_at: int | None = None) -> None:
        self.num_pairs, self.fails_at = num_pairs, fails_at
        self.error: Exception = InputError("clip.mp4 is damaged")
        self.decoded: list[int] = []
        self.num_open = 0

    def open_pairs(self, first: int) -> Generator[DecodedPair, None, None]:
        self.num_open += 1
        try:
            for index in range(first, self.num_pairs):
                if index == self.fails_at:
                    raise self.error
                self.decoded.append(index)
                yield DecodedPair(index.to_bytes(32), patches_of(index))
        finally:
            self.num_open -= 1

    def stream(self) -> FramePairStream:
        return FramePairStream(self.num_pairs, self.open_pairs)


def load(stream: FramePairStream, index: int) -> Tensor:
    while (patches := stream.patches(index)) is None:
        stream.prefetch(index)
        began = time.monotonic()
        stream.wait(index, 5.0)
        assert time.monotonic() - began < 4, "nothing has woken it"
    return patches


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def _few_buffered_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_pairs, "MAX_BUFFERED_BYTES", 3 * PAIR_BYTES)


def test_all_pairs_come_in_order_and_few_are_buffered() -> None:
    video = Video(40)
    stream = video.stream()
    assert stream.digest(0) is None and not video.decoded
    for index in range(40):
        assert torch.equal(load(stream, index), patches_of(index))
        assert stream.digest(index) == index.to_bytes(32)
        assert len(video.decoded) <= index + 4
    assert video.decoded == list(range(40))
    assert stream.digest(3) is not None and stream.patches(3) is None
    wait_until(lambda: video.num_open == 0)


def test_decoding_begins_again_where_a_pair_is_wanted_again() -> None:
    video = Video(40)
    stream = video.stream()
    for index in (0, 1, 30, 31, 5):
        assert torch.equal(load(stream, index), patches_of(index))
    assert len(video.decoded) < 20
    stream.close()
    wait_until(lambda: video.num_open == 0)
    assert torch.equal(load(stream, 39), patches_of(39))


def test_a_few_pairs_that_are_not_wanted_are_passed() -> None:
    video = Video(40)
    stream = video.stream()
    load(stream, 0)
    load(stream, 3 + frame_pairs.MAX_PASSED)
    assert video.decoded == sorted(set(video.decoded)), "decoded anew"


def test_two_consumers_far_apart_both_make_progress() -> None:
    video = Video(200)
    stream = video.stream()
    found: list[list[int]] = [[], []]

    def consume(number: int) -> None:
        for index in range(100 * number, 100 * number + 5):
            found[number].append(int(load(stream, index)[0, 0]))

    threads = [threading.Thread(target=consume, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [list(range(5)), list(range(100, 105))]


@pytest.mark.parametrize("error", [InputError("clip.mp4 is damaged"), EngineError("no decoder")])
def test_an_error_is_raised_where_the_pair_is_wanted(error: Exception) -> None:
    video = Video(10, fails_at=5)
    video.error = error
    stream = video.stream()
    for index in range(5):
        load(stream, index)
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)) as raised:
            load(stream, 5)
        assert raised.value is not error
    assert video.num_open == 0


def test_a_bug_is_reported_as_one() -> None:
    video = Video(10, fails_at=0)
    video.error = KeyError("x")
    with pytest.raises(EngineError, match=r"a bug of this library: KeyError: 'x'; report it"):
        load(video.stream(), 0)


def test_the_thread_ends_with_the_last_reference() -> None:
    video = Video(40)
    stream = video.stream()
    load(stream, 0)
    assert video.num_open == 1
    del stream
    gc.collect()
    wait_until(lambda: video.num_open == 0)
