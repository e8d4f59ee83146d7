"""What the pixels of test files have to be: numpy's arithmetic, and ImageMagick as the judge."""

from __future__ import annotations

import io
import subprocess
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from qwen2vl.processor.media.rgb import open_image
from qwen2vl.processor.media.source import DEFAULT_LIMITS
from tests.media import smooth

HEIGHT, WIDTH = 14, 22
# Colors are not managed: no profile, and a gamma chunk changes nothing. CMYK becomes RGB by
# subtraction, then transparent pixels become white.
_PLAIN = ("-set", "colorspace", "sRGB")
_CONVERTED = ("-colorspace", "sRGB")
_ON_WHITE = ("-auto-orient", "-background", "white", "-alpha", "remove", "-alpha", "off")


class Case(NamedTuple):
    """A file, and its pixels (height, width, 3), which need not be whole numbers."""

    data: bytes
    pixels: np.ndarray


def open_rgb(data: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the pixels (height, width, 3) that the model gets, before resizing, and the notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's warnings must not reach the user
        image, notes, _ = open_image(data, DEFAULT_LIMITS, "image 1")
    assert image.mode == "RGB"
    return np.asarray(image), notes


def samples(bits: int, count: int) -> np.ndarray:
    """Return (HEIGHT, WIDTH, count) values of `bits` bits: smooth up to 8, random of 16."""
    if bits > 8:
        generator = np.random.default_rng(bits + count)
        return generator.integers(0, 1 << bits, (HEIGHT, WIDTH, count))
    planes = [smooth(HEIGHT, WIDTH, seed) for seed in range(-(-count // 3))]
    return np.concatenate(planes, 2).astype(int)[..., :count] >> (8 - bits)


def fractions(values: np.ndarray, bits: int) -> np.ndarray:
    """Return values of `bits` bits as fractions of the largest."""
    return values / ((1 << bits) - 1)


def rgb_of(colors: np.ndarray, alpha: np.ndarray | float = 1.0) -> np.ndarray:
    """Return gray or RGB fractions as values to 255, on white."""
    return np.broadcast_to(255 * (colors * alpha + 1 - alpha), (*colors.shape[:2], 3))


def rgb_of_cmyk(inks: np.ndarray) -> np.ndarray:
    """Return RGB fractions of fractions of ink."""
    return (1 - inks[..., :3]) * (1 - inks[..., 3:])


def rgb_of_ycbcr(values: np.ndarray, bits: int = 8) -> np.ndarray:
    """Return RGB fractions of YCbCr, whose chroma is 0 at half of the range. (ITU T.871, 7.)"""
    luma, cb, cr = np.moveaxis(values - np.array([0.0, 1 << bits - 1, 1 << bits - 1]), 2, 0)
    channels = (luma + 1.402 * cr, luma - 0.344136 * cb - 0.714136 * cr, luma + 1.772 * cb)
    return np.clip(np.stack(channels, 2) / ((1 << bits) - 1), 0, 1)


def is_close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether pixels are of one size, and nowhere more than 1 of 255 apart."""
    if found.shape != expected.shape:
        return False
    return bool(np.abs(found.astype(float) - expected).max() <= 1)


def differences_from_imagemagick(files: Mapping[str, bytes], suffix: str) -> list[str]:
    """Return the names of the files whose pixels differ from ImageMagick's by more than 1 of 255.

    One process reads all files, because starting it takes most of its time.
    """
    names = list(files)
    pixels = imagemagick_pixels([files[name] for name in names], suffix)
    return [
        name
        for name, expected in zip(names, pixels, strict=True)
        if not is_close(open_rgb(files[name])[0], expected)
    ]


def imagemagick_pixels(files: Sequence[bytes], suffix: str) -> list[np.ndarray]:
    """Return the pixels that ImageMagick reads of the first frame of each file, on white."""
    colors = _PLAIN if suffix == "png" else _CONVERTED
    with tempfile.TemporaryDirectory() as folder:
        command: list[str] = ["convert", "-quiet", "-depth", "8"]
        for number, data in enumerate(files):
            path = Path(folder, f"{number}.{suffix}")
            path.write_bytes(data)
            whole = ("-coalesce",) if suffix == "gif" else ()  # frames on their canvas
            command += [f"{path}[0]", *whole, *colors, *_ON_WHITE]
            command += ["-depth", "8", "-write", f"ppm:{path}.ppm", "+delete"]
        subprocess.run([*command, "xc:white", "null:"], check=True, timeout=60)
        found = [
            Path(folder, f"{number}.{suffix}.ppm").read_bytes() for number in range(len(files))
        ]
    return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in found]
