"""Wire protocol between the pool and a media worker: length-framed JSON headers and raw bytes.

    <header length: u32> <payload length: u64> <header: JSON object> <payload: pixels, or a file>

No pickle: what a worker sends is untrusted. `Channel` bounds the length of a header and the time
of each call; the `read_` functions check the values of a reply against the limits before memory
is allocated for its payload.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.media.video_metadata import VideoMetadata

__all__ = [
    "Channel",
    "ChannelClosedError",
    "ProtocolError",
    "metadata_message",
    "read_metadata",
    "read_orientation",
    "read_size",
    "read_text",
    "read_texts",
]

_PREFIX = struct.Struct("<IQ")
_MAX_HEADER = 1 << 16  # bytes
_SOCKET_BUFFER = 1 << 20  # bytes; a frame of 1 megapixel is sent in three pieces
_MAX_TEXT, _MAX_TEXTS = 1000, 16


class ChannelClosedError(Exception):
    """The other end is gone."""


class ProtocolError(Exception):
    """The other end sent what the protocol does not allow."""


class Channel:
    """One end of a stream socket that carries messages.

    `deadline` is a time of `time.monotonic`, after which every call raises TimeoutError; None: no
    limit.
    """

    def __init__(self, stream: socket.socket) -> None:
        self._socket = stream
        self.deadline: float | None = None
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            stream.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)

    def fileno(self) -> int:
        """Return the file descriptor of the socket."""
        return self._socket.fileno()

    def send(self, header: Mapping[str, Any], payload: bytes | np.ndarray = b"") -> None:
        """Send one message.

        Raises:
            ChannelClosedError: the other end is gone.
            TimeoutError: the deadline has passed.
        """
        encoded, view = json.dumps(header).encode(), _view(payload)
        frame = _PREFIX.pack(len(encoded), len(view)) + encoded
        try:
            self._set_timeout()
            # Together, as far as the buffer of the socket goes: each call wakes the receiver.
            sent = self._socket.sendmsg([frame, view])
            for rest in (frame[sent:], view[max(0, sent - len(frame)) :]):
                if rest:
                    self._set_timeout()
                    self._socket.sendall(rest)
        except TimeoutError:
            raise
        except OSError as error:
            raise ChannelClosedError from error

    def receive(self) -> tuple[dict[str, Any], int]:
        """Receive a header; return it with the number of bytes of the payload that follows.

        Raises:
            ChannelClosedError: the other end is gone.
            ProtocolError: the header is too long, or is not a JSON object.
            TimeoutError: the deadline has passed.
        """
        length, size = _PREFIX.unpack(self.receive_bytes(_PREFIX.size))
        if length > _MAX_HEADER:
            raise ProtocolError(f"header of {length} bytes")
        try:
            header = json.loads(self.receive_bytes(length))
        except (ValueError, RecursionError) as error:
            raise ProtocolError("header is not JSON") from error
        if not isinstance(header, dict):
            raise ProtocolError("header is not an object")
        return header, size

    def receive_bytes(self, count: int) -> bytes:
        """Receive `count` bytes. Raises as `receive` does; the caller has checked the count."""
        return self.receive_array(count).tobytes()

    def receive_array(self, count: int) -> np.ndarray:
        """Receive `count` bytes as uint8. Raises as `receive` does."""
        content = np.empty(count, np.uint8)  # not filled with zeros first, as bytearray is
        view, start = content.data, 0
        while start < count:
            try:
                self._set_timeout()
                received = self._socket.recv_into(view[start:])
            except TimeoutError:
                raise
            except OSError as error:
                raise ChannelClosedError from error
            if received == 0:
                raise ChannelClosedError
            start += received
        return content

    def has_ended(self) -> bool:
        """Return whether the other end is gone, or sent something that nobody asked for."""
        try:
            self._socket.settimeout(0)
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _set_timeout(self) -> None:
        if self.deadline is None:
            self._socket.settimeout(None)
            return
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._socket.settimeout(remaining)


def _view(payload: bytes | np.ndarray) -> memoryview:
    view = payload.data if isinstance(payload, np.ndarray) else memoryview(payload)
    return view.cast("B") if view.nbytes else memoryview(b"")


# Values of replies ----------------------------------------------------------------------------


def read_text(value: Any) -> str:
    """Return a printable line of text of limited length.

    Raises:
        ProtocolError: it is something else.
    """
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable():
        raise ProtocolError("a text is not one printable line")
    return value


def read_texts(value: Any) -> tuple[str, ...]:
    """Return a list of texts as `read_text` does; it may be empty."""
    if not isinstance(value, list) or len(value) > _MAX_TEXTS:
        raise ProtocolError("not a list of texts")
    return tuple(read_text(text) for text in value)


def read_size(header: Mapping[str, Any], limits: MediaLimits) -> tuple[int, int]:
    """Return (height, width) of an image or frame.

    Raises:
        ProtocolError: not positive integers, or more pixels than the limit.
    """
    height, width = (_read_integer(header.get(key), 1, 1 << 31) for key in ("height", "width"))
    if height * width > limits.max_image_pixels:
        raise ProtocolError(f"{width} x {height} pixels are more than the limit")
    return height, width


def read_orientation(value: Any) -> int:
    """Return an EXIF orientation, 1 to 8.

    Raises:
        ProtocolError: it is something else.
    """
    return _read_integer(value, 1, 8)


def metadata_message(metadata: VideoMetadata) -> tuple[dict[str, Any], np.ndarray]:
    """Return the header and the payload that carry metadata: its timestamps are the payload."""
    header = {
        "fps": metadata.fps,
        "duration": metadata.duration,
        "height": metadata.height,
        "width": metadata.width,
        "notes": metadata.notes,
    }
    return {"metadata": header}, np.array(metadata.timestamps, np.float64)


def read_metadata(channel: Channel, value: Any, size: int, limits: MediaLimits) -> VideoMetadata:
    """Receive the timestamps of `metadata_message`, and return the metadata.

    Raises:
        ChannelClosedError, TimeoutError: as `Channel.receive`.
        ProtocolError: a value is impossible, or exceeds the limits.
    """
    if not isinstance(value, dict) or size % 8 or not 0 < size // 8 <= limits.max_frames:
        raise ProtocolError("not the metadata of a video")
    height, width = read_size(value, limits)
    duration, fps = _read_seconds(value.get("duration")), value.get("fps")
    if fps is not None:
        fps = _read_seconds(fps)
    timestamps = tuple(np.frombuffer(channel.receive_bytes(size), np.float64).tolist())
    if timestamps[0] < 0 or not math.isfinite(sum(timestamps)):
        raise ProtocolError("a timestamp is negative or not finite")
    if any(b < a for a, b in pairwise(timestamps)):
        raise ProtocolError("timestamps decrease")
    return VideoMetadata(
        timestamps=timestamps,
        fps=fps,
        duration=duration,
        height=height,
        width=width,
        notes=read_texts(value.get("notes")),
    )


def _read_integer(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ProtocolError(f"not an integer from {low} to {high}")
    return value


def _read_seconds(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ProtocolError("not a finite number")
    return value
