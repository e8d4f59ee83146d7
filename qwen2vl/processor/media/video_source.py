"""Opening of videos from any source: file, URL, animation (GIF, WebP, APNG), frame list or array.

A video is read in two steps, so that an hour of it fits in memory: first the metadata, then the
few frames that video.py sampled, each resized as soon as it is decoded. Frames of animations and
lists are decoded like images (rgb.py); video files are decoded by video_reader.py, which is
imported with PyAV when the first file is opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from qwen2vl.errors import InputError
from qwen2vl.processor.media.rgb import (
    check_image_size,
    decode_rgb,
    open_encoded,
    open_image,
    to_uint8,
)
from qwen2vl.processor.media.source import (
    Media,
    MediaLimits,
    MediaSource,
    read_head,
    read_source,
    sniff_type,
)
from qwen2vl.processor.media.video_metadata import (
    Deadline,
    FrameTransform,
    VideoMetadata,
    VideoReader,
    check_frame_count,
    frame_rate,
)

__all__ = ["VideoSource", "open_video"]

VideoSource: TypeAlias = "MediaSource | Sequence[MediaSource]"

_IMAGE_KINDS = frozenset(
    {"image/png", "image/jpeg", "image/gif", "image/webp", "image/bmp", "image/tiff"}
)
_SUPPORTED = (
    "supported are MP4, MOV, MKV, WebM, AVI, FLV, MPEG, TS, WMV, OGG, and GIF, WebP, PNG or TIFF "
    "animations"
)
_DEFAULT_DELAY = 0.1  # seconds of a frame without a delay in the animation, as in browsers


def open_video(
    source: VideoSource,
    limits: MediaLimits,
    name: str,
    *,
    fps: float,
    apply_exif_orientation: bool,
) -> VideoReader:
    """Open a video of any kind; an image is a video of one frame.

    Args:
        source: file, URL, bytes, image, animation, list of images, or array of frames.
        limits: on size, length and decoding time.
        name: for errors.
        fps: frame rate of lists and arrays.
        apply_exif_orientation: of images and of frames in lists.

    Raises:
        InputError: the source has no frames, cannot be decoded, or exceeds the limits.
    """
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise InputError(
            f"{name}: array of shape {source.shape} is not a video; give (frames, height, width, 3)"
        )
    if isinstance(source, (list, tuple, np.ndarray)):
        return _FrameListReader(source, limits, name, fps, apply_exif_orientation)
    media = read_source(source, limits, name)  # pyright: ignore[reportArgumentType]
    if isinstance(media.content, Image.Image):
        check_image_size(media.content, limits, name)
        return _AnimationReader(media, limits, name, apply_exif_orientation)
    kind = sniff_type(read_head(media))
    if kind in _IMAGE_KINDS:
        return _AnimationReader(media, limits, name, apply_exif_orientation)
    if kind != "application/octet-stream" and not kind.startswith(("video/", "audio/")):
        raise InputError(f"{name} is {kind}, not a supported video; {_SUPPORTED}")
    # Imports PyAV, and most prompts hold no video.
    from qwen2vl.processor.media.video_reader import PyAVVideoReader

    return PyAVVideoReader(media, limits, name)


class _FrameListReader:
    """Reads a list or array of frames: images of any kind, all of one size."""

    def __init__(
        self,
        sources: Sequence[MediaSource] | np.ndarray,
        limits: MediaLimits,
        name: str,
        fps: float,
        apply_exif_orientation: bool,
    ) -> None:
        count = len(sources)
        if count == 0:
            raise InputError(f"{name}: the list of frames is empty; give at least one")
        check_frame_count(count, limits, name)
        self._sources, self._limits, self._name = sources, limits, name
        self._apply_exif_orientation = apply_exif_orientation
        first = self._open_frame(0)
        notes: tuple[str, ...] = ()
        if isinstance(sources, np.ndarray) and sources.dtype != np.uint8:
            # All frames at once: a dark frame alone would be read as [0, 1] and become white.
            self._sources, note = to_uint8(sources, name)
            notes = (note,)
        self.metadata = VideoMetadata(
            timestamps=tuple(i / fps for i in range(count)),
            fps=fps,
            duration=count / fps,
            height=first.height,
            width=first.width,
            is_frame_list=True,
            notes=notes,
        )

    def get_frames_at(self, indices: Sequence[int], transform: FrameTransform) -> list[Tensor]:
        return [transform(np.array(self._open_frame(i))) for i in indices]

    def _open_frame(self, index: int) -> Image.Image:
        where = f"{self._name}, frames[{index}]"
        frame, _ = open_image(
            self._sources[index],
            self._limits,
            where,
            apply_exif_orientation=self._apply_exif_orientation,
        )
        if index and frame.size != (self.metadata.width, self.metadata.height):
            raise InputError(
                f"{where} is {frame.width} x {frame.height}, but frames[0] is "
                f"{self.metadata.width} x {self.metadata.height}; give frames of one size"
            )
        return frame


class _AnimationReader:
    """Reads GIF, WebP, APNG, the pages of a TIFF, or one image, with Pillow."""

    def __init__(
        self, media: Media, limits: MediaLimits, name: str, apply_exif_orientation: bool
    ) -> None:
        self._media, self._limits, self._name = media, limits, name
        self._apply_exif_orientation = apply_exif_orientation
        self._deadline = Deadline(limits, name)
        self._total = self._count_frames()
        check_frame_count(self._total, limits, name)
        self.metadata = self._read_metadata()

    def get_frames_at(self, indices: Sequence[int], transform: FrameTransform) -> list[Tensor]:
        with self._open() as image:
            return [transform(np.array(self._decode_frame(image, index))) for index in indices]

    def _read_metadata(self) -> VideoMetadata:
        """Decode every frame once, to get the delays and to find the first damaged frame."""
        frames = list(self._sizes_and_delays())
        (width, height), _ = frames[0]
        ends = list(accumulate(delay for _, delay in frames))
        timestamps = (0.0, *ends[:-1])
        damaged = len(frames) < self._total
        note = f"damaged after {len(frames)} of {self._total} frames; the first ones were used"
        return VideoMetadata(
            timestamps=timestamps,
            fps=frame_rate(timestamps, time_base=0.001, nominal_fps=1 / ends[0]),
            duration=ends[-1],
            height=height,
            width=width,
            notes=(note,) if damaged else (),
        )

    def _sizes_and_delays(self) -> Iterator[tuple[tuple[int, int], float]]:
        with self._open() as image:
            for index in range(self._total):
                try:
                    frame = self._decode_frame(image, index)
                except InputError:
                    if index == 0:
                        raise
                    return
                yield frame.size, image.info.get("duration", 0) / 1000 or _DEFAULT_DELAY

    def _count_frames(self) -> int:
        with self._open() as image:
            try:
                return getattr(image, "n_frames", 1)
            except Exception as error:  # Pillow reads the whole file, and may raise anything
                raise InputError(f"{self._name} is damaged; save it again") from error

    @contextmanager
    def _open(self) -> Iterator[Image.Image]:
        if isinstance(self._media.content, Image.Image):
            yield self._media.content
            return
        with open_encoded(self._media, self._limits, self._name) as (image, _):
            yield image

    def _decode_frame(self, image: Image.Image, index: int) -> Image.Image:
        self._deadline.check()
        try:
            image.seek(index)
        except Exception as error:  # as above
            raise InputError(f"{self._name}: frame {index} is damaged; save it again") from error
        return decode_rgb(image, self._name, apply_exif_orientation=self._apply_exif_orientation)[0]
