"""Segments of a long video: several items, with the time as text before each, and subtitles.

    <12:30><|vision_start|>32 frame pairs<|vision_end|>text that is said meanwhile
    <12:46><|vision_start|> ...

Within one item the temporal positions grow with each pair, so that the question is far from the
height and width positions of even the last frames; videos in training had up to MAX_TRAINED_PAIRS.
A new item begins near the text before it, and the model learns what time it is. A question about a
time can be answered with it. (Not of the paper: LiveCC and StreamingVLM interleave times as text.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from qwen2vl.processor.content import MediaPart, Part, TextPart, add_param
from qwen2vl.processor.inputs import Item, PairSourceView
from qwen2vl.processor.messages import Message
from qwen2vl.processor.video.subtitles import Cue

__all__ = ["MAX_TRAINED_PAIRS", "format_time", "segment_videos", "split_into_segments"]

MAX_TRAINED_PAIRS = 384  # 768 frames, of Qwen2-VL's own training
DEFAULT_FRAMES = 64  # of a segment
FRAMES_PER_PAIR = 2


def segment_videos(
    messages: list[Message],
    media: Sequence[MediaPart],
    items: Sequence[Item],
    read_subtitles: Callable[[MediaPart, str], list[Cue]],
) -> tuple[list[Message], list[Item]]:
    """Replace videos by their segments with the texts between them, where that is wanted.

    Videos of more pairs than in training, and those with subtitles, are divided by default. A video
    that is not divided is one item, as in the paper.

    Args:
        messages: a conversation.
        media: its images and videos, in prompt order.
        items: what they were preprocessed to.
        read_subtitles: reads those of a video, given its part and its name.

    Returns:
        The messages with the new parts, and the items of these, in prompt order.
    """
    new_parts: dict[int, list[Part]] = {}  # by id of the part that they replace
    new_items: list[Item] = []
    for part, item in zip(media, items, strict=True):
        options, cues = part.options, list[Cue]()
        if options.subtitles is not None:
            with add_param(part.path):
                cues = read_subtitles(part, item.name)
        frames = options.segment_frames
        if frames is None and (options.subtitles is not None or item.grid.t > MAX_TRAINED_PAIRS):
            frames = DEFAULT_FRAMES
        if frames is None:
            new_items.append(item)
            continue
        segments = split_into_segments(item, frames, cues)
        new_items += [segment for _, segment, _ in segments]
        new_parts[id(part)] = [
            new
            for before, _, after in segments
            for new in (TextPart(before, is_context=True), replace(part), TextPart(after, True))
            if new != TextPart("", True)
        ]
    if not new_parts:
        return messages, new_items

    def divided(message: Message) -> Message:
        parts = (new for old in message.parts for new in new_parts.get(id(old), [old]))
        return replace(message, parts=tuple(parts))

    return [divided(message) for message in messages], new_items


def split_into_segments(
    item: Item, frames: int, cues: Sequence[Cue] = ()
) -> list[tuple[str, Item, str]]:
    """Divide a video: for each segment the text before, the item, and the text after.

    Args:
        item: a video; its notes stay with the first segment.
        frames: sampled frames of a segment; an odd number is rounded up.
        cues: subtitles, which follow the segment in whose time they begin.
    """
    pairs = -(-frames // FRAMES_PER_PAIR)
    starts = range(0, item.grid.t, pairs)
    segments: list[tuple[str, Item, str]] = []
    for start in starts:
        segment = _part(item, start, min(start + pairs, item.grid.t))
        begin = segment.frame_timestamps[0]
        is_last = start == starts[-1]
        end = float("inf") if is_last else item.frame_timestamps[(start + pairs) * FRAMES_PER_PAIR]
        first = 0.0 if start == 0 else begin
        spoken = [cue.text for cue in cues if first <= cue.start < end]
        segments.append((f"<{format_time(begin)}>", segment, _after(spoken)))
    return segments


def format_time(seconds: float) -> str:
    """Return mm:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def _after(spoken: Sequence[str]) -> str:
    return "Subtitles: " + " ".join(spoken) + "\n" if spoken else ""


def _part(item: Item, start: int, stop: int) -> Item:
    area = item.grid.h * item.grid.w
    frames = slice(start * FRAMES_PER_PAIR, stop * FRAMES_PER_PAIR)
    return replace(
        item,
        grid=item.grid._replace(t=stop - start),
        patches_NP=item.patches_NP[area * start : area * stop],
        pair_digests=item.pair_digests[start:stop],
        source=None if item.source is None else PairSourceView(item.source, start),
        frame_timestamps=item.frame_timestamps[frames],
        notes=item.notes if start == 0 else (),
    )
