"""Video preprocessing: frame sampling and resizing within a token budget, by preset.

    source -> metadata -> plan_frames: indices, size -> decode, resize -> patchify -> Item

A preset sets everything in which implementations differ (the paper, versions of qwen_vl_utils);
`plan_frames` is pure arithmetic on the timestamps. Frames are resized by torch's bicubic with
antialias on uint8, as transformers does: once, also where pixels are not square. docs/pixels.md has
the table of presets.
(Qwen2-VL sec. 2.1, 3.2; HF: Qwen2VLVideoProcessor; qwen_vl_utils: fetch_video, smart_nframes.)
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.config import VisionConfig
from qwen2vl.errors import InputError
from qwen2vl.processor.image import (
    PixelLimits,
    item_digest,
    patchify,
    resize_image,
    resolve_pixel_limits,
    smart_resize,
    target_size,
)
from qwen2vl.processor.inputs import Item
from qwen2vl.processor.media.decoder import LOCAL_DECODER, MediaDecoder
from qwen2vl.processor.media.source import DEFAULT_LIMITS, NO_OPTIONS, MediaLimits, MediaOptions
from qwen2vl.processor.media.video_metadata import VideoMetadata, VideoReader, video_duration
from qwen2vl.processor.media.video_source import VideoSource

__all__ = [
    "VIDEO_PRESETS",
    "FramePlan",
    "VideoPreset",
    "find_video_preset",
    "plan_frames",
    "preprocess_video",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoPreset:
    """Rules of frame sampling and resizing. Areas are in vision tokens of one pair of frames."""

    fps: float = 2.0  # sampled frames per second
    min_frames: int = 4
    max_frames: int = 768
    min_frame_tokens: int = 128  # the budget does not shrink frames below this
    max_frame_tokens: int = 768
    total_tokens: float  # budget of a whole video
    rounding: Literal["nearest", "down"]  # of the frame count, to an even number
    strict_budget: bool = False  # where the smallest frames exceed the budget, sample fewer
    upscale_small_frames: bool = True  # frames below min_frame_tokens are upscaled to it
    min_tokens_slack: float = 1.05  # a frame's budget is at least min_frame_tokens times this
    # What max_pixels in a message does:
    max_pixels_policy: Literal["override", "lower_only", "within_budget"]
    frame_lists_as_images: bool = False  # frame lists take the limits and the resize of images
    # Of images and frames in lists; and of video files, the sample aspect ratio and transparency.
    apply_exif_orientation: bool = False


VIDEO_PRESETS: Mapping[str, VideoPreset] = MappingProxyType(
    {
        "paper": VideoPreset(
            total_tokens=16384,
            rounding="nearest",
            strict_budget=True,
            upscale_small_frames=False,
            min_tokens_slack=1.0,
            max_pixels_policy="within_budget",
            apply_exif_orientation=True,
        ),
        "qwen_vl_utils_0_0_8": VideoPreset(
            total_tokens=24576,
            rounding="nearest",
            max_pixels_policy="override",
            frame_lists_as_images=True,
        ),
        "qwen_vl_utils_0_0_14": VideoPreset(
            total_tokens=0.9 * 128_000, rounding="down", max_pixels_policy="lower_only"
        ),
    }
)


def find_video_preset(name: str) -> VideoPreset:
    """Return the preset of this name.

    Raises:
        InputError: there is none of this name; the text lists them.
    """
    if not isinstance(name, str) or name not in VIDEO_PRESETS:
        raise InputError(f"unknown video preset {name!r}; choose one of {', '.join(VIDEO_PRESETS)}")
    return VIDEO_PRESETS[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class FramePlan:
    """Indices of the sampled frames, in display order (with repeats), and their resized size."""

    indices: tuple[int, ...]
    height: int
    width: int
    notes: tuple[str, ...]


def preprocess_video(
    source: VideoSource,
    *,
    vision: VisionConfig,
    pixels: PixelLimits,
    preset: str = "paper",
    options: MediaOptions = NO_OPTIONS,
    limits: MediaLimits = DEFAULT_LIMITS,
    name: str,
    decoder: MediaDecoder = LOCAL_DECODER,
) -> Item:
    """Preprocess one video.

    A source is a video file or an animation, in any form that `preprocess_image` takes, a list of
    images, or an array or tensor (frames, height, width, channels) or with channels second.

    Raises:
        InputError: the video cannot be used, is a still image, or no frame fits into the budget.
        EngineError: the decoder is not available.
    """
    rules = find_video_preset(preset)
    fps = options.fps or rules.fps
    reader = decoder.open_video(
        source, limits, name, fps=fps, apply_exif_orientation=rules.apply_exif_orientation
    )

    def plan_from_metadata() -> FramePlan:
        return plan_frames(
            reader.metadata, preset=rules, vision=vision, pixels=pixels, options=options, name=name
        )

    with closing(reader):
        plan = plan_from_metadata()
        frames_FCHW = _decode_frames(reader, plan, rules)
        if frames_FCHW is None:  # the decoded frames differ from the packet timestamps
            plan = plan_from_metadata()
            frames_FCHW = _decode_frames(reader, plan, rules)
            assert frames_FCHW is not None, "metadata of decoded frames is exact"
    patches_NP, grid = patchify(frames_FCHW, vision)
    return Item(
        kind="video",
        patches_NP=patches_NP,
        grid=grid,
        digest=item_digest(frames_FCHW, grid, vision),
        name=name,
        original_size=(reader.metadata.height, reader.metadata.width),
        resized_size=(plan.height, plan.width),
        frame_timestamps=tuple(reader.metadata.timestamps[i] for i in plan.indices),
        notes=(*reader.metadata.notes, *plan.notes),
    )


def plan_frames(
    metadata: VideoMetadata,
    *,
    preset: VideoPreset,
    vision: VisionConfig,
    pixels: PixelLimits,
    options: MediaOptions = NO_OPTIONS,
    name: str = "video",
) -> FramePlan:
    """Choose the frames to sample and their size within the budget.

    Raises:
        InputError: the interval from video_start to video_end is empty, or no frame fits into the
            budget.
    """
    settings = _FrameSettings(preset, vision, pixels, options, name)
    first, last = _frame_range(metadata, settings)
    timestamps = metadata.timestamps[first:last]
    is_whole = len(timestamps) == len(metadata.timestamps)
    duration = metadata.duration if is_whole else video_duration(timestamps, metadata.fps)
    uniform = metadata.fps is not None or len(timestamps) == 1
    if metadata.is_frame_list and options.nframes is None:
        requested = _frame_list_count(len(timestamps), settings)
    else:
        requested = _smart_nframes(len(timestamps), duration, settings, uniform=uniform)
    count = _fit_to_budget(requested, metadata, settings) if preset.strict_budget else requested
    height, width = _frame_size(metadata, count, settings)
    indices = tuple(first + i for i in _sample_indices(timestamps, count, uniform=uniform))
    used, total = len(set(indices)), len(metadata.timestamps)
    repeats = "" if used == count else f" ({count - used} repeated, for their duration)"
    notes = [f"{used} of {total} frames{repeats}, {_format_fps(count, duration)}{width} x {height}"]
    if count < requested:
        tokens = settings.budget / vision.factor**2
        notes.append(f"{requested} frames lowered to {count}, within {tokens:,.0f} tokens")
    elif count < (options.nframes or 0) // 2 * 2:
        notes.append(
            f"num_frames (nframes) {options.nframes} lowered to the {count} frames there are"
        )
    return FramePlan(indices=indices, height=height, width=width, notes=tuple(notes))


@dataclass(frozen=True, slots=True)
class _FrameSettings:
    """Settings that determine the frames of one video."""

    preset: VideoPreset
    vision: VisionConfig
    pixels: PixelLimits
    options: MediaOptions
    name: str

    @property
    def budget(self) -> float:
        """Budget of the video in pixels: the area of one frame, summed over frame pairs."""
        return self.options.total_pixels or self.preset.total_tokens * self.vision.factor**2


def _frame_range(metadata: VideoMetadata, settings: _FrameSettings) -> tuple[int, int]:
    """Return the range [first, last) of the frames between video_start and video_end."""
    start = settings.options.video_start or 0.0
    end = math.inf if settings.options.video_end is None else settings.options.video_end
    # Tolerance of a microsecond: decimal fractions are not the file's timestamps exactly.
    first = bisect_left(metadata.timestamps, start - 1e-6)
    last = bisect_right(metadata.timestamps, end + 1e-6)
    if first >= last:
        interval = f"from {start:g} s" + (f" to {end:g} s" if end < math.inf else "")
        raise InputError(
            f"{settings.name}: no frame {interval}; it lasts {metadata.duration:.1f} s, so change "
            "video_start and video_end"
        )
    return first, last


def _frame_list_count(total: int, settings: _FrameSettings) -> int:
    """Return the number of frames of a frame list: all of them, up to max_frames."""
    count = min(total, settings.options.max_frames or total)
    return min(count, settings.preset.max_frames) if settings.preset.strict_budget else count


def _smart_nframes(total: int, duration: float, settings: _FrameSettings, *, uniform: bool) -> int:
    """Return the number of frames to sample: even, unless the video has fewer than requested."""
    preset, options = settings.preset, settings.options
    if options.nframes is not None:
        count = round(options.nframes / 2) * 2
    else:
        min_frames = math.ceil((options.min_frames or preset.min_frames) / 2) * 2
        max_frames = math.floor((options.max_frames or preset.max_frames) / 2) * 2
        exact = min(max(duration * (options.fps or preset.fps), min_frames), max_frames)
        count = (round if preset.rounding == "nearest" else math.floor)(exact / 2) * 2
    if uniform:  # else one frame may be sampled at several points in time
        count = min(count, total if preset.strict_budget else total // 2 * 2)
    return max(count, 1)


def _frame_size(metadata: VideoMetadata, count: int, settings: _FrameSettings) -> tuple[int, int]:
    """Return (height, width) of `count` frames, within the frame limits and the video's budget."""
    preset, options = settings.preset, settings.options
    height, width, unit = metadata.height, metadata.width, settings.vision.factor**2
    if options.resized_height is not None or (
        metadata.is_frame_list and preset.frame_lists_as_images
    ):
        return target_size(
            height,
            width,
            vision=settings.vision,
            pixels=settings.pixels,
            options=options,
            name=settings.name,
        )
    limits = resolve_pixel_limits(settings.pixels, options, settings.name)
    min_area = min(options.min_pixels or preset.min_frame_tokens * unit, limits.max_pixels)
    max_area = preset.max_frame_tokens * unit
    if options.max_pixels is not None and preset.max_pixels_policy == "within_budget":
        max_area = options.max_pixels
    budget_per_pair = settings.budget / (count + count % 2) * 2
    max_pixels = max(min(max_area, budget_per_pair), int(min_area * preset.min_tokens_slack))
    if options.max_pixels is not None and preset.max_pixels_policy == "override":
        max_pixels = options.max_pixels
    max_pixels = min(max_pixels, limits.max_pixels)
    min_pixels = min_area if preset.upscale_small_frames else min(limits.min_pixels, min_area)
    return smart_resize(
        height,
        width,
        factor=settings.vision.factor,
        min_pixels=min(min_pixels, max_pixels),
        max_pixels=max_pixels,
        name=settings.name,
    )


def _fit_to_budget(count: int, metadata: VideoMetadata, settings: _FrameSettings) -> int:
    """Lower the number of frames until they, at their resulting size, fit into the budget."""
    while True:
        height, width = _frame_size(metadata, count, settings)
        if math.ceil(count / 2) * height * width <= settings.budget:
            return count
        if count <= 2:
            raise InputError(
                f"{settings.name}: one pair of frames of {width} x {height} exceeds the video's "
                f"budget of {settings.budget:,.0f} pixels; raise total_pixels or lower min_pixels"
            )
        count = (count - 1) // 2 * 2


def _sample_indices(timestamps: Sequence[float], count: int, *, uniform: bool) -> list[int]:
    """Sample `count` frames evenly, first and last included: by index; by time if not uniform."""
    if uniform:
        return torch.linspace(0, len(timestamps) - 1, count).round().long().tolist()
    targets = np.linspace(timestamps[0], timestamps[-1], count)
    after = np.searchsorted(timestamps, targets).clip(1, len(timestamps) - 1)
    times = np.asarray(timestamps)
    earlier = targets - times[after - 1] <= times[after] - targets
    return (after - earlier).tolist()


def _format_fps(count: int, duration: float) -> str:
    return f"{count / duration:.3g} fps, " if duration > 0 else ""


def _decode_frames(reader: VideoReader, plan: FramePlan, rules: VideoPreset) -> Tensor | None:
    """Decode the frames of `plan`, each resized at once; None if the metadata has changed."""
    as_images = reader.metadata.is_frame_list and rules.frame_lists_as_images
    resize = _resize_as_image if as_images else _resize_frame
    distinct = sorted(set(plan.indices))
    frames = reader.get_frames_at(distinct, lambda rgb: resize(rgb, plan.height, plan.width))
    if frames is None:
        return None
    positions = {index: position for position, index in enumerate(distinct)}
    return torch.stack([frames[positions[index]] for index in plan.indices])


def _resize_frame(pixels_HWC: np.ndarray, height: int, width: int) -> Tensor:
    """Resize with torch on uint8: the arithmetic of torchvision's v2 resize and transformers."""
    frame_CHW = torch.from_numpy(np.ascontiguousarray(pixels_HWC)).permute(2, 0, 1)
    if frame_CHW.shape[1:] == (height, width):
        return frame_CHW
    return F.interpolate(
        frame_CHW.unsqueeze(0),
        size=(height, width),
        mode="bicubic",
        align_corners=False,
        antialias=True,
    ).squeeze(0)


def _resize_as_image(pixels_HWC: np.ndarray, height: int, width: int) -> Tensor:
    return torch.from_numpy(resize_image(pixels_HWC, height, width))
