"""Where media are decoded: in this process, or in a pool of worker processes.

`MediaDecoder` is the interface that image.py and video.py use; resizing is theirs. `LocalDecoder`
decodes in this process. A server decodes what it gets from strangers in processes of limited
resources: `media_worker.pool.MediaWorkerPool` has the same interface and results.
"""

from __future__ import annotations

from typing import Protocol

from qwen2vl.processor.media.rgb import DecodedImage, open_image
from qwen2vl.processor.media.source import MediaLimits, MediaSource
from qwen2vl.processor.media.video_metadata import VideoReader
from qwen2vl.processor.media.video_source import VideoSource, open_video

__all__ = ["LOCAL_DECODER", "LocalDecoder", "MediaDecoder"]


class MediaDecoder(Protocol):
    """Decodes images and videos; thread-safe."""

    def open_image(
        self, source: MediaSource, limits: MediaLimits, name: str, *, apply_exif_orientation: bool
    ) -> DecodedImage:
        """Open any image as RGB.

        Raises:
            InputError: it cannot be used, or exceeds a limit.
            EngineError: no decoder is available.
        """
        ...

    def open_video(
        self,
        source: VideoSource,
        limits: MediaLimits,
        name: str,
        *,
        fps: float,
        apply_exif_orientation: bool,
    ) -> VideoReader:
        """Open a video of any kind; the caller closes the reader. Raises as `open_image` does.

        Args:
            source: file, animation, list of images, or array of frames.
            limits: on size, length and decoding time.
            name: for errors.
            fps: frame rate of lists and arrays.
            apply_exif_orientation: of images and of frames in lists; and of video files, the sample
                aspect ratio and transparency.
        """
        ...


class LocalDecoder:
    """Decodes in this process and thread."""

    def open_image(
        self, source: MediaSource, limits: MediaLimits, name: str, *, apply_exif_orientation: bool
    ) -> DecodedImage:
        """Open any image as RGB, as `rgb.open_image` does.

        Raises:
            InputError: it cannot be used, or exceeds a limit.
        """
        return open_image(source, limits, name, apply_exif_orientation=apply_exif_orientation)

    def open_video(
        self,
        source: VideoSource,
        limits: MediaLimits,
        name: str,
        *,
        fps: float,
        apply_exif_orientation: bool,
    ) -> VideoReader:
        """Open a video of any kind, as `video_source.open_video` does.

        Raises:
            InputError: it cannot be used, or exceeds a limit.
        """
        return open_video(
            source, limits, name, fps=fps, apply_exif_orientation=apply_exif_orientation
        )


LOCAL_DECODER = LocalDecoder()
