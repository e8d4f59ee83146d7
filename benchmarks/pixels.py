"""Image preprocessing time on one core, from JPEG bytes to patches, compared with transformers.

    python benchmarks/pixels.py [--rounds 15]

Both start from the bytes of a photograph-like image; transformers' Qwen2VLImageProcessorPil returns
normalized float32 patches, this library uint8 patches and their digest. The model normalizes them
as its first step, so `with_normalizing_ms` includes that. Interleaved, medians of processor time,
and the time of each of this library's stages. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import format_result
from transformers import Qwen2VLImageProcessorPil

from qwen2vl.config import VisionConfig
from qwen2vl.geometry import Grid
from qwen2vl.model.vision import normalize_pixels
from qwen2vl.processor.image import (
    PixelLimits,
    item_digest,
    patchify,
    preprocess_image,
    resize_image,
    smart_resize,
)
from qwen2vl.processor.media.rgb import open_image
from qwen2vl.processor.media.source import DEFAULT_LIMITS

VISION = VisionConfig()
LIMITS = {"min_pixels": 3136, "max_pixels": 12_845_056}  # of the official checkpoints
SIZES = {"1_megapixel": (1000, 1000), "12_megapixels": (3000, 4000)}


def photograph(height: int, width: int) -> bytes:
    """Return a JPEG of smooth areas with grain, quality 90: about 3 bits a pixel."""
    random = np.random.default_rng(0)
    soft = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    pixels = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = random.normal(0, 12, (-(-height // 2), -(-width // 2), 3)).astype(np.int16)
    pixels += grain.repeat(2, 0).repeat(2, 1)[:height, :width]
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def interleaved_medians(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Time functions interleaved; return the median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(1000 * (time.process_time() - start))
    return {name: round(statistics.median(each[1:]), 2) for name, each in times.items()}


def measure_end_to_end(data: bytes, rounds: int) -> dict[str, float]:
    """Time both libraries, after checking that their patches are equal."""
    processor = Qwen2VLImageProcessorPil(**LIMITS)

    def theirs() -> Any:
        return processor(images=[Image.open(io.BytesIO(data))], return_tensors="pt")

    def ours() -> torch.Tensor:
        pixels = PixelLimits(**LIMITS)
        return preprocess_image(data, vision=VISION, pixels=pixels, name="image").patches_NP

    def normalized() -> torch.Tensor:
        return normalize_pixels(ours(), VISION)

    assert torch.equal(normalized(), theirs()["pixel_values"])
    times_ms = interleaved_medians(
        {"theirs": theirs, "ours": ours, "normalized": normalized}, rounds
    )
    return {
        "theirs_ms": times_ms["theirs"],
        "ours_ms": times_ms["ours"],
        "with_normalizing_ms": times_ms["normalized"],
        "ratio": round(times_ms["theirs"] / times_ms["ours"], 2),
        "ratio_with_normalizing": round(times_ms["theirs"] / times_ms["normalized"], 2),
    }


def measure_stages(data: bytes, rounds: int) -> dict[str, float]:
    """Time each stage of this library on the result of the previous one."""
    rgb = open_image(data, DEFAULT_LIMITS, "image").image
    height, width = smart_resize(rgb.height, rgb.width, factor=VISION.factor, **LIMITS)
    resized = rgb.resize((width, height), Image.Resampling.BICUBIC)
    frames_FCHW = torch.from_numpy(resize_image(resized, height, width)).unsqueeze(0)
    grid = Grid(1, height // VISION.patch_size, width // VISION.patch_size)
    calls: dict[str, Callable[[], Any]] = {
        "decode": lambda: open_image(data, DEFAULT_LIMITS, "image"),
        "resize": lambda: rgb.resize((width, height), Image.Resampling.BICUBIC),
        "planes": lambda: resize_image(resized, height, width),
        "patchify": lambda: patchify(frames_FCHW, VISION),
        "digest": lambda: item_digest(frames_FCHW, grid, VISION),
    }
    return {f"{name}_ms": value for name, value in interleaved_medians(calls, rounds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    numbers = {}
    for name, size in SIZES.items():
        data = photograph(*size)
        count = rounds if name == "1_megapixel" else max(3, rounds // 5)
        numbers[name] = measure_end_to_end(data, count) | measure_stages(data, count)
    print(format_result(numbers))


if __name__ == "__main__":
    main()
