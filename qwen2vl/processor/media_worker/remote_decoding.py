"""Decoding in a media worker: the jobs that a worker is lent for, and what its end means.

`WorkerLease` runs the calls of one image or video: a worker that was killed from outside is
replaced twice, a crash, a time limit and lack of memory become InputError. `decode_remotely`
decodes an image; `RemoteVideoReader` is the VideoReader of a video that a worker holds open.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from qwen2vl.errors import InputError, MediaTooLargeError, MediaWorkerError
from qwen2vl.processor.media.rgb import DecodedImage
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.media.video_metadata import FrameTransform, VideoMetadata
from qwen2vl.processor.media_worker.protocol import (
    ChannelClosedError,
    ProtocolError,
    read_metadata,
    read_orientation,
    read_size,
    read_text,
    read_texts,
)
from qwen2vl.processor.media_worker.supervisor import WorkerSupervisor
from qwen2vl.processor.media_worker.worker_process import WorkerProcess

__all__ = ["EncodedMedia", "RemoteVideoReader", "WorkerLease", "decode_remotely"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
# After a worker was killed from outside. What kills it may be the lack of memory that decoding this
# very file causes in the whole machine, so that there is an end to it.
_MAX_RETRIES = 2
_GRACE_SECONDS = 2.0  # the worker's own time limit is reported first, if it can be


class EncodedMedia:
    """An image or video file in memory, with what a worker needs to decode it."""

    def __init__(
        self,
        content: bytes,
        content_type: str | None,
        limits: MediaLimits,
        name: str,
        *,
        apply_exif_orientation: bool,
    ) -> None:
        self.content, self.limits, self.name = content, limits, name
        self._content_type, self._apply_exif_orientation = content_type, apply_exif_orientation

    def job(self, kind: str) -> dict[str, Any]:
        """Return the header of the job that opens it."""
        return {
            "job": kind,
            "name": self.name,
            "content_type": self._content_type,
            "apply_exif_orientation": self._apply_exif_orientation,
            "limits": asdict(self.limits),
        }


class WorkerLease:
    """A worker that decodes one image or video, within `seconds`; closed by its user."""

    def __init__(self, supervisor: WorkerSupervisor, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self.deadline = 0.0  # set when the first worker is there: waiting for it does not count
        self._supervisor = supervisor
        self._worker: WorkerProcess | None = None
        self._num_retries = 0

    def run(self, call: Callable[[WorkerProcess], T]) -> T:
        """Return the result of a call that uses the worker, in another worker if one is killed.

        Raises:
            InputError: the media cannot be decoded within the limits, or three workers were killed.
            EngineError: no worker is available.
        """
        while True:
            worker = self._worker or self._acquire()
            try:
                return call(worker)
            except ChannelClosedError:
                self._worker = None
                self._handle_end(worker)
            except TimeoutError as error:
                self.discard()
                raise self._too_slow() from error
            except ProtocolError as error:
                logger.warning("media worker %d sent an invalid reply: %s", worker.pid, error)
                self.discard()
                raise self._failed() from error
            except InputError:
                raise
            except BaseException:
                self.discard()
                raise

    def close(self) -> None:
        """Give the worker back."""
        if self._worker is not None:
            self._supervisor.release(self._worker)
            self._worker = None

    def discard(self) -> None:
        """End the worker, whose state is unknown."""
        if self._worker is not None:
            self._supervisor.discard(self._worker)
            self._worker = None

    def receive(self, worker: WorkerProcess) -> tuple[dict[str, Any], int]:
        """Receive the header of a reply, and the size of its payload.

        Raises:
            InputError: the reply says that the media cannot be decoded.
            ChannelClosedError, ProtocolError, TimeoutError: as `Channel.receive`.
        """
        header, size = worker.channel.receive()
        reason = header.get("reason")
        if reason is None:
            return header, size
        if size:
            raise ProtocolError("an error with a payload")
        if reason == "too_large":
            raise MediaTooLargeError(read_text(header.get("error")))
        if reason == "input":
            raise InputError(read_text(header.get("error")))
        if reason == "memory":
            limit = self._supervisor.limits.memory_bytes
            raise MediaTooLargeError(
                f"{self.name} needs more than {limit >> 20:,} MB of memory to decode, which is the "
                "limit; resize it first"
            )
        logger.error("media worker %d failed: %s", worker.pid, str(header.get("log"))[:4000])
        self.discard()
        raise self._failed()

    def _acquire(self) -> WorkerProcess:
        self._worker = self._supervisor.acquire()
        self.deadline = self.deadline or time.monotonic() + self.seconds + _GRACE_SECONDS
        return self._worker

    def _handle_end(self, worker: WorkerProcess) -> None:
        """Return if the call may be tried again, else raise what ended the worker."""
        reason = worker.end()
        self._supervisor.discard(worker)
        if self._supervisor.is_closed:
            raise MediaWorkerError("the media workers are closed")
        if reason == "time":
            raise self._too_slow()
        if reason == "crash":
            logger.warning("media worker %d crashed while it decoded %s", worker.pid, self.name)
            raise self._failed()
        if self._num_retries == _MAX_RETRIES:
            raise InputError(
                f"{self.name}: the process that decodes it was killed {_MAX_RETRIES + 1} times; "
                "send it again, or make it smaller first"
            )
        self._num_retries += 1

    def _too_slow(self) -> MediaTooLargeError:
        return MediaTooLargeError(
            f"{self.name} took more than {self.seconds:g} s to decode; cut it or make it smaller "
            "first"
        )

    def _failed(self) -> InputError:
        return InputError(f"{self.name} is damaged: decoding it failed; save it again")


def decode_remotely(lease: WorkerLease, media: EncodedMedia) -> DecodedImage:
    """Decode one image in a worker. Raises as `WorkerLease.run`."""

    def decode(worker: WorkerProcess) -> DecodedImage:
        worker.begin_job(media.job("image"), media.content, lease.deadline, lease.seconds)
        header, size = lease.receive(worker)
        height, width = read_size(header, media.limits)
        notes = read_texts(header.get("notes"))
        orientation = read_orientation(header.get("orientation"))
        if size != height * width * 3:
            raise ProtocolError(f"{size} bytes for {width} x {height} pixels")
        pixels = worker.channel.receive_array(size)
        image = Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
        return DecodedImage(image, notes, orientation)

    return lease.run(decode)


class RemoteVideoReader:
    """Reads a video that a worker decodes; frames arrive one at a time. (Is a VideoReader.)"""

    def __init__(self, lease: WorkerLease, media: EncodedMedia, num_threads: int) -> None:
        """Open the video in a worker.

        Args:
            lease: for this video; closed by `close`.
            media: the file.
            num_threads: that FFmpeg may use, each of which may take the time limit.

        Raises:
            InputError, EngineError: as `WorkerLease.run`.
        """
        self._lease, self._media = lease, media
        self._cpu_seconds = lease.seconds * num_threads
        self._opened_in: WorkerProcess | None = None
        self.metadata = lease.run(self._open)

    def get_frames_at(self, indices: Sequence[int], transform: FrameTransform[T]) -> list[T] | None:
        """Return `transform` of each frame; None where the frames differ from the metadata.

        Raises:
            InputError, EngineError: as `WorkerLease.run`.
        """
        return self._lease.run(lambda worker: self._receive_frames(worker, indices, transform))

    def close(self) -> None:
        """Give the worker back."""
        self._lease.close()

    def _open(self, worker: WorkerProcess) -> VideoMetadata:
        media, deadline = self._media, self._lease.deadline
        worker.begin_job(media.job("video"), media.content, deadline, self._cpu_seconds)
        metadata = self._receive_metadata(worker)
        self._opened_in = worker
        return metadata

    def _receive_metadata(self, worker: WorkerProcess) -> VideoMetadata:
        header, size = self._lease.receive(worker)
        return read_metadata(worker.channel, header.get("metadata"), size, self._media.limits)

    def _receive_frames(
        self, worker: WorkerProcess, indices: Sequence[int], transform: FrameTransform[T]
    ) -> list[T] | None:
        if self._opened_in is not worker:  # the worker that had opened it was killed
            self._open(worker)
        while True:
            request, deadline = np.array(indices, np.int64), self._lease.deadline
            worker.begin_job({"job": "frames"}, request, deadline, self._cpu_seconds)
            frames = self._receive_reply(worker, len(indices), transform)
            if not isinstance(frames, VideoMetadata):
                return frames
            if frames != self.metadata:
                self.metadata = frames
                return None
            # A second worker found what the first one had: the indices are of these frames.

    def _receive_reply(
        self, worker: WorkerProcess, count: int, transform: FrameTransform[T]
    ) -> list[T] | VideoMetadata:
        frames: list[T] = []
        while True:
            header, size = self._lease.receive(worker)
            if "metadata" in header:
                metadata = header["metadata"]
                return read_metadata(worker.channel, metadata, size, self._media.limits)
            if header.get("done") is True and len(frames) == count and size == 0:
                return frames
            height, width = read_size(header, self._media.limits)
            if len(frames) == count or size != height * width * 3:
                raise ProtocolError("a frame too many, or of another size than it says")
            pixels = worker.channel.receive_array(size)
            frames.append(transform(pixels.reshape(height, width, 3)))
