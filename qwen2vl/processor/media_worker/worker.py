"""Main loop of a media worker: receives one job at a time, decodes it, and sends RGB pixels.

Decoding is `media/rgb.py` and `media/video_source.py`, as in `LocalDecoder`; resizing is left to
the parent. The parent starts it (worker_process.py) and ends it. After the imports no file can be
opened, except modules. What fails is reported by its text, which the parent checks.
"""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from qwen2vl.errors import InputError, MediaTooLargeError
from qwen2vl.processor.image_formats.formats import SERVER_IMAGE_FORMATS
from qwen2vl.processor.media.rgb import decode_media
from qwen2vl.processor.media.source import Media, MediaLimits
from qwen2vl.processor.media.video_metadata import FramesDifferError, VideoReader
from qwen2vl.processor.media.video_source import open_video_file
from qwen2vl.processor.media_worker.confinement import (
    die_with_parent,
    isolate_network,
    limit_cpu_seconds,
    limit_resources,
    lock_files,
)
from qwen2vl.processor.media_worker.protocol import Channel, ChannelClosedError, metadata_message

__all__ = ["main"]

_MAX_LOG = 4000  # characters of a traceback


def main(descriptor: int, settings: Mapping[str, Any]) -> None:
    """Serve jobs until the socket is closed.

    Args:
        descriptor: of the socket to the parent.
        settings: parent (process id), memory_bytes, nice, folders (that stay readable).
    """
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        achieved = isolate_network()
        die_with_parent(settings["parent"])
        _load_decoders()
        limit_resources(settings["memory_bytes"], settings["nice"])
        achieved += lock_files(settings["folders"])
        channel.send({"ready": True, "confinement": achieved})
        _Jobs(channel).run()
    except ChannelClosedError:
        pass
    except Exception:
        channel.send({"reason": "bug", "log": traceback.format_exc()[-_MAX_LOG:]})


def _load_decoders() -> None:
    """Decode one small image of each format: much is imported when it is first used."""
    from qwen2vl.processor.media import video_reader  # noqa: F401 - imports PyAV

    for kind in SERVER_IMAGE_FORMATS:
        file = BytesIO()
        Image.new("RGB", (8, 8)).save(file, kind)
        decode_media(Media(content=file.getvalue()), MediaLimits(), kind)


def _read_limits(header: Mapping[str, Any]) -> MediaLimits:
    """Return the limits of a job, whose tuples JSON made lists."""
    limits = header["limits"]
    return MediaLimits(**{**limits, "image_formats": tuple(limits["image_formats"])})


def _reason(error: InputError) -> str:
    if isinstance(error.__cause__, MemoryError):
        return "memory"
    return "too_large" if isinstance(error, MediaTooLargeError) else "input"


class _Jobs:
    """Serves the jobs of one channel; holds the video that is open between two of them."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._video: VideoReader | None = None
        self._limits = MediaLimits()

    def run(self) -> None:
        """Serve until the channel is closed."""
        handlers: dict[str, Callable[[dict[str, Any], bytes], None]] = {
            "image": self._decode_image,
            "video": self._open_video,
            "frames": self._send_frames,
        }
        while True:
            self._channel.deadline = None
            header, size = self._channel.receive()
            limit_cpu_seconds(header["cpu_seconds"])
            payload = self._channel.receive_bytes(size)
            try:
                handlers[header["job"]](header, payload)
            except InputError as error:
                self._fail(_reason(error), str(error))
            except MemoryError:
                self._fail("memory", "")

    def _fail(self, reason: str, text: str) -> None:
        self._channel.send({"reason": reason, "error": text})

    def _decode_image(self, header: dict[str, Any], content: bytes) -> None:
        self._video = None
        image, notes, orientation = decode_media(
            Media(content=content, content_type=header["content_type"]),
            _read_limits(header),
            header["name"],
            apply_exif_orientation=header["apply_exif_orientation"],
        )
        reply = {"height": image.height, "width": image.width}
        reply |= {"notes": notes, "orientation": orientation}
        self._channel.send(reply, image.tobytes())

    def _open_video(self, header: dict[str, Any], content: bytes) -> None:
        self._video, self._limits = None, _read_limits(header)
        self._video = open_video_file(
            Media(content=content, content_type=header["content_type"]),
            self._limits,
            header["name"],
            header["apply_exif_orientation"],
        )
        self._channel.send(*metadata_message(self._video.metadata))

    def _send_frames(self, header: dict[str, Any], payload: bytes) -> None:
        assert self._video is not None, "a job opened the video before"
        indices: Sequence[int] = np.frombuffer(payload, np.int64).tolist()
        try:
            with closing(self._video.frames_at(indices, np.ascontiguousarray)) as frames:
                for pixels_HWC in frames:
                    height, width, _ = pixels_HWC.shape
                    # Waits while the parent has not received the frames before: no more are
                    # decoded than the buffers of the socket hold.
                    self._channel.send({"height": height, "width": width}, pixels_HWC)
        except FramesDifferError:
            self._channel.send(*metadata_message(self._video.metadata))
