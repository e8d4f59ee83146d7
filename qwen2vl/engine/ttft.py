"""Time to first token (TTFT): prompt FLOPs divided by the throughput measured on this machine.

Vision tower and decoder are timed on a small image and a short prompt; the FLOPs of the prompt
include the quadratic cost of attention. The estimate is good to a factor of about two, enough to
decide whether to wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.flops import BatchCounts, inference_flop_counter
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta, vision_seqlens
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import ModelInput

__all__ = ["PromptFlops", "Throughput"]

MIN_SECONDS = 0.05  # shorter runs measure launch overhead rather than throughput


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFlops:
    """Floating-point operations from a prompt to its first token."""

    vision: float
    text: float

    @classmethod
    def from_prompt(cls, prompt: ModelInput, config: Qwen2VLConfig) -> PromptFlops:
        """Count the FLOPs of a prompt as it is."""
        return cls.from_lengths(vision_seqlens(prompt.grids), len(prompt.input_ids), config)

    @classmethod
    def with_max_image_tokens(
        cls, prompt: ModelInput, config: Qwen2VLConfig, image_tokens: int
    ) -> PromptFlops:
        """Count the FLOPs of the prompt with each image reduced to at most `image_tokens`."""
        patches = image_tokens * config.vision.spatial_merge_size**2
        saved = 0
        lengths: list[int] = []
        for item in prompt.items:
            frames = vision_seqlens([item.grid])
            if item.kind == "image" and item.num_tokens > image_tokens:
                saved += item.num_tokens - image_tokens
                frames = [patches]
            lengths += frames
        return cls.from_lengths(lengths, len(prompt.input_ids) - saved, config)

    @classmethod
    def with_frame_fraction(
        cls, prompt: ModelInput, config: Qwen2VLConfig, fraction: float
    ) -> PromptFlops:
        """Count the FLOPs of the prompt with only a fraction of each video's frames."""
        saved = 0
        lengths: list[int] = []
        for item in prompt.items:
            frames = vision_seqlens([item.grid])
            if item.kind == "video":
                num_kept = max(1, round(fraction * len(frames)))
                saved += item.num_tokens - item.num_tokens * num_kept // len(frames)
                frames = frames[:num_kept]
            lengths += frames
        return cls.from_lengths(lengths, len(prompt.input_ids) - saved, config)

    @classmethod
    def from_lengths(
        cls, frames: Sequence[int], num_tokens: int, config: Qwen2VLConfig
    ) -> PromptFlops:
        """Count the FLOPs from the patches of each frame pair and the number of tokens."""
        counter = inference_flop_counter(config)
        return cls(
            vision=counter.count(BatchCounts.from_lengths(frames, [])).model,
            text=counter.count(BatchCounts.from_lengths([], [num_tokens])).model,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """FLOPs per second of vision tower and decoder on this machine."""

    vision: float
    text: float

    @classmethod
    def measure(cls, model: Qwen2VL) -> Throughput:
        """Time both on inputs of increasing size, until a run is long enough to measure."""
        with torch.inference_mode():
            return cls(
                vision=_measure_throughput(
                    (16, 32, 64), lambda side: _vision_benchmark(model, side)
                ),
                text=_measure_throughput(
                    (64, 256, 1024), lambda tokens: _text_benchmark(model, tokens)
                ),
            )

    def estimate_ttft(self, flops: PromptFlops) -> float:
        """Return the estimated time to first token in seconds."""
        return flops.vision / self.vision + flops.text / self.text


def _vision_benchmark(model: Qwen2VL, side: int) -> tuple[float, Callable[[], Tensor]]:
    """Return the FLOPs of an image of side x side patches, and a function that encodes it."""
    vision, device = model.config.vision, model.device
    meta = VisionMeta.build([Grid(1, side, side)], vision.spatial_merge_size).to(device)
    patches_NP = torch.zeros(side * side, vision.patch_dim, dtype=torch.uint8, device=device)
    flops = PromptFlops.from_lengths([side * side], 0, model.config).vision
    return flops, lambda: model.encode(patches_NP, meta)


def _text_benchmark(model: Qwen2VL, tokens: int) -> tuple[float, Callable[[], Tensor]]:
    """Return the FLOPs of a text prompt, and a function that runs its forward."""
    device = model.device
    ids_T = torch.zeros(tokens, dtype=torch.int64, device=device)
    position_ids_3T = torch.arange(tokens, device=device).expand(3, -1)
    meta = AttnMeta.build([tokens]).to(device)
    flops = PromptFlops.from_lengths([], tokens, model.config).text
    return flops, lambda: model(ids_T, position_ids_3T, meta)


def _measure_throughput(
    sizes: Sequence[int], prepare: Callable[[int], tuple[float, Callable[[], Tensor]]]
) -> float:
    """Return FLOPs per second at the first size that takes long enough, or at the last."""
    throughput = 0.0
    for size in sizes:
        flops, run = prepare(size)
        seconds = _min_time(run)
        throughput = flops / seconds
        if seconds > MIN_SECONDS:
            break
    return throughput


def _min_time(run: Callable[[], Tensor]) -> float:
    """Return the shortest of two runs, or of three short ones; the first reads mmapped weights."""
    times = [_time(run), _time(run)]
    if sum(times) < 1:
        times.append(_time(run))
    return min(times)


def _time(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()[0, 0].item()  # .item() synchronizes with the device
    return time.perf_counter() - start
