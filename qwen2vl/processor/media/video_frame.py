"""Frames of video files as they are displayed: transparency, rotation and pixel aspect ratio.

A decoded frame becomes opaque upright RGB of the size that is stored; frames of non-square pixels
are not resized here: `upright_size` is the size that `smart_resize` starts from, so that a frame
is resized once. What changes the displayed frames is told by notes.
(FFmpeg: av_guess_sample_aspect_ratio, AVFrame; PIL: alpha_composite.)
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.format import VideoFormat
    from av.video.stream import VideoStream

__all__ = [
    "Rotation",
    "displayed_size",
    "find_visible_alpha",
    "frame_to_rgb",
    "has_alpha",
    "rotation_of",
    "sample_aspect_ratio",
    "upright_size",
]

# Above this, or below its inverse, a sample aspect ratio is taken for damage. Real ones are at
# most 3 (a CIF field of HD).
_MAX_SAMPLE_ASPECT_RATIO = 10

# Color matrices by ITU-T H.273, and FFmpeg's full range.
_BT709, _BT601, _FULL_RANGE = 1, 5, 2

Rotation: TypeAlias = Callable[[np.ndarray], np.ndarray]  # (H, W, 3) -> upright (H, W, 3)


def displayed_size(height: int, width: int, ratio: Fraction) -> tuple[int, int]:
    """Return the (height, width) in square pixels of a frame, before rotation.

    The side with fewer samples grows, so that no detail is lost; VLC, mpv and Chromium do so.

    Args:
        height: samples that are stored.
        width: samples that are stored.
        ratio: sample aspect ratio, the width of a sample divided by its height.
    """
    if ratio >= 1:
        return height, round(width * ratio)
    return round(height / ratio), width


def upright_size(frame: VideoFrame, ratio: Fraction) -> tuple[int, int, tuple[str, ...]]:
    """Return the (height, width) of a frame as displayed, with rotation, and notes.

    Args:
        frame: the first one of a video: the container's size may be wrong.
        ratio: sample aspect ratio.
    """
    height, width = frame.height, frame.width
    shown, notes = f"{ratio.numerator}:{ratio.denominator}", ()
    if not 1 / _MAX_SAMPLE_ASPECT_RATIO <= ratio <= _MAX_SAMPLE_ASPECT_RATIO:
        notes = (f"sample aspect ratio {shown} ignored: more than {_MAX_SAMPLE_ASPECT_RATIO} to 1",)
    elif (height, width) != (size := displayed_size(height, width, ratio)):
        notes = (
            f"{width} x {height} pixels of aspect ratio {shown}, displayed as "
            f"{size[1]} x {size[0]}",
        )
        height, width = size
    is_sideways = rotation_of(frame)(np.empty((1, 2))).shape == (2, 1)
    return (width, height, notes) if is_sideways else (height, width, notes)


def sample_aspect_ratio(stream: VideoStream) -> Fraction:
    """Return the container's ratio, or else that of the frames decoded so far; 1 if unknown.

    As ffplay. A ratio without a positive numerator and denominator is none.
    """
    for ratio in (stream.sample_aspect_ratio, stream.codec_context.sample_aspect_ratio):
        if ratio is not None and ratio > 0:
            return ratio
    return Fraction(1)


def frame_to_rgb(frame: VideoFrame, *, composite_on_white: bool) -> np.ndarray:
    """Convert a frame to (H, W, 3) uint8, by its color matrix and range.

    Without `composite_on_white`, or where all pixels are opaque, an alpha channel is dropped.
    """
    if composite_on_white and has_alpha(frame.format):
        rgba_HWC = _reformat(frame, "rgba")
        if rgba_HWC[..., 3].min() < 255:
            rgba = Image.fromarray(rgba_HWC)
            white = Image.new("RGBA", rgba.size, "white")
            return np.array(Image.alpha_composite(white, rgba).convert("RGB"))
    return _reformat(frame, "rgb24")


def _reformat(frame: VideoFrame, pixel_format: str) -> np.ndarray:
    """Convert a frame to packed RGB or RGBA.

    Source and destination are told apart by their matrix: where both have the same, as by default,
    PyAV before 17 takes any matrix for BT.601 and full range for limited. RGB has no matrix.
    """
    if not _has_chroma(frame.format.name):  # RGB, and gray, whose range PyAV gets right
        return frame.to_ndarray(format=pixel_format)
    matrix = int(frame.colorspace)
    is_full = frame.format.name.startswith("yuvj")
    return frame.reformat(
        format=pixel_format,
        src_colorspace=matrix,
        dst_colorspace=_BT601 if matrix == _BT709 else _BT709,
        src_color_range=_FULL_RANGE if is_full else int(frame.color_range),
        dst_color_range=_FULL_RANGE,
    ).to_ndarray()


def has_alpha(pixel_format: VideoFormat) -> bool:
    """Return whether frames of a pixel format may be transparent; entries of a palette may be."""
    return _has_alpha(pixel_format.name)


@lru_cache
def _has_alpha(name: str) -> bool:
    from av import VideoFormat  # imported long before, with the reader of video files

    pixel_format = VideoFormat(name)
    return pixel_format.has_palette or any(c.is_alpha for c in pixel_format.components)


@lru_cache
def _has_chroma(name: str) -> bool:
    from av import VideoFormat  # as above

    pixel_format = VideoFormat(name)
    colors = [component for component in pixel_format.components if not component.is_alpha]
    return len(colors) >= 3 and not pixel_format.is_rgb  # PyAV's is_chroma is false for 4:4:4


def find_visible_alpha(frames: Iterable[VideoFrame]) -> tuple[bool, tuple[str, ...]]:
    """Return whether a pixel of any frame is visible, and notes: alpha of zeros alone is padding.

    32-bit video without transparency is often stored so. A transparent video is decided by its
    first frames.
    """
    for frame in frames:
        if has_alpha(frame.format):
            alpha_HW = frame.to_ndarray(format="rgba")[..., 3]
            if alpha_HW.any():
                is_opaque = alpha_HW.min() == 255
                return True, () if is_opaque else ("transparency composited on white",)
    return False, ("alpha channel ignored: it is 0 in all frames",)


def rotation_of(frame: VideoFrame) -> Rotation:
    """Return the rotation of the display matrix, which maps stored to displayed pixels.

    Nine 32-bit integers, row by row: (x, y) is mapped to (a x + c y, b x + d y). Quarter turns and
    reflections have either a and d or b and c; other angles are not applied.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return _identity
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    if a and d and not b and not c:
        return lambda pixels_HWC: pixels_HWC[:: _sign(d), :: _sign(a)]
    if b and c and not a and not d:
        return lambda pixels_HWC: pixels_HWC.swapaxes(0, 1)[:: _sign(b), :: _sign(c)]
    return _identity


def _identity(pixels_HWC: np.ndarray) -> np.ndarray:
    return pixels_HWC


def _sign(value: int) -> int:
    return 1 if value > 0 else -1
