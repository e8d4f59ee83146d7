"""The other side of parity: the same folder, opened and run by transformers alone.

Its tokenizer and chat template, its picture processor, its model in fp32 with eager attention.
From our rooms it takes only what parity starts from: the upright RGB picture, and the frames of a
clip (its own video processor needs torchvision). This is the only module that imports
transformers, an extra: `pip install 'qwen2vl[parity]'`.
(HF: Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil.) Next room: cli/commands/parity.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging

from qwen2vl.eval.parity import Question, Recorder, Side, Trace
from qwen2vl.processor.image import unpatchify
from qwen2vl.processor.media.rgb import open_image
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.processor import Processor

__all__ = ["Prompt", "prepare", "reference_side", "run_reference"]

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
_GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question as transformers prepares it; one entry an item, in prompt order."""

    ids: list[int]
    kinds: tuple[str, ...]
    patches: tuple[Tensor, ...]
    grids: tuple[tuple[int, int, int], ...]


def reference_side(folder: Path, processor: Processor) -> Side:
    """Answer with transformers; the model is loaded for one question and dropped after it.

    `processor` is ours, and only decodes clips.
    """

    def answer(question: Question) -> Trace:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        prompt = prepare(folder, processor, question)
        model = Qwen2VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        return run_reference(model.eval(), prompt)

    return answer


# Preparing ------------------------------------------------------------------------------------


def prepare(folder: Path, processor: Processor, question: Question) -> Prompt:
    """Turn a question into pixels, grids and ids with transformers' own parts."""
    pictures = Qwen2VLImageProcessorPil.from_pretrained(folder)
    kinds = tuple(kind for kind, _ in question.media)
    items = [
        _picture(pictures, source, processor.limits)
        if kind == "image"
        else _clip(pictures, _frames(processor, source))
        for kind, source in question.media
    ]
    grids = tuple(grid for _, grid in items)
    ids = _ids(folder, question, kinds, [t * h * w // pictures.merge_size**2 for t, h, w in grids])
    return Prompt(ids, kinds, tuple(patches for patches, _ in items), grids)


def _picture(
    pictures: Qwen2VLImageProcessorPil, source: Any, limits: MediaLimits
) -> tuple[Tensor, tuple[int, int, int]]:
    rgb, _ = open_image(source, limits, "image")
    made = pictures(rgb, return_tensors="pt")
    t, h, w = made["image_grid_thw"][0].tolist()
    return made["pixel_values"], (t, h, w)


def _clip(
    pictures: Qwen2VLImageProcessorPil, frames_FHWC: np.ndarray
) -> tuple[Tensor, tuple[int, int, int]]:
    """Weave a clip out of pictures: a patch of frames a and b holds a's half, then b's.

    The picture processor doubles each frame in time; the first of every pair gives its first
    half, the second its second.
    """
    made = pictures(list(frames_FHWC), do_resize=False, return_tensors="pt")
    _, h, w = made["image_grid_thw"][0].tolist()
    t = len(frames_FHWC) // pictures.temporal_patch_size
    frames = made["pixel_values"].view(t, 2, h * w, 3, 2, -1)
    woven = torch.stack((frames[:, 0, :, :, 0], frames[:, 1, :, :, 1]), dim=3)
    return woven.flatten(2).flatten(0, 1), (t, h, w)


def _frames(processor: Processor, source: Any) -> np.ndarray:
    """Decode a clip into the frames the model is shown, an even number, already resized."""
    content = [{"type": "video", "video": source}]
    item = processor([{"role": "user", "content": content}]).items[0]
    frames_FCHW = unpatchify(item.patches_NP, item.grid, processor.config.vision)
    return frames_FCHW.permute(0, 2, 3, 1).numpy()


def _ids(
    folder: Path, question: Question, kinds: Sequence[str], counts: Sequence[int]
) -> list[int]:
    """Render the folder's own template and repeat each pad, as HF's Qwen2VLProcessor does."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": question.text}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    expanded = str(text)
    for kind, count in zip(kinds, counts, strict=True):
        expanded = expanded.replace(f"<|{kind}_pad|>", f"<|{kind}_done|>" * count, 1)
    return tokenizer(expanded.replace("_done|>", "_pad|>"))["input_ids"]


# Running --------------------------------------------------------------------------------------


@torch.inference_mode()
def run_reference(model: Qwen2VLForConditionalGeneration, prompt: Prompt) -> Trace:
    """Run one prompt and keep what every step computed, under our names and in our order."""
    positions, rope_delta = _positions(model, prompt)
    with Recorder().listening() as recorder:
        _overhear(recorder, model)
        output = model(
            input_ids=torch.tensor([prompt.ids]),
            attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.int64),
            position_ids=positions[:, None],
            use_cache=False,
            **_by_kind(prompt),
        )
    heard = {
        name: _in_prompt_order(parts, prompt) if name.startswith("vision.") else parts[0][0]
        for name, parts in recorder.heard.items()
    }
    visual: Trace = {}
    if prompt.patches:
        visual = {"pixels": torch.cat(prompt.patches), "grids": torch.tensor(prompt.grids)}
    return {
        **visual,
        "ids": torch.tensor(prompt.ids),
        "positions": positions,
        "rope_delta": torch.tensor(rope_delta),
        **heard,
        "logits": output.logits[0].float(),
    }


def _positions(model: Qwen2VLForConditionalGeneration, prompt: Prompt) -> tuple[Tensor, int]:
    """Take transformers' positions, but let text resume behind a clip's last frame.

    5.23 resumes at max(h, w) / 2 whatever t is; the paper, transformers 4.x and Qwen's own
    training code count t, too. Both agree unless a clip is longer than it is wide.
    """
    if not prompt.kinds:
        return torch.arange(len(prompt.ids)).expand(3, -1), 0
    config: Any = model.config
    pads = {config.image_token_id: 1, config.video_token_id: 2}
    tensors = _by_kind(prompt)
    ids: Any = torch.tensor([prompt.ids])
    types: Any = torch.tensor([[pads.get(token, 0) for token in prompt.ids]])
    batched, delta = model.model.get_rope_index(
        ids, types, tensors.get("image_grid_thw"), tensors.get("video_grid_thw")
    )
    positions, late = batched[:, 0].clone(), 0
    ends = [i + 1 for i in range(len(prompt.ids)) if types[0, i] and not types[0, i + 1]]
    for end, (t, h, w) in zip(ends, prompt.grids, strict=True):
        shift = max(0, t - max(h, w) // config.vision_config.spatial_merge_size)
        positions[:, end:] += shift
        late += shift
    return positions, int(delta) + late


def _by_kind(prompt: Prompt) -> dict[str, Any]:
    """Part one stream of items into the arguments for images and those for videos."""
    arguments: dict[str, Any] = {}
    for kind in dict.fromkeys(prompt.kinds):
        chosen = [i for i, own in enumerate(prompt.kinds) if own == kind]
        arguments[_PIXELS[kind]] = torch.cat([prompt.patches[i] for i in chosen])
        arguments[_GRIDS[kind]] = torch.tensor([prompt.grids[i] for i in chosen])
    return arguments


def _in_prompt_order(calls: list[Tensor], prompt: Prompt) -> Tensor:
    """Join what the tower did for all images, and then for all videos, into one stream again."""
    sizes = [t * h * w for t, h, w in prompt.grids]
    merged = sum(sizes) // sum(len(call) for call in calls)  # 1 before the merger, 4 after it
    rows: dict[str, Iterator[Tensor]] = {}
    for kind, call in zip(sorted(set(prompt.kinds)), calls, strict=True):  # images come first
        own = [n // merged for n, other in zip(sizes, prompt.kinds, strict=True) if other == kind]
        rows[kind] = iter(call.split(own))
    return torch.cat([next(rows[kind]) for kind in prompt.kinds])


def _overhear(recorder: Recorder, model: Qwen2VLForConditionalGeneration) -> None:
    tower, decoder = model.model.visual, model.model.language_model
    recorder.keep_output("vision.patch_embed", tower.patch_embed)
    recorder.keep_output("vision.rotary", tower.rotary_pos_emb, _first_halves)
    for i, block in enumerate(tower.blocks):
        recorder.keep_output(f"vision.block.{i}", block)
    recorder.keep_output("vision.merger", tower.merger)
    recorder.keep_input("text.embeddings", decoder.layers[0], 0)
    recorder.keep_output("text.rotary", decoder.rotary_emb, _first_halves)
    for i, layer in enumerate(decoder.layers):
        recorder.keep_output(f"text.layer.{i}", layer)
    recorder.keep_output("text.norm", decoder.norm)


def _first_halves(rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Drop the repetition of each angle, which our rotation does not store."""
    return tuple(part[..., : part.shape[-1] // 2] for part in rotation)
