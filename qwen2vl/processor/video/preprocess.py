"""Video preprocessing: metadata, frame plan, decoding, resizing, patches.

    source -> metadata -> plan_frames: indices, size -> decode, resize -> patchify -> Item

Frames are resized by torch's bicubic with antialias on uint8, as transformers does: once, also
where pixels are not square. A long video is not decoded here, if the caller wants so: its Item gets
a `FramePairStream`, which decodes while the prompt is computed.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.config import VisionConfig
from qwen2vl.geometry import Grid
from qwen2vl.processor.image import PixelLimits, pair_digests, patchify, resize_image
from qwen2vl.processor.inputs import Item
from qwen2vl.processor.media.decoder import LOCAL_DECODER, MediaDecoder
from qwen2vl.processor.media.source import DEFAULT_LIMITS, MediaLimits, copy_to_memory, read_source
from qwen2vl.processor.media.video_metadata import (
    FramesDifferError,
    FrameTransform,
    VideoMetadata,
    VideoReader,
)
from qwen2vl.processor.media.video_source import VideoSource
from qwen2vl.processor.media_options import NO_OPTIONS, MediaOptions
from qwen2vl.processor.video.frame_pairs import FramePairStream, decode_pairs
from qwen2vl.processor.video.frame_plan import FramePlan, plan_frames
from qwen2vl.processor.video.presets import VideoPreset, find_video_preset

__all__ = ["preprocess_video"]


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
    stream_above: int | None = None,
) -> Item:
    """Preprocess one video.

    A source is a video file or an animation, in any form that `preprocess_image` takes, a list of
    images, or an array or tensor (frames, height, width, channels) or with channels second. With
    `stream_above`, a video of more bytes of patches is decoded while it is used (`Item.source`).

    Raises:
        InputError: the video cannot be used, is a still image, or no frame fits into the budget.
        EngineError: the decoder is not available.
    """
    rules = find_video_preset(preset)
    if stream_above is not None:
        source = _reopenable(source, limits, name)
    open_reader = partial(
        decoder.open_video,
        source,
        limits,
        name,
        fps=options.fps or rules.fps,
        apply_exif_orientation=rules.apply_exif_orientation,
    )
    with closing(open_reader()) as reader:

        def plan_from_metadata() -> FramePlan:
            return plan_frames(
                reader.metadata,
                preset=rules,
                vision=vision,
                pixels=pixels,
                options=options,
                name=name,
            )

        plan = plan_from_metadata()
        item = _describe(reader.metadata, plan, vision, name)
        num_bytes = len(plan.indices) * 3 * plan.height * plan.width
        if stream_above is not None and num_bytes > stream_above:
            resize = _resize_of(reader.metadata, plan, rules)
            pairs = decode_pairs(open_reader, reader.metadata, plan.indices, resize, vision, name)
            held_bytes = len(source) if isinstance(source, bytes) else 0
            return replace(item, source=FramePairStream(item.grid.t, pairs, held_bytes))
        frames_FCHW = _decode_frames(reader, plan, rules)
        if frames_FCHW is None:  # the decoded frames differ from the packet timestamps
            plan = plan_from_metadata()
            item = _describe(reader.metadata, plan, vision, name)
            frames_FCHW = _decode_frames(reader, plan, rules)
            assert frames_FCHW is not None, "metadata of decoded frames is exact"
    patches_NP, grid = patchify(frames_FCHW, vision)
    digests = pair_digests(frames_FCHW, grid, vision)
    return replace(item, patches_NP=patches_NP, pair_digests=digests)


def _reopenable(source: VideoSource, limits: MediaLimits, name: str) -> VideoSource:
    """Return a source that can be opened again and is then the same: a URL is downloaded once."""
    source = copy_to_memory(source, limits, name)
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        content = read_source(source, limits, name).content
        assert not isinstance(content, np.ndarray)
        return content
    return source


def _describe(metadata: VideoMetadata, plan: FramePlan, vision: VisionConfig, name: str) -> Item:
    """Return the item of a video, without its patches."""
    num_pairs = -(-len(plan.indices) // vision.temporal_patch_size)
    return Item(
        kind="video",
        patches_NP=torch.empty(0, vision.patch_dim, dtype=torch.uint8),
        grid=Grid(num_pairs, plan.height // vision.patch_size, plan.width // vision.patch_size),
        pair_digests=(),
        name=name,
        original_size=(metadata.height, metadata.width),
        resized_size=(plan.height, plan.width),
        frame_timestamps=tuple(metadata.timestamps[i] for i in plan.indices),
        notes=(*metadata.notes, *plan.notes),
    )


def _decode_frames(reader: VideoReader, plan: FramePlan, rules: VideoPreset) -> Tensor | None:
    """Decode the frames of `plan`, each resized at once; None if the metadata has changed."""
    distinct = sorted(set(plan.indices))
    stream = reader.frames_at(distinct, _resize_of(reader.metadata, plan, rules))
    try:
        with closing(stream):
            frames = list(stream)
    except FramesDifferError:
        return None
    positions = {index: position for position, index in enumerate(distinct)}
    return torch.stack([frames[positions[index]] for index in plan.indices])


def _resize_of(
    metadata: VideoMetadata, plan: FramePlan, rules: VideoPreset
) -> FrameTransform[Tensor]:
    """Return what resizes a frame to the plan's size."""
    as_images = metadata.is_frame_list and rules.frame_lists_as_images
    resize = _resize_as_image if as_images else _resize_frame
    return partial(resize, height=plan.height, width=plan.width)


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
