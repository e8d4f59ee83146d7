"""Decoding in a media worker: the jobs that a worker is lent for, and what its end means.

`WorkerLease` runs the calls of one image or video: a worker that was killed from outside is
replaced twice, a crash, a time limit and lack of memory become InputError. `decode_remotely`
decodes an image; `RemoteVideoReader` is the VideoReader of a video that a worker holds open, whose
frames arrive as a stream.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from qwen2vl.errors import InputError, MediaTooLargeError, MediaWorkerError
from qwen2vl.processor.media.rgb import DecodedImage
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.media.video_metadata import (
    FramesDifferError,
    FrameTransform,
    VideoMetadata,
)
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
    """A worker that decodes one image or video, within `seconds`; closed by its user.

    Time counts within `run` only, and waiting for a worker does not.
    """

    def __init__(self, supervisor: WorkerSupervisor, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self._supervisor = supervisor
        self._worker: WorkerProcess | None = None
        self._is_closed = False
        self._num_retries = 0
        self._remaining = seconds + _GRACE_SECONDS

    def run(self, call: Callable[[WorkerProcess], T]) -> T:
        """Return the result of a call that uses the worker, in another worker if one is killed.

        Raises:
            InputError: the media cannot be decoded within the limits, or three workers were killed.
            EngineError: no worker is available.
        """
        while True:
            worker = self._worker or self._acquire()
            start = time.monotonic()
            worker.channel.deadline = start + self._remaining
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
            finally:
                self._remaining -= time.monotonic() - start

    def close(self) -> None:
        """Give the worker back, which must wait for a job; a second call does nothing."""
        self._is_closed = True
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
        if self._is_closed:
            raise RuntimeError(f"{self.name} is read after its reader was closed")
        self._worker = self._supervisor.acquire()
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
        worker.begin_job(media.job("image"), media.content, lease.seconds)
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
        self._num_pending = 0  # frames that the worker was asked for and that are not received
        self.metadata = lease.run(self._open)

    def frames_at(
        self, indices: Sequence[int], transform: FrameTransform[T]
    ) -> Generator[T, None, None]:
        """Receive the frames `indices` while the worker decodes the next ones.

        The worker decodes ahead by what the buffers of the socket hold, one frame at least. One
        that is killed is replaced by another, which begins at the next frame; one whose frames are
        not all received ends.

        Raises:
            FramesDifferError: the frames differ from the metadata, which have been replaced.
            InputError, EngineError: as `WorkerLease.run`.
        """
        assert not self._num_pending, "one generator of a reader at a time"
        try:
            for position in range(len(indices)):
                frame = self._lease.run(partial(self._receive_frame, indices, position))
                if isinstance(frame, VideoMetadata):
                    self.metadata = frame
                    raise FramesDifferError(f"{self._media.name}: decoded frames differ")
                yield transform(frame)
        finally:
            self._end_stream()

    def close(self) -> None:
        """Give the worker back."""
        self._end_stream()
        self._lease.close()

    def _end_stream(self) -> None:
        if self._num_pending:
            self._num_pending = 0
            self._lease.discard()

    def _open(self, worker: WorkerProcess) -> VideoMetadata:
        self._num_pending = 0
        worker.begin_job(self._media.job("video"), self._media.content, self._cpu_seconds)
        metadata = self._receive_metadata(worker)
        self._opened_in = worker
        return metadata

    def _receive_metadata(self, worker: WorkerProcess) -> VideoMetadata:
        header, size = self._lease.receive(worker)
        return read_metadata(worker.channel, header.get("metadata"), size, self._media.limits)

    def _receive_frame(
        self, indices: Sequence[int], position: int, worker: WorkerProcess
    ) -> np.ndarray | VideoMetadata:
        """Receive the frame `indices[position]`; other metadata where the frames differ."""
        if self._opened_in is not worker:  # the worker that had opened it was killed
            self._open(worker)
        while True:
            if not self._num_pending:
                request = np.array(indices[position:], np.int64)
                worker.begin_job({"job": "frames"}, request, self._cpu_seconds)
                self._num_pending = len(request)
            try:
                header, size = self._lease.receive(worker)
            except InputError:  # after which the worker waits for a job
                self._num_pending = 0
                raise
            if "metadata" not in header:
                return self._receive_pixels(worker, header, size)
            self._num_pending = 0
            metadata = header["metadata"]
            metadata = read_metadata(worker.channel, metadata, size, self._media.limits)
            if metadata != self.metadata:
                return metadata
            # A second worker found what the first one had: the indices are of these frames.

    def _receive_pixels(
        self, worker: WorkerProcess, header: dict[str, Any], size: int
    ) -> np.ndarray:
        height, width = read_size(header, self._media.limits)
        if size != height * width * 3:
            raise ProtocolError("a frame of another size than it says")
        pixels = worker.channel.receive_array(size)
        self._num_pending -= 1
        return pixels.reshape(height, width, 3)
