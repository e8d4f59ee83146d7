"""Opening of videos from any source: file, URL, animation (GIF, APNG, ...), frame list or array.

A video is read in two steps, so that an hour of it fits in memory: first the metadata, then the
few frames that video.py sampled, each resized as soon as it is decoded. Frames of animations and
lists are decoded like images (rgb.py); video files are decoded by video_reader.py, which is
imported with PyAV when the first file is opened.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from qwen2vl.errors import InputError
from qwen2vl.processor.media.arrays import frames_channels_last, to_uint8
from qwen2vl.processor.media.rgb import (
    DecodedImage,
    array_to_image,
    check_image_size,
    decode_rgb,
    open_encoded,
    open_image,
)
from qwen2vl.processor.media.sniff import sniff_type
from qwen2vl.processor.media.source import (
    Media,
    MediaLimits,
    MediaSource,
    copy_to_memory,
    read_head,
    read_source,
)
from qwen2vl.processor.media.video_metadata import (
    Deadline,
    FrameTransform,
    VideoMetadata,
    VideoReader,
    check_frame_count,
    frame_rate,
)

__all__ = [
    "FrameListReader",
    "ImageOpener",
    "VideoSource",
    "open_video",
    "open_video_file",
    "read_frames",
]

VideoSource: TypeAlias = "MediaSource | Sequence[MediaSource]"

_JPEG_FRAMES = re.compile(r"data:video/jpe?g\s*;[^,]*base64\s*,", re.IGNORECASE)
_IMAGE_KINDS = frozenset(
    {
        "image/png",
        "image/jpeg",
        "image/gif",
        "image/webp",
        "image/bmp",
        "image/tiff",
        "image/avif",
    }
)
_SUPPORTED = (
    "supported are MP4, MOV, MKV, WebM, AVI, FLV, MPEG, TS, WMV, OGG, and GIF, WebP, PNG, AVIF or "
    "TIFF animations"
)
T = TypeVar("T")
# Seconds of a frame of an animation. Browsers take a delay of up to 10 ms, or none, for 100 ms.
_SHORT_DELAY, _DEFAULT_DELAY = 0.010, 0.1


def open_video(
    source: VideoSource,
    limits: MediaLimits,
    name: str,
    *,
    fps: float,
    apply_exif_orientation: bool,
) -> VideoReader:
    """Open a video of any kind. A still image is none, but a list of one image is.

    Args:
        source: file, URL, bytes, file object, animation, list of images, or array or tensor of
            frames.
        limits: on size, length and decoding time.
        name: for errors.
        fps: frame rate of lists and arrays.
        apply_exif_orientation: of images and of frames in lists; and of video files, the sample
            aspect ratio and transparency.

    Raises:
        InputError: the source has no frames, is a still image, cannot be decoded, or exceeds the
            limits.
    """
    source = read_frames(source, limits, name)
    if isinstance(source, (list, tuple, np.ndarray)):
        return FrameListReader(
            source, limits, name, fps=fps, apply_exif_orientation=apply_exif_orientation
        )
    media = read_source(source, limits, name)  # pyright: ignore[reportArgumentType]
    return open_video_file(media, limits, name, apply_exif_orientation)


def read_frames(source: Any, limits: MediaLimits, name: str) -> Any:
    """Return the frames of a source that lists them, as a list or array; else the source.

    A data URL of JPEGs, "data:video/jpeg;base64,FRAME,FRAME", becomes a list (vLLM's format).

    Raises:
        InputError: a shape that is not that of a video, or more frames than the limit.
    """
    source = copy_to_memory(source, limits, name)
    if isinstance(source, np.ndarray):
        return frames_channels_last(source, name)
    if not isinstance(source, str) or not _JPEG_FRAMES.match(source):
        return source
    # Counted first: the list of an URL of commas alone takes a hundred times its size.
    check_frame_count(source.count(","), limits, name)
    return [f"data:image/jpeg;base64,{frame}" for frame in source.split(",")[1:]]


def open_video_file(
    media: Media, limits: MediaLimits, name: str, apply_exif_orientation: bool
) -> VideoReader:
    """Open a video file or an animation.

    Raises:
        InputError: a still image, a file that cannot be decoded, or one that exceeds the limits.
    """
    if isinstance(media.content, Image.Image):
        check_image_size(media.content, limits, name)
        return _AnimationReader(media, limits, name, apply_exif_orientation)
    kind = sniff_type(read_head(media))
    if kind in _IMAGE_KINDS:
        return _AnimationReader(media, limits, name, apply_exif_orientation)
    if kind != "application/octet-stream" and not kind.startswith(("video/", "audio/")):
        what = f"an image ({kind}) that cannot be decoded" if kind[:6] == "image/" else kind
        raise InputError(f"{name} is {what}, not a supported video; {_SUPPORTED}")
    # Imports PyAV, and most prompts hold no video.
    from qwen2vl.processor.media.video_reader import PyAVVideoReader

    return PyAVVideoReader(media, limits, name, as_displayed=apply_exif_orientation)


class ImageOpener(Protocol):
    """Function that opens an image; `rgb.open_image` is the one of this process."""

    def __call__(
        self, source: Any, limits: MediaLimits, name: str, *, apply_exif_orientation: bool = True
    ) -> DecodedImage:
        """Open an image of any kind as RGB; raise InputError if it cannot be used."""
        ...


class FrameListReader:
    """Reads a list or array of frames: images of any kind, all of one size. (Is a VideoReader.)"""

    def __init__(
        self,
        sources: Sequence[Any] | np.ndarray,
        limits: MediaLimits,
        name: str,
        *,
        fps: float,
        apply_exif_orientation: bool,
        open_image: ImageOpener = open_image,
    ) -> None:
        """Open the first frame, which determines the size.

        Args:
            sources: images, or array (frames, height, width, channels).
            limits: on the number of frames, their sizes, and the time in total.
            name: for errors.
            fps: frame rate.
            apply_exif_orientation: of each frame.
            open_image: opens a frame.

        Raises:
            InputError: no frames, too many, or the first cannot be used.
        """
        count = len(sources)
        if count == 0:
            raise InputError(f"{name}: the list of frames is empty; give at least one")
        check_frame_count(count, limits, name)
        self._limits, self._name = limits, name
        self._apply_exif_orientation, self._open_image = apply_exif_orientation, open_image
        self._deadline = Deadline(limits, name)
        with self._deadline.running():
            self._read_first_frame(sources, fps)

    def _read_first_frame(self, sources: Sequence[Any] | np.ndarray, fps: float) -> None:
        self._sources = sources if isinstance(sources, np.ndarray) else self._copy_all(sources)
        notes: tuple[str, ...] = ()
        if isinstance(self._sources, np.ndarray) and self._sources.dtype != np.uint8:
            # All frames at once: a dark frame alone would be read as [0, 1] and become white.
            self._sources, note = to_uint8(self._sources, self._name)
            notes = (note,)
        first, count = self._open_frame(0), len(self._sources)
        self.metadata = VideoMetadata(
            timestamps=tuple(i / fps for i in range(count)),
            fps=fps,
            duration=count / fps,
            height=first.height,
            width=first.width,
            is_frame_list=True,
            notes=notes,
        )

    def frames_at(
        self, indices: Sequence[int], transform: FrameTransform[T]
    ) -> Generator[T, None, None]:
        """Open the frames `indices`, one at a time; yield `transform` of each.

        Raises:
            InputError: a frame cannot be used, has another size, or the time limit is exceeded.
        """
        return self._deadline.counted(transform(np.array(self._open_frame(i))) for i in indices)

    def close(self) -> None:
        """Do nothing: no frame is open between calls."""

    def _copy_all(self, sources: Sequence[Any]) -> list[Any] | np.ndarray:
        """Copy file objects and tensors to memory: a pipe can be read once, and frames are not.

        Arrays of one shape and dtype other than uint8 become one array, which has one scale.
        """
        frames = [
            copy_to_memory(source, self._limits, self._where(i)) for i, source in enumerate(sources)
        ]
        kinds = {
            (frame.shape, frame.dtype) if isinstance(frame, np.ndarray) else None
            for frame in frames
        }
        kind = kinds.pop() if len(kinds) == 1 else None
        if kind is None or kind[1] == np.uint8 or len(kind[0]) != 3:
            return frames
        return frames_channels_last(np.stack(frames), self._where(0))

    def _open_frame(self, index: int) -> Image.Image:
        self._deadline.check()
        where, source = self._where(index), self._sources[index]
        if isinstance(self._sources, np.ndarray):  # its axes are in order
            frame, _ = array_to_image(source, self._limits, where)
        else:
            frame = self._open_image(
                source, self._limits, where, apply_exif_orientation=self._apply_exif_orientation
            ).image
        if index and frame.size != (self.metadata.width, self.metadata.height):
            raise InputError(
                f"{where} is {frame.width} x {frame.height}, but frames[0] is "
                f"{self.metadata.width} x {self.metadata.height}; give frames of one size"
            )
        return frame

    def _where(self, index: int) -> str:
        return f"{self._name}, frames[{index}]"


class _AnimationReader:
    """Reads GIF, WebP, APNG, AVIF or the pages of a TIFF, with Pillow."""

    def __init__(
        self, media: Media, limits: MediaLimits, name: str, apply_exif_orientation: bool
    ) -> None:
        self._media, self._limits, self._name = media, limits, name
        self._apply_exif_orientation = apply_exif_orientation
        self._deadline = Deadline(limits, name)
        self._first = 0  # index of the first frame in the file
        with self._deadline.running():
            self._total = self._count_frames()
            if self._total == 1:
                raise InputError(f"{name} is {self._describe_still()}; give it as image, not video")
            check_frame_count(self._total, limits, name)
            self.metadata = self._read_metadata()

    def frames_at(
        self, indices: Sequence[int], transform: FrameTransform[T]
    ) -> Generator[T, None, None]:
        return self._deadline.counted(self._frames_at(indices, transform))

    def _frames_at(
        self, indices: Sequence[int], transform: FrameTransform[T]
    ) -> Generator[T, None, None]:
        with self._open() as image:
            for index in indices:
                yield transform(np.array(self._decode_frame(image, index)))

    def close(self) -> None:
        pass

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
                delay = image.info.get("duration", 0) / 1000
                yield frame.size, delay if delay > _SHORT_DELAY else _DEFAULT_DELAY

    def _count_frames(self) -> int:
        with self._open() as image:
            try:
                count = getattr(image, "n_frames", 1)
                if getattr(image, "default_image", False):
                    # Of an APNG, for viewers that do not animate: it is counted, but no frame.
                    self._first, count = 1, count - 1
                return count
            except Exception as error:  # Pillow reads the whole file, and may raise anything
                raise InputError(f"{self._name} is damaged; save it again") from error

    def _describe_still(self) -> str:
        if isinstance(self._media.content, Image.Image):
            return "an image"
        return f"an image ({sniff_type(read_head(self._media))})"

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
            image.seek(self._first + index)
        except Exception as error:  # as above
            raise InputError(f"{self._name}: frame {index} is damaged; save it again") from error
        check_image_size(image, self._limits, self._name)  # a GIF frame may enlarge the canvas
        return decode_rgb(
            image, self._name, apply_exif_orientation=self._apply_exif_orientation
        ).image
