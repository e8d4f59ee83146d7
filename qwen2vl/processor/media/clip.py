"""The frames of a video, from wherever it comes: file, animation, list of frames, array.

A clip is opened in two steps, so that an hour fits in memory: first its timeline, then the few
frames that video.py chose, each shrunk as soon as it is decoded. Animations and lists go through
the same normalizer as pictures; files go to film.py, which brings PyAV when the first one comes.
It must not know budgets or the model. Next room: video.py.
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
from qwen2vl.processor.media.rgb import check_size, decode, open_image, opened, to_8_bit
from qwen2vl.processor.media.source import (
    Media,
    MediaLimits,
    MediaSource,
    read_head,
    read_source,
    sniff_type,
)
from qwen2vl.processor.media.timeline import (
    Clip,
    Deadline,
    Shrink,
    Timeline,
    check_count,
    frame_rate,
)

__all__ = ["VideoSource", "open_clip"]

VideoSource: TypeAlias = "MediaSource | Sequence[MediaSource]"

_IMAGE_KINDS = frozenset(
    {"image/png", "image/jpeg", "image/gif", "image/webp", "image/bmp", "image/tiff"}
)
_SUPPORTED = (
    "supported are MP4, MOV, MKV, WebM, AVI, FLV, MPEG, TS, WMV, OGG, and GIF, WebP, PNG or TIFF "
    "animations"
)
_UNNAMED_DELAY = 0.1  # seconds a frame is shown where an animation does not say, as browsers do


def open_clip(
    source: VideoSource, limits: MediaLimits, name: str, *, rate: float, turn: bool
) -> Clip:
    """Open anything that has frames; a picture is a clip of one.

    `rate` is that of listed frames; `turn` applies the EXIF orientation of pictures.

    Raises:
        InputError: nothing that can be shown as frames, or more than the limits.
    """
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise InputError(
            f"{name}: array of shape {source.shape} is not a clip; give (frames, height, width, 3)"
        )
    if isinstance(source, (list, tuple, np.ndarray)):
        return _ListClip(source, limits, name, rate, turn)
    media = read_source(source, limits, name)  # pyright: ignore[reportArgumentType]
    if isinstance(media.content, Image.Image):
        check_size(media.content, limits, name)
        return _AnimationClip(media, limits, name, turn)
    kind = sniff_type(read_head(media))
    if kind in _IMAGE_KINDS:
        return _AnimationClip(media, limits, name, turn)
    if kind != "application/octet-stream" and not kind.startswith(("video/", "audio/")):
        raise InputError(f"{name} is {kind}, not a supported video; {_SUPPORTED}")
    from qwen2vl.processor.media.video_reader import (
        FileClip,  # brings PyAV, and most prompts hold no video
    )

    return FileClip(media, limits, name)


class _ListClip:
    """Frames that the user chose: pictures of any kind, all of one size."""

    def __init__(
        self,
        sources: Sequence[MediaSource] | np.ndarray,
        limits: MediaLimits,
        name: str,
        rate: float,
        turn: bool,
    ) -> None:
        count = len(sources)
        if count == 0:
            raise InputError(f"{name}: the list of frames is empty; give at least one")
        check_count(count, limits, name)
        self._sources, self._limits, self._name, self._turn = sources, limits, name, turn
        first = self._open(0)
        notes: tuple[str, ...] = ()
        if isinstance(sources, np.ndarray) and sources.dtype != np.uint8:
            # All at once: a dark frame alone would be read as [0, 1], and flash up white.
            self._sources, note = to_8_bit(sources, name)
            notes = (note,)
        self.timeline = Timeline(
            times=tuple(i / rate for i in range(count)),
            rate=rate,
            seconds=count / rate,
            height=first.height,
            width=first.width,
            listed=True,
            notes=notes,
        )

    def frames(self, indices: Sequence[int], shrink: Shrink) -> list[Tensor]:
        return [shrink(np.array(self._open(i))) for i in indices]

    def _open(self, index: int) -> Image.Image:
        where = f"{self._name}, frames[{index}]"
        frame, _ = open_image(self._sources[index], self._limits, where, turn=self._turn)
        if index and frame.size != (self.timeline.width, self.timeline.height):
            raise InputError(
                f"{where} is {frame.width} x {frame.height}, but frames[0] is "
                f"{self.timeline.width} x {self.timeline.height}; give frames of one size"
            )
        return frame


class _AnimationClip:
    """GIF, WebP, APNG, the pages of a TIFF, or one picture: decoded by Pillow."""

    def __init__(self, media: Media, limits: MediaLimits, name: str, turn: bool) -> None:
        self._media, self._limits, self._name, self._turn = media, limits, name, turn
        self._deadline = Deadline(limits, name)
        self._total = self._count()
        check_count(self._total, limits, name)
        self.timeline = self._measure()

    def frames(self, indices: Sequence[int], shrink: Shrink) -> list[Tensor]:
        with self._image() as image:
            return [shrink(np.array(self._frame(image, index))) for index in indices]

    def _measure(self) -> Timeline:
        """Decode every frame once, for the delays and to find where damage begins."""
        frames = list(self._sizes_and_delays())
        (width, height), _ = frames[0]
        ends = list(accumulate(delay for _, delay in frames))
        times = (0.0, *ends[:-1])
        damaged = len(frames) < self._total
        note = f"damaged after {len(frames)} of {self._total} frames; the first ones were used"
        return Timeline(
            times=times,
            rate=frame_rate(times, tick=0.001, hint=1 / ends[0]),
            seconds=ends[-1],
            height=height,
            width=width,
            notes=(note,) if damaged else (),
        )

    def _sizes_and_delays(self) -> Iterator[tuple[tuple[int, int], float]]:
        with self._image() as image:
            for index in range(self._total):
                try:
                    frame = self._frame(image, index)
                except InputError:
                    if index == 0:
                        raise
                    return
                yield frame.size, image.info.get("duration", 0) / 1000 or _UNNAMED_DELAY

    def _count(self) -> int:
        with self._image() as image:
            try:
                return getattr(image, "n_frames", 1)
            except Exception as error:  # Pillow walks the whole file, and may stumble on anything
                raise InputError(f"{self._name} is damaged; save it again") from error

    @contextmanager
    def _image(self) -> Iterator[Image.Image]:
        if isinstance(self._media.content, Image.Image):
            yield self._media.content
            return
        with opened(self._media, self._limits, self._name) as (image, _):
            yield image

    def _frame(self, image: Image.Image, index: int) -> Image.Image:
        self._deadline.check()
        try:
            image.seek(index)
        except Exception as error:  # as above
            raise InputError(f"{self._name}: frame {index} is damaged; save it again") from error
        return decode(image, self._name, turn=self._turn)[0]
