"""Wire protocol: messages of any size arrive whole; ends, deadlines and garbage are reported."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.media.video_metadata import VideoMetadata
from qwen2vl.processor.media_worker.protocol import (
    Channel,
    ChannelClosedError,
    ProtocolError,
    metadata_message,
    read_metadata,
)


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    ends = tuple(Channel(end) for end in socket.socketpair())
    yield ends[0], ends[1]
    for end in ends:
        end.close()


@pytest.mark.parametrize("size", [0, 1, 1000, 5_000_000])
def test_messages_arrive_whole(channels: tuple[Channel, Channel], size: int) -> None:
    payload = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    sender = threading.Thread(target=channels[0].send, args=({"name": "ä" * 900}, payload))
    sender.start()
    assert channels[1].receive() == ({"name": "ä" * 900}, size)
    assert channels[1].receive_bytes(size) == payload.tobytes()
    sender.join()


def test_closed_channels(channels: tuple[Channel, Channel]) -> None:
    assert not channels[1].has_ended()
    channels[0].send({})
    assert channels[1].has_ended()  # what it sent was not asked for
    channels[1].receive()
    channels[0].close()
    assert channels[1].has_ended()
    with pytest.raises(ChannelClosedError):
        channels[1].receive()
    with pytest.raises(ChannelClosedError):
        channels[1].send({}, bytes(5_000_000))


def test_deadlines(channels: tuple[Channel, Channel]) -> None:
    channels[0].deadline = time.monotonic() + 0.05
    with pytest.raises(TimeoutError):
        channels[0].receive()
    channels[0].deadline = time.monotonic() + 0.05
    with pytest.raises(TimeoutError):
        channels[0].send({}, bytes(50_000_000))
    with pytest.raises(TimeoutError):
        channels[0].send({})


@pytest.mark.parametrize("header", [b"[1]", b"{", b"[" * 60_000, b'"x"', b"\xff"])
def test_invalid_headers(channels: tuple[Channel, Channel], header: bytes) -> None:
    channels[0]._socket.sendall(len(header).to_bytes(4, "little") + bytes(8) + header)
    with pytest.raises(ProtocolError):
        channels[1].receive()


@pytest.mark.parametrize(
    ("timestamps", "is_valid"),
    [
        ((0.0, 0.5, 0.5), True),
        ((0.0, 0.5, 0.4), False),
        ((-1.0, 0.5), False),
        ((0.0, float("inf")), False),
        ((0.0, float("nan"), 1.0), False),
        ((), False),
        ((0.0,) * 11, False),
    ],
)
def test_metadata(
    channels: tuple[Channel, Channel], timestamps: tuple[float, ...], is_valid: bool
) -> None:
    metadata = VideoMetadata(
        timestamps=timestamps, fps=None, duration=1.5, height=4, width=6, notes=("a note",)
    )
    channels[0].send(*metadata_message(metadata))
    header, size = channels[1].receive()
    limits = MediaLimits(max_frames=10)
    if is_valid:
        assert read_metadata(channels[1], header["metadata"], size, limits) == metadata
    else:
        with pytest.raises(ProtocolError):
            read_metadata(channels[1], header["metadata"], size, limits)
