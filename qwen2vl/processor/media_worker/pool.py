"""Pool of media workers: a MediaDecoder whose decoders run in processes that may die.

A picture or video that crashes its decoder, exceeds a time limit or needs too much memory is an
InputError; the worker is replaced (supervisor.py). Results equal those of `LocalDecoder`. Pixels
that are in this process already (arrays, PIL images) are converted here.
(torch.utils.data: DataLoader's worker processes.)
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np

from qwen2vl.errors import ConfigError, InputError, MediaTooLargeError
from qwen2vl.processor.media.rgb import DecodedImage, decode_media
from qwen2vl.processor.media.source import Media, MediaLimits, MediaSource, read_source
from qwen2vl.processor.media.video_metadata import VideoReader
from qwen2vl.processor.media.video_source import (
    FrameListReader,
    VideoSource,
    open_video_file,
    read_frames,
)
from qwen2vl.processor.media_worker.remote_decoding import (
    EncodedMedia,
    RemoteVideoReader,
    WorkerLease,
    decode_remotely,
)
from qwen2vl.processor.media_worker.supervisor import WorkerSupervisor
from qwen2vl.processor.media_worker.worker_process import WorkerLimits

__all__ = ["MediaWorkerPool"]

_MAX_FFMPEG_THREADS = 16
_DEFAULT_LIMITS = WorkerLimits()


class MediaWorkerPool:
    """Decodes images and videos in `num_workers` processes. (Is a MediaDecoder; thread-safe.)

    with MediaWorkerPool(2) as pool:
        processor = processor.with_media(pool, limits)
    """

    def __init__(self, num_workers: int = 2, limits: WorkerLimits = _DEFAULT_LIMITS) -> None:
        """Prepare a pool; `start` starts it.

        Raises:
            ConfigError: fewer than one worker.
        """
        if num_workers < 1:
            raise ConfigError(
                f"num_workers of the media workers is {num_workers}, must be 1 or more"
            )
        self.num_workers, self.limits = num_workers, limits
        self._supervisor = WorkerSupervisor(num_workers, limits)

    def start(self) -> None:
        """Start the workers in the background; `wait_until_ready` waits for the first.

        Raises:
            EngineError: closed before.
        """
        self._supervisor.start()

    def wait_until_ready(self) -> None:
        """Wait until the first worker can decode.

        Raises:
            EngineError: the workers do not start; the text has the reason.
        """
        self._supervisor.wait_until_ready()

    def close(self) -> None:
        """End the workers; jobs that run raise EngineError. A second call does nothing."""
        self._supervisor.close()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return self._supervisor.pids

    def __enter__(self) -> MediaWorkerPool:
        """Start the workers and wait for the first."""
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def open_image(
        self,
        source: MediaSource,
        limits: MediaLimits,
        name: str,
        *,
        apply_exif_orientation: bool = True,
    ) -> DecodedImage:
        """Open any image as RGB.

        Raises:
            InputError: it cannot be used, exceeds a limit, or its decoder crashed.
            EngineError: no worker is available.
        """
        content = self._read(source, limits, name, apply_exif_orientation)
        if isinstance(content, Media):
            return decode_media(
                content, limits, name, apply_exif_orientation=apply_exif_orientation
            )
        lease = WorkerLease(self._supervisor, name, self.limits.image_seconds)
        try:
            return decode_remotely(lease, content)
        finally:
            lease.close()

    def open_video(
        self,
        source: VideoSource,
        limits: MediaLimits,
        name: str,
        *,
        fps: float,
        apply_exif_orientation: bool,
    ) -> VideoReader:
        """Open a video of any kind; the caller closes the reader, which holds a worker.

        Raises:
            InputError: it cannot be used, exceeds a limit, or its decoder crashed.
            EngineError: no worker is available.
        """
        frames = read_frames(source, limits, name)
        if isinstance(frames, (list, tuple, np.ndarray)):
            return FrameListReader(
                frames,
                limits,
                name,
                fps=fps,
                apply_exif_orientation=apply_exif_orientation,
                open_image=self.open_image,
            )
        content = self._read(frames, limits, name, apply_exif_orientation)
        if isinstance(content, Media):
            return open_video_file(content, limits, name, apply_exif_orientation)
        lease = WorkerLease(self._supervisor, name, limits.decode_timeout)
        try:
            num_threads = min(os.cpu_count() or 1, _MAX_FFMPEG_THREADS)
            return RemoteVideoReader(lease, content, num_threads)
        except BaseException:
            lease.close()
            raise

    def _read(
        self, source: MediaSource, limits: MediaLimits, name: str, apply_exif_orientation: bool
    ) -> EncodedMedia | Media:
        """Read a source; return pixels as Media, and a file as what a worker decodes."""
        media = read_source(source, limits, name)
        content = media.content
        if isinstance(content, Path):
            content = _read_file(content, name)
        if not isinstance(content, bytes):
            return media
        # The worker has it twice, beside what it decodes.
        if len(content) > self.limits.memory_bytes // 4:
            raise MediaTooLargeError(
                f"{name} has {len(content):,} bytes, limit is {self.limits.memory_bytes // 4:,}; "
                "send a smaller file"
            )
        return EncodedMedia(
            content,
            media.content_type,
            limits,
            name,
            apply_exif_orientation=apply_exif_orientation,
        )


def _read_file(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{name} cannot be read; check the file and its disk") from error
