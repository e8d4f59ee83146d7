"""How long from a JPEG's bytes to patches, on one core, ours beside transformers'?

    python benchmarks/pixels.py [--rounds 15]

Both begin with the bytes of a photograph-like picture; transformers' Qwen2VLImageProcessorPil ends
with normalized float32 patches, ours with uint8 ones and their digest. Our model normalizes them
as its first step, so `with_normalizing_ms` adds that. Interleaved, medians of processor time, and
where ours goes, stage by stage. Prints one line for results.md.
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
from record import line
from transformers import Qwen2VLImageProcessorPil

from qwen2vl.config import VisionConfig
from qwen2vl.geometry import Grid
from qwen2vl.model.vision import normalize_pixels
from qwen2vl.processor.image import (
    PixelLimits,
    image_item,
    item_digest,
    patchify,
    resize_picture,
    smart_resize,
)
from qwen2vl.processor.media.rgb import open_image
from qwen2vl.processor.media.source import DEFAULT_LIMITS

VISION = VisionConfig()
LIMITS = {"min_pixels": 3136, "max_pixels": 12_845_056}  # of the official checkpoints
SIZES = {"1_megapixel": (1000, 1000), "12_megapixels": (3000, 4000)}


def photograph(height: int, width: int) -> bytes:
    """Encode large soft areas under grain, at quality 90: about 3 bits a pixel."""
    random = np.random.default_rng(0)
    soft = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    pixels = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = random.normal(0, 12, (-(-height // 2), -(-width // 2), 3)).astype(np.int16)
    pixels += grain.repeat(2, 0).repeat(2, 1)[:height, :width]
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def medians(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Take turns; give the median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(1000 * (time.process_time() - start))
    return {name: round(statistics.median(each[1:]), 2) for name, each in times.items()}


def whole(data: bytes, rounds: int) -> dict[str, float]:
    """Measure both ways, having seen that they give the same patches."""
    processor = Qwen2VLImageProcessorPil(**LIMITS)

    def theirs() -> Any:
        return processor(images=[Image.open(io.BytesIO(data))], return_tensors="pt")

    def ours() -> torch.Tensor:
        pixels = PixelLimits(**LIMITS)
        return image_item(data, vision=VISION, pixels=pixels, name="picture").patches_NP

    def normalized() -> torch.Tensor:
        return normalize_pixels(ours(), VISION)

    assert torch.equal(normalized(), theirs()["pixel_values"])
    found = medians({"theirs": theirs, "ours": ours, "normalized": normalized}, rounds)
    return {
        "theirs_ms": found["theirs"],
        "ours_ms": found["ours"],
        "with_normalizing_ms": found["normalized"],
        "ratio": round(found["theirs"] / found["ours"], 2),
        "ratio_with_normalizing": round(found["theirs"] / found["normalized"], 2),
    }


def stages(data: bytes, rounds: int) -> dict[str, float]:
    """Measure each of our steps on the result of the one before."""
    rgb, _ = open_image(data, DEFAULT_LIMITS, "picture")
    height, width = smart_resize(rgb.height, rgb.width, factor=VISION.factor, **LIMITS)
    resized = rgb.resize((width, height), Image.Resampling.BICUBIC)
    frames_FCHW = torch.from_numpy(resize_picture(resized, height, width)).unsqueeze(0)
    grid = Grid(1, height // VISION.patch_size, width // VISION.patch_size)
    calls: dict[str, Callable[[], Any]] = {
        "decode": lambda: open_image(data, DEFAULT_LIMITS, "picture"),
        "resize": lambda: rgb.resize((width, height), Image.Resampling.BICUBIC),
        "planes": lambda: resize_picture(resized, height, width),
        "patchify": lambda: patchify(frames_FCHW, VISION),
        "digest": lambda: item_digest(frames_FCHW, grid, VISION),
    }
    return {f"{name}_ms": value for name, value in medians(calls, rounds).items()}


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
        numbers[name] = whole(data, count) | stages(data, count)
    print(line(numbers))


if __name__ == "__main__":
    main()
