"""Frame sampling: which frames of a video are decoded, and their size, within a token budget.

`plan_frames` is pure arithmetic on the timestamps, by the rules of a preset (presets.py).
(Qwen2-VL sec. 2.1, 3.2; HF: Qwen2VLVideoProcessor; qwen_vl_utils: fetch_video, smart_nframes.)
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qwen2vl.config import VisionConfig
from qwen2vl.errors import InputError
from qwen2vl.processor.image import (
    PixelLimits,
    resolve_pixel_limits,
    smart_resize,
    target_size,
)
from qwen2vl.processor.media.video_metadata import VideoMetadata, video_duration
from qwen2vl.processor.media_options import NO_OPTIONS, MediaOptions
from qwen2vl.processor.video.presets import VideoPreset

__all__ = ["FramePlan", "plan_frames"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FramePlan:
    """Indices of the sampled frames, in display order (with repeats), and their resized size."""

    indices: tuple[int, ...]
    height: int
    width: int
    notes: tuple[str, ...]


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
    if options.frame_times is not None:
        return _plan_stills(metadata, options.frame_times, settings)
    first, last = _frame_range(metadata, settings)
    if options.frame_interval is not None:
        return _plan_at_interval(metadata, first, last, options.frame_interval, settings)
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


def _plan_stills(
    metadata: VideoMetadata, times: Sequence[float], settings: _FrameSettings
) -> FramePlan:
    """Choose the frame nearest to each time, as a pair of its own: neighbors may be hours apart."""
    timestamps = metadata.timestamps
    if times[-1] > max(metadata.duration, timestamps[-1]) + 1e-6:
        raise InputError(
            f"{settings.name}: no frame at {times[-1]:g} s; it lasts {metadata.duration:.1f} s, so "
            "change frame_times"
        )
    step = settings.vision.temporal_patch_size
    indices = [index for nearest in _nearest(timestamps, times) for index in (nearest,) * step]
    height, width = _frame_size(metadata, len(indices), settings)
    notes = [f"{len(times)} frames, {width} x {height}"]
    return FramePlan(indices=tuple(indices), height=height, width=width, notes=tuple(notes))


def _plan_at_interval(
    metadata: VideoMetadata, first: int, last: int, interval: float, settings: _FrameSettings
) -> FramePlan:
    """Choose the frames nearest to multiples of an interval, from the first frame on.

    Those of a video that has grown are the same: its frame pairs are found in the caches.
    """
    timestamps = metadata.timestamps[first:last]
    count = math.floor((timestamps[-1] - timestamps[0]) / interval + 1e-6) + 1
    limit = settings.options.max_frames or settings.preset.max_frames
    if count > limit:
        raise InputError(
            f"{settings.name}: a frame every {interval:g} s would be {count:,}, limit is "
            f"{limit:,}; raise max_frames, with total_pixels, or make frame_interval longer"
        )
    times = [timestamps[0] + number * interval for number in range(count)]
    indices = tuple(first + index for index in _nearest(timestamps, times))
    height, width = _frame_size(metadata, count, settings)
    note = f"{len(set(indices))} of {len(metadata.timestamps)} frames, one every {interval:g} s, "
    return FramePlan(
        indices=indices, height=height, width=width, notes=(f"{note}{width} x {height}",)
    )


def _nearest(timestamps: Sequence[float], times: Sequence[float] | np.ndarray) -> list[int]:
    """Return the index of the frame nearest to each time; of two as near, the earlier."""
    known, wanted = np.asarray(timestamps), np.asarray(times)
    after = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    before = (after - 1).clip(min=0)
    is_earlier = wanted - known[before] <= known[after] - wanted
    return np.where(is_earlier, before, after).tolist()


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
    default = settings.preset.max_frames if settings.preset.strict_budget else total
    return min(total, settings.options.max_frames or default)


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
    return _nearest(timestamps, np.linspace(timestamps[0], timestamps[-1], count))


def _format_fps(count: int, duration: float) -> str:
    return f"{count / duration:.3g} fps, " if duration > 0 else ""
