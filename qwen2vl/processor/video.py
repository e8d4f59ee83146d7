"""Which frames of a video the model sees, and at which size: presets, plan, item.

    source -> clip.py: timeline -> plan_frames: indices, size -> decode, resize -> patchify -> Item

A preset fixes everything that other implementations have fixed differently; `plan_frames` is pure
arithmetic on a timeline. Frames are resized by torch's bicubic with antialias on uint8, as
transformers does. It must not know decoders. (Qwen2-VL sec. 2.1, 3.2; docs/pixels.md has the
table.) Next room: processor.py.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
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
    pixel_limits,
    requested_size,
    resize_picture,
    smart_resize,
)
from qwen2vl.processor.inputs import Item
from qwen2vl.processor.media.clip import VideoSource, open_clip
from qwen2vl.processor.media.source import DEFAULT_LIMITS, NO_OPTIONS, MediaLimits, MediaOptions
from qwen2vl.processor.media.timeline import Clip, Timeline, clip_seconds

__all__ = ["PRESETS", "Plan", "VideoPreset", "find_preset", "plan_frames", "video_item"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoPreset:
    """One way to choose frames. Areas are in vision tokens of one pair of frames."""

    fps: float = 2.0  # frames taken a second
    min_frames: int = 4
    max_frames: int = 768
    frame_min_tokens: int = 128  # frames are not shrunk below this for the budget's sake
    frame_max_tokens: int = 768
    total_tokens: float  # budget of a whole video
    rounding: Literal["nearest", "down"]  # of the frame count, to an even number
    hard_budget: bool = False  # where the smallest frames exceed the budget, take fewer
    enlarge: bool = True  # frames smaller than frame_min_tokens are enlarged to it
    floor_slack: float = 1.05  # the budget's share never falls below the floor times this
    user_max: Literal["wins", "lowers", "within_budget"]  # what max_pixels in a message does
    lists_as_images: bool = False  # listed frames take the limits and the resize of pictures
    turn_pictures: bool = False  # EXIF orientation of pictures and listed frames


PRESETS: Mapping[str, VideoPreset] = MappingProxyType(
    {
        "paper": VideoPreset(
            total_tokens=16384,
            rounding="nearest",
            hard_budget=True,
            enlarge=False,
            floor_slack=1.0,
            user_max="within_budget",
            turn_pictures=True,
        ),
        "qwen_vl_utils_0_0_8": VideoPreset(
            total_tokens=24576, rounding="nearest", user_max="wins", lists_as_images=True
        ),
        "qwen_vl_utils_0_0_14": VideoPreset(
            total_tokens=0.9 * 128_000, rounding="down", user_max="lowers"
        ),
    }
)


def find_preset(name: str) -> VideoPreset:
    """Look a preset up.

    Raises:
        InputError: there is none of this name; the text lists them.
    """
    if name not in PRESETS:
        raise InputError(f"unknown video preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The frames to take, in display order (one may come twice), and their size."""

    indices: tuple[int, ...]
    height: int
    width: int
    notes: tuple[str, ...]


def video_item(
    source: VideoSource,
    *,
    vision: VisionConfig,
    pixels: PixelLimits,
    preset: str = "paper",
    options: MediaOptions = NO_OPTIONS,
    limits: MediaLimits = DEFAULT_LIMITS,
    name: str,
) -> Item:
    """Make one video ready for the model.

    A source is what `image_item` takes (an animation or a picture is a clip, too), a list of
    pictures, or an array (frames, height, width, channels).

    Raises:
        InputError: the video cannot be used, or the options leave no room for it.
    """
    rules = find_preset(preset)
    rate = options.fps or rules.fps
    clip = open_clip(source, limits, name, rate=rate, turn=rules.turn_pictures)

    def choose() -> Plan:
        return plan_frames(
            clip.timeline, preset=rules, vision=vision, pixels=pixels, options=options, name=name
        )

    plan = choose()
    frames_FCHW = _decode(clip, plan, rules)
    if frames_FCHW is None:  # the decoded frames are not those that the packets promised
        plan = choose()
        frames_FCHW = _decode(clip, plan, rules)
        assert frames_FCHW is not None, "a timeline of decoded frames holds"
    patches_NP, grid = patchify(frames_FCHW, vision)
    return Item(
        kind="video",
        patches_NP=patches_NP,
        grid=grid,
        digest=item_digest(frames_FCHW, grid, vision),
        name=name,
        size_given=(clip.timeline.height, clip.timeline.width),
        size_seen=(plan.height, plan.width),
        frame_times=tuple(clip.timeline.times[i] for i in plan.indices),
        notes=(*clip.timeline.notes, *plan.notes),
    )


def plan_frames(
    timeline: Timeline,
    *,
    preset: VideoPreset,
    vision: VisionConfig,
    pixels: PixelLimits,
    options: MediaOptions = NO_OPTIONS,
    name: str = "video",
) -> Plan:
    """Choose frames and their size within the budget.

    Raises:
        InputError: the part asked for is empty, or no frame fits into the budget.
    """
    ask = _Ask(preset, vision, pixels, options, name)
    first, last = _window(timeline, ask)
    times = timeline.times[first:last]
    whole = len(times) == len(timeline.times)
    seconds = timeline.seconds if whole else clip_seconds(times, timeline.rate)
    uniform = timeline.rate is not None or len(times) == 1
    if timeline.listed and options.nframes is None:
        wanted = _listed_count(len(times), ask)
    else:
        wanted = _frame_count(len(times), seconds, ask, uniform=uniform)
    count = _affordable(wanted, timeline, ask) if preset.hard_budget else wanted
    height, width = _frame_size(timeline, count, ask)
    indices = tuple(first + i for i in _indices(times, count, uniform=uniform))
    used, total = len(set(indices)), len(timeline.times)
    repeats = "" if used == count else f" ({count - used} again, for their length)"
    notes = [f"{used} of {total} frames{repeats}, {_rate(count, seconds)}{width} x {height}"]
    if count < wanted:
        tokens = ask.budget / vision.factor**2
        notes.append(f"{wanted} frames lowered to {count}, within {tokens:,.0f} tokens")
    elif count < (options.nframes or 0) // 2 * 2:
        notes.append(f"nframes {options.nframes} lowered to the {count} frames there are")
    return Plan(indices=indices, height=height, width=width, notes=tuple(notes))


@dataclass(frozen=True, slots=True)
class _Ask:
    """What travels together through the plan of one video."""

    preset: VideoPreset
    vision: VisionConfig
    pixels: PixelLimits
    options: MediaOptions
    name: str

    @property
    def budget(self) -> float:
        """Pixels of one frame, summed over pairs of frames."""
        return self.options.total_pixels or self.preset.total_tokens * self.vision.factor**2


def _window(timeline: Timeline, ask: _Ask) -> tuple[int, int]:
    """Find the frames between video_start and video_end: [first, last)."""
    start = ask.options.video_start or 0.0
    end = math.inf if ask.options.video_end is None else ask.options.video_end
    # A microsecond of grace: the user's decimal fractions are not the file's.
    first = bisect_left(timeline.times, start - 1e-6)
    last = bisect_right(timeline.times, end + 1e-6)
    if first >= last:
        asked = f"from {start:g} s" + (f" to {end:g} s" if end < math.inf else "")
        raise InputError(
            f"{ask.name}: no frame {asked}; it lasts {timeline.seconds:.1f} s, so change "
            "video_start and video_end"
        )
    return first, last


def _listed_count(total: int, ask: _Ask) -> int:
    """Take every frame that the user listed, up to the limit."""
    count = min(total, ask.options.max_frames or total)
    return min(count, ask.preset.max_frames) if ask.preset.hard_budget else count


def _frame_count(total: int, seconds: float, ask: _Ask, *, uniform: bool) -> int:
    """Count the frames to take: even, but for a clip that has fewer than asked for."""
    preset, options = ask.preset, ask.options
    if options.nframes is not None:
        count = round(options.nframes / 2) * 2
    else:
        least = math.ceil((options.min_frames or preset.min_frames) / 2) * 2
        most = math.floor((options.max_frames or preset.max_frames) / 2) * 2
        exact = min(max(seconds * (options.fps or preset.fps), least), most)
        count = (round if preset.rounding == "nearest" else math.floor)(exact / 2) * 2
    if uniform:  # else one frame may stand for several moments
        count = min(count, total if preset.hard_budget else total // 2 * 2)
    return max(count, 1)


def _frame_size(timeline: Timeline, count: int, ask: _Ask) -> tuple[int, int]:
    """Size `count` frames: within the limits of a frame and their share of the budget."""
    preset, options = ask.preset, ask.options
    height, width, unit = timeline.height, timeline.width, ask.vision.factor**2
    if options.resized_height is not None or (timeline.listed and preset.lists_as_images):
        return requested_size(
            height, width, vision=ask.vision, pixels=ask.pixels, options=options, name=ask.name
        )
    limits = pixel_limits(ask.pixels, options, ask.name)
    floor = min(options.min_pixels or preset.frame_min_tokens * unit, limits.max_pixels)
    ceiling = preset.frame_max_tokens * unit
    if options.max_pixels is not None and preset.user_max == "within_budget":
        ceiling = options.max_pixels
    share = ask.budget / (count + count % 2) * 2
    most = max(min(ceiling, share), int(floor * preset.floor_slack))
    if options.max_pixels is not None and preset.user_max == "wins":
        most = options.max_pixels
    most = min(most, limits.max_pixels)
    least = floor if preset.enlarge else min(limits.min_pixels, floor)
    return smart_resize(
        height,
        width,
        factor=ask.vision.factor,
        min_pixels=min(least, most),
        max_pixels=most,
        name=ask.name,
    )


def _affordable(count: int, timeline: Timeline, ask: _Ask) -> int:
    """Lower the count until its frames, at the size they then have, fit into the budget."""
    while True:
        height, width = _frame_size(timeline, count, ask)
        if math.ceil(count / 2) * height * width <= ask.budget:
            return count
        if count <= 2:
            raise InputError(
                f"{ask.name}: one pair of frames of {width} x {height} exceeds the video's budget "
                f"of {ask.budget:,.0f} pixels; raise total_pixels or lower min_pixels"
            )
        count = (count - 1) // 2 * 2


def _indices(times: Sequence[float], count: int, *, uniform: bool) -> list[int]:
    """Spread `count` frames evenly, first and last included: by number, or by time with gaps."""
    if uniform:
        return torch.linspace(0, len(times) - 1, count).round().long().tolist()
    targets = np.linspace(times[0], times[-1], count)
    after = np.searchsorted(times, targets).clip(1, len(times) - 1)
    stamps = np.asarray(times)
    earlier = targets - stamps[after - 1] <= stamps[after] - targets
    return (after - earlier).tolist()


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds:.3g} fps, " if seconds > 0 else ""


def _decode(clip: Clip, plan: Plan, rules: VideoPreset) -> Tensor | None:
    """Decode the frames of `plan`, each resized at once; None where the clip must be replanned."""
    as_images = clip.timeline.listed and rules.lists_as_images
    resize = _resize_as_picture if as_images else _resize_as_frame
    distinct = sorted(set(plan.indices))
    kept = clip.frames(distinct, lambda rgb: resize(rgb, plan.height, plan.width))
    if kept is None:
        return None
    places = {index: place for place, index in enumerate(distinct)}
    return torch.stack([kept[places[index]] for index in plan.indices])


def _resize_as_frame(pixels_HWC: np.ndarray, height: int, width: int) -> Tensor:
    """Resize by torch on uint8: what torchvision's v2 resize, and so transformers, computes."""
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


def _resize_as_picture(pixels_HWC: np.ndarray, height: int, width: int) -> Tensor:
    return torch.from_numpy(resize_picture(pixels_HWC, height, width))
