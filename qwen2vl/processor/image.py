"""Image preprocessing: naive dynamic resolution (smart_resize), bicubic resize, flattened patches.

    RGB image -> smart_resize -> Pillow bicubic -> patchify -> Item

Pixels stay uint8; the model's first operation rescales and normalizes them. Files are opened in
media/rgb.py. The order of patches is geometry's `merge_order`; video.py uses `patchify` as well.
(Qwen2-VL sec. 2.1; HF: Qwen2VLImageProcessorPil; qwen_vl_utils: fetch_image, smart_resize.)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen2vl.config import VisionConfig
from qwen2vl.errors import ConfigError, InputError
from qwen2vl.geometry import Grid
from qwen2vl.processor.inputs import Item
from qwen2vl.processor.media.decoder import LOCAL_DECODER, MediaDecoder
from qwen2vl.processor.media.source import DEFAULT_LIMITS, MediaLimits, MediaSource
from qwen2vl.processor.media_options import LOW_DETAIL_PIXELS, NO_OPTIONS, MediaOptions

__all__ = [
    "PixelLimits",
    "pair_digests",
    "patchify",
    "preprocess_image",
    "resize_image",
    "resolve_pixel_limits",
    "smart_resize",
    "target_size",
    "unpatchify",
]

_MAX_RATIO = 200  # long side over short side, inclusive
_VIDEO_OPTIONS = (
    "fps nframes min_frames max_frames total_pixels video_start video_end frame_interval "
    "frame_times segment_frames subtitles"
).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelLimits:
    """Smallest and largest area of an image after resizing, from preprocessor_config.json."""

    min_pixels: int
    max_pixels: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise ConfigError(
                f"min_pixels {self.min_pixels} and max_pixels {self.max_pixels}: must be at least "
                "1, and the first at most the second"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> PixelLimits:
        """Read min_pixels and max_pixels, or size with shortest_edge and longest_edge.

        The first form takes precedence, as in transformers. (HF's "edges" are areas, too.)

        Raises:
            ConfigError: neither form is present, or the numbers contradict each other.
        """
        size = raw.get("size")
        size = size if isinstance(size, Mapping) else {}  # older image processors wrote an int
        low = raw.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
        high = raw.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
        if not isinstance(low, int) or not isinstance(high, int):
            raise ConfigError(
                f"preprocessor_config.json: min_pixels is {low!r} and max_pixels {high!r}; give "
                "both, or size with shortest_edge and longest_edge"
            )
        return cls(min_pixels=low, max_pixels=high)

    def override(self, min_pixels: int | None, max_pixels: int | None) -> PixelLimits:
        """Return the limits with those that are given; the other one moves with a single one.

        So max_pixels below the model's min_pixels lowers both, and is not a contradiction.

        Raises:
            ConfigError: the given limits are below 1 or contradict each other.
        """
        low = self.min_pixels if min_pixels is None else min_pixels
        high = self.max_pixels if max_pixels is None else max_pixels
        if min_pixels is None:
            low = max(1, min(low, high))
        elif max_pixels is None:
            high = max(low, high)
        return PixelLimits(min_pixels=low, max_pixels=high)


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int,
    min_pixels: float,
    max_pixels: float,
    name: str = "image",
) -> tuple[int, int]:
    """Return the resized (height, width): multiples of `factor`, area in limits, same aspect ratio.

    The arithmetic is exactly that of transformers 5.23; halves round to even. A side never
    becomes 0, so a very flat image may exceed a small `max_pixels`.

    Raises:
        InputError: the aspect ratio exceeds 200, or a side is 0.
    """
    short, long = sorted((height, width))
    if short < 1:
        raise InputError(f"{name}: {width} x {height} has no pixels; give at least 1 x 1")
    if long / short > _MAX_RATIO:
        ratio = f"{long / short:.{4 if long > 201 * short else 8}g}"
        raise InputError(
            f"{name}: {width} x {height} has aspect ratio {ratio}, limit {_MAX_RATIO}; crop it or "
            "resize it first"
        )
    rows = round(height / factor) * factor
    cols = round(width / factor) * factor
    if rows * cols > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        cols = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * cols < min_pixels:  # always so when a side rounded to 0
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        cols = math.ceil(width * grow / factor) * factor
    return rows, cols


def resolve_pixel_limits(pixels: PixelLimits, options: MediaOptions, name: str) -> PixelLimits:
    """Override the model's limits with the user's; detail "low" lowers the model's, if it can.

    Raises:
        InputError: min_pixels contradicts detail "low".
    """
    limits = pixels.override(options.min_pixels, options.max_pixels)
    if options.detail != "low":
        return limits
    if options.min_pixels is not None and options.min_pixels > LOW_DETAIL_PIXELS:
        raise InputError(
            f"{name}: min_pixels {options.min_pixels} is greater than {LOW_DETAIL_PIXELS}, the "
            "most that detail 'low' allows; lower it or leave one of them out"
        )
    high = max(limits.min_pixels, min(limits.max_pixels, LOW_DETAIL_PIXELS))
    return PixelLimits(min_pixels=limits.min_pixels, max_pixels=high)


def target_size(
    height: int,
    width: int,
    *,
    vision: VisionConfig,
    pixels: PixelLimits,
    options: MediaOptions,
    name: str,
) -> tuple[int, int]:
    """Return `smart_resize` of the image's size, or of resized_height x resized_width if given."""
    limits = resolve_pixel_limits(pixels, options, name)
    if options.resized_height is not None and options.resized_width is not None:
        height, width = options.resized_height, options.resized_width
    return smart_resize(
        height,
        width,
        factor=vision.factor,
        min_pixels=limits.min_pixels,
        max_pixels=limits.max_pixels,
        name=name,
    )


def patchify(frames_FCHW: Tensor, vision: VisionConfig) -> tuple[Tensor, Grid]:
    """Flatten frames into patches: frame pairs in order, each in `geometry.merge_order`.

    Each row is one patch, flattened as (channel, time, y, x). The last frame is repeated where the
    count is not a multiple of temporal_patch_size, so that an image becomes a pair of the same
    frame. Sides must be multiples of `vision.factor`.

    Returns:
        patches_NP with the dtype of the frames, and the grid.
    """
    step, patch, merge = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
    count, channels, height, width = frames_FCHW.shape
    assert height % vision.factor == 0, "height must be a multiple of the factor"
    assert width % vision.factor == 0, "width must be a multiple of the factor"
    grid = Grid(-(-count // step), height // patch, width // patch)
    frames = _pad_frames(np.ascontiguousarray(frames_FCHW.numpy()), step)
    # The pixels of a patch's line are contiguous in both layouts, so each line is copied as one
    # element: about three times as fast as pixel by pixel.
    line = np.dtype((np.void, patch * frames.itemsize))
    blocks = frames.view(line).reshape(
        grid.t, step, channels, grid.h // merge, merge, patch, grid.w // merge, merge
    )
    # -> t, block row, block column, row in block, column in block, channel, time, y
    patches = blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5).copy()
    patches_NP = patches.view(frames.dtype).reshape(-1, vision.patch_dim)
    return torch.from_numpy(patches_NP), grid


def _pad_frames(frames: np.ndarray, step: int) -> np.ndarray:
    """Repeat the last frame until the count is a multiple of `step`; a single one is broadcast."""
    if len(frames) == 1:
        return np.broadcast_to(frames, (step, *frames.shape[1:]))
    missing = -len(frames) % step
    return np.concatenate((frames, *[frames[-1:]] * missing)) if missing else frames


def unpatchify(patches_NP: Tensor, grid: Grid, vision: VisionConfig) -> Tensor:
    """Return frames_FCHW from patches: the inverse of `patchify`; repeated frames remain."""
    step, patch, merge = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
    blocks = patches_NP.reshape(
        grid.t,
        grid.h // merge,
        grid.w // merge,
        merge,
        merge,
        vision.in_channels,
        step,
        patch,
        patch,
    )
    frames = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return frames.reshape(grid.t * step, vision.in_channels, grid.h * patch, grid.w * patch)


def preprocess_image(
    source: MediaSource,
    *,
    vision: VisionConfig,
    pixels: PixelLimits,
    options: MediaOptions = NO_OPTIONS,
    limits: MediaLimits = DEFAULT_LIMITS,
    name: str,
    apply_exif_orientation: bool = True,
    decoder: MediaDecoder = LOCAL_DECODER,
) -> Item:
    """Preprocess one image.

    Raises:
        InputError: the image cannot be used, or an option is for videos only.
        EngineError: the decoder is not available.
    """
    if misplaced := [key for key in _VIDEO_OPTIONS if getattr(options, key) is not None]:
        raise InputError(
            f"{name}: {', '.join(misplaced)} is for videos, this is an image; leave it out"
        )
    if _is_rgb_array(source, limits):  # skips Pillow: training loads hundreds of them a second
        assert isinstance(source, np.ndarray)
        rgb, notes, orientation = source, (), 1
    else:
        rgb, notes, orientation = decoder.open_image(
            source, limits, name, apply_exif_orientation=apply_exif_orientation
        )
    size = rgb.shape[:2] if isinstance(rgb, np.ndarray) else (rgb.height, rgb.width)
    height, width = target_size(*size, vision=vision, pixels=pixels, options=options, name=name)
    frames_FCHW = torch.from_numpy(resize_image(rgb, height, width)).unsqueeze(0)
    patches_NP, grid = patchify(frames_FCHW, vision)
    return Item(
        kind="image",
        patches_NP=patches_NP,
        grid=grid,
        pair_digests=pair_digests(frames_FCHW, grid, vision),
        name=name,
        original_size=size,
        resized_size=(height, width),
        notes=notes,
        orientation=orientation,
    )


def resize_image(rgb: np.ndarray | Image.Image, height: int, width: int) -> np.ndarray:
    """Resize with Pillow's bicubic filter, which antialiases when downscaling.

    Returns:
        A copy, (3, height, width) uint8, channels first as `patchify` needs it.
    """
    if isinstance(rgb, np.ndarray):
        if rgb.shape[:2] == (height, width):
            return rgb.transpose(2, 0, 1).copy()
        rgb = Image.fromarray(np.ascontiguousarray(rgb))
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    planes = np.empty((3, height, width), np.uint8)
    for plane, channel in zip(planes, "RGB", strict=True):
        plane[:] = np.frombuffer(rgb.tobytes("raw", channel), np.uint8).reshape(height, width)
    return planes


def pair_digests(frames_FCHW: Tensor, grid: Grid, vision: VisionConfig) -> tuple[bytes, ...]:
    """Hash the inputs of the vision tower: of each frame pair the pixels, size, mean and std.

    Not the file: the same file at another pixel limit is another input. A pair of equal frames has
    the digest of an image. SHA-256, because CPUs compute it in hardware: 1.8 times as fast as
    BLAKE2b, measured.
    """
    header = _digest_header(grid.h, grid.w, vision.image_mean, vision.image_std)
    pairs = frames_FCHW.split(vision.temporal_patch_size)
    return tuple(_pair_digest(header, pair_FCHW) for pair_FCHW in pairs)


def _pair_digest(header: bytes, pair_FCHW: Tensor) -> bytes:
    first = pair_FCHW[:1]
    if (first == pair_FCHW).all():
        pair_FCHW = first
    hasher = sha256(header)
    hasher.update(np.ascontiguousarray(pair_FCHW.numpy()).data)
    return hasher.digest()


@lru_cache(maxsize=1024)
def _digest_header(h: int, w: int, mean: tuple[float, ...], std: tuple[float, ...]) -> bytes:
    return struct.pack(f"<2q{len(mean) + len(std)}d", h, w, *mean, *std)


def _is_rgb_array(source: MediaSource, limits: MediaLimits) -> bool:
    """Return whether `source` is a uint8 array (height > 4, width, 3), so certainly RGB."""
    if not isinstance(source, np.ndarray) or source.dtype != np.uint8 or source.ndim != 3:
        return False
    height, width, channels = source.shape
    return channels == 3 and height > 4 and 0 < width * height <= limits.max_image_pixels
