"""How long until the first word? Arithmetic on the prompt, divided by a speed measured here.

The two towers are timed on a small picture and a few ids; the prompt's operations are counted
with the attention's squares. Good to a factor of about two, which is what somebody needs who
decides whether to wait. It must not know who asks. Next room: cli/prompt_summary.py, which says it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta, frame_lengths
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import ModelInput

__all__ = ["Speed", "Work"]

LEAST_SECONDS = 0.05  # below this, small models spend their time between the operations


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Floating-point operations between a prompt and its first word."""

    vision: float
    text: float

    @classmethod
    def of(cls, prompt: ModelInput, config: Qwen2VLConfig) -> Work:
        """Count for a prompt as it is."""
        return cls._count(frame_lengths(prompt.grids), len(prompt.input_ids), config)

    @classmethod
    def at_most(cls, prompt: ModelInput, config: Qwen2VLConfig, image_tokens: int) -> Work:
        """Count for the same prompt with every image shrunk to at most `image_tokens`."""
        patches = image_tokens * config.vision.spatial_merge_size**2
        saved = 0
        lengths: list[int] = []
        for item in prompt.items:
            frames = frame_lengths([item.grid])
            if item.kind == "image" and item.num_tokens > image_tokens:
                saved += item.num_tokens - image_tokens
                frames = [patches]
            lengths += frames
        return cls._count(lengths, len(prompt.input_ids) - saved, config)

    @classmethod
    def with_frames(cls, prompt: ModelInput, config: Qwen2VLConfig, share: float) -> Work:
        """Count for the same prompt with only a share of each clip's frames."""
        saved = 0
        lengths: list[int] = []
        for item in prompt.items:
            frames = frame_lengths([item.grid])
            if item.kind == "video":
                kept = max(1, round(share * len(frames)))
                saved += item.num_tokens - item.num_tokens * kept // len(frames)
                frames = frames[:kept]
            lengths += frames
        return cls._count(lengths, len(prompt.input_ids) - saved, config)

    @classmethod
    def _count(cls, lengths: Sequence[int], tokens: int, config: Qwen2VLConfig) -> Work:
        return cls(vision=_vision_flops(lengths, config), text=_text_flops(tokens, config))


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Operations a second that each tower reaches on this machine."""

    vision: float
    text: float

    @classmethod
    def measure(cls, model: Qwen2VL) -> Speed:
        """Time both towers on random input, larger and larger until the clock says something."""
        with torch.inference_mode():
            return cls(
                vision=_rate((16, 32, 64), lambda side: _probe_vision(model, side)),
                text=_rate((64, 256, 1024), lambda tokens: _probe_text(model, tokens)),
            )

    def seconds(self, work: Work) -> float:
        """Predict the time to the first word."""
        return work.vision / self.vision + work.text / self.text


def _vision_flops(lengths: Sequence[int], config: Qwen2VLConfig) -> float:
    vision = config.vision
    width, num_patches = vision.embed_dim, sum(lengths)
    joined = width * vision.spatial_merge_size**2
    per_patch = vision.depth * (4 + 2 * vision.mlp_ratio) * width**2 + vision.patch_dim * width
    merger = joined * (joined + vision.hidden_size)
    attended = vision.depth * 2 * width * sum(n * n for n in lengths)
    return 2.0 * (num_patches * per_patch + num_patches * width / joined * merger + attended)


def _text_flops(tokens: int, config: Qwen2VLConfig) -> float:
    text = config.text
    width, kv = text.hidden_size, text.num_key_value_heads * text.head_dim
    per_layer = 2 * width * (width + kv) + 3 * width * text.intermediate_size
    attended = tokens * tokens * width  # scores and values, half of each for causality
    return 2.0 * text.num_hidden_layers * (tokens * per_layer + attended)


def _probe_vision(model: Qwen2VL, side: int) -> tuple[float, Callable[[], Tensor]]:
    """Prepare a picture of side x side patches: its operations, and what does them."""
    vision, device = model.config.vision, model.device
    meta = VisionMeta.build([Grid(1, side, side)], vision.spatial_merge_size).to(device)
    patches_NP = torch.zeros(side * side, vision.patch_dim, dtype=torch.uint8, device=device)
    return _vision_flops([side * side], model.config), lambda: model.encode(patches_NP, meta)


def _probe_text(model: Qwen2VL, tokens: int) -> tuple[float, Callable[[], Tensor]]:
    """Prepare a prompt of so many words, likewise."""
    device = model.device
    ids_T = torch.zeros(tokens, dtype=torch.int64, device=device)
    places_3T = torch.arange(tokens, device=device).expand(3, -1)
    meta = AttnMeta.build([tokens]).to(device)
    return _text_flops(tokens, model.config), lambda: model(ids_T, places_3T, meta)


def _rate(
    sizes: Sequence[int], prepare: Callable[[int], tuple[float, Callable[[], Tensor]]]
) -> float:
    """Return operations a second at the first size that takes long enough, or at the last."""
    rate = 0.0
    for size in sizes:
        flops, run = prepare(size)
        seconds = _best_time(run)
        rate = flops / seconds
        if seconds > LEAST_SECONDS:
            break
    return rate


def _best_time(run: Callable[[], Tensor]) -> float:
    """Time two runs, or three short ones; the first also reads memory-mapped weights."""
    times = [_time(run), _time(run)]
    if sum(times) < 1:
        times.append(_time(run))
    return min(times)


def _time(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()[0, 0].item()  # asking for a number waits for the device
    return time.perf_counter() - start
