"""Video presets: the rules of frame sampling and resizing, in which implementations differ.

docs/pixels.md has the table of presets. (Qwen2-VL sec. 2.1, 3.2; qwen_vl_utils: fetch_video,
smart_nframes.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from qwen2vl.errors import InputError

__all__ = ["VIDEO_PRESETS", "VideoPreset", "find_video_preset"]


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
