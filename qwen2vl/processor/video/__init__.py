"""Preprocessing of videos: rules of sampling, frame plan, patches.

Long ones are decoded while they are used (frame_pairs.py), and divided into segments with times and
subtitles between them (segments.py).
"""

from qwen2vl.processor.video.frame_plan import FramePlan, plan_frames
from qwen2vl.processor.video.preprocess import preprocess_video
from qwen2vl.processor.video.presets import VIDEO_PRESETS, find_video_preset
from qwen2vl.processor.video.segments import segment_videos

__all__ = [
    "VIDEO_PRESETS",
    "FramePlan",
    "find_video_preset",
    "plan_frames",
    "preprocess_video",
    "segment_videos",
]
