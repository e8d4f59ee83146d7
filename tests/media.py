"""Images and videos encoded in memory for tests, valid and damaged."""

from __future__ import annotations

import gc
import io
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from qwen2vl.config import VisionConfig
from qwen2vl.processor.image import PixelLimits, preprocess_image
from qwen2vl.processor.inputs import Item
from qwen2vl.processor.media.source import DEFAULT_LIMITS, MediaLimits
from qwen2vl.processor.media.video_metadata import FramesDifferError, VideoReader
from qwen2vl.processor.media_options import MediaOptions
from qwen2vl.processor.video import preprocess_video

VISION = VisionConfig()
PIXELS = PixelLimits(min_pixels=3136, max_pixels=12_845_056)  # of the official checkpoints
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return a colored image with smooth areas like a photograph: (height, width, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """Encode an image to bytes."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@contextmanager
def uncollected_decoder() -> Iterator[None]:
    """Leave a video scaler as uncollected garbage; freed in a forked process, it never returns.

    It waits for its threads, which exist in the parent alone.
    """
    gc.disable()
    try:
        frame = av.VideoFrame.from_ndarray(noise(480, 640), format="rgb24")
        cycle: list[Any] = [frame, frame.reformat(format="yuv420p", width=320)]
        cycle.append(cycle)
        del frame, cycle
        yield
    finally:
        gc.enable()


def animation(kind: str, count: int = 4, **options: Any) -> bytes:
    """Encode `count` frames of 40 x 60 pixels, each of one gray level: 0, 50, 100, ..."""
    frames = [Image.new("RGB", (60, 40), (50 * i,) * 3) for i in range(count)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def png_header(width: int, height: int, raster: bytes = b"\0\0\0\0") -> bytes:
    """Return a PNG whose header declares a size, with almost no pixel data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(raster, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def encoded_video(
    count: int = 30,
    *,
    rate: int = 10,
    width: int = 64,
    height: int = 48,
    codec: str = "libx264",
    container: str = "mp4",
    pixel_format: str = "yuv420p",
    stamps: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    """Encode a video; frame i has gray level 8 * i at its left and is bright at its top right.

    `stamps` are the frames' times in units of 1 / rate.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        for i in range(count):
            pixels = np.full((height, width, 3), 8 * i % 256, np.uint8)
            pixels[: height // 2, width // 2 :] = 250
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[i], Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def frames_of(
    reader: VideoReader, indices: Sequence[int], transform: Callable[[np.ndarray], Any] = np.array
) -> list[Any] | None:
    """Decode frames; None where they differ from the metadata, which are then replaced."""
    try:
        with closing(reader.frames_at(indices, transform)) as frames:
            return list(frames)
    except FramesDifferError:
        return None


def audio_only() -> bytes:
    """Return an MP4 with a second of silence and no video stream."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=44100, layout="mono")
        for _ in range(40):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            frame.rate = 44100
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def with_matrix(mp4: bytes, matrix: Sequence[int]) -> bytes:
    """Write a display matrix (a, b, c, d), in units of 1.0, into an MP4's track header."""
    a, b, c, d = (value << 16 for value in matrix)
    start = mp4.index(b"tkhd") + 44
    packed = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return mp4[:start] + packed + mp4[start + 36 :]


def wiped(data: bytes, start: float, count: int) -> bytes:
    """Overwrite `count` bytes with zeros, from the fraction `start` of the data."""
    first = int(len(data) * start)
    return data[:first] + bytes(count) + data[first + count :]


def image(
    source: Any,
    *,
    pixels: PixelLimits = PIXELS,
    limits: MediaLimits = DEFAULT_LIMITS,
    **options: Any,
) -> Item:
    """Call `preprocess_image` with the official config, options by keyword."""
    return preprocess_image(
        source,
        vision=VISION,
        pixels=pixels,
        options=MediaOptions(**options),
        limits=limits,
        name="image 1",
    )


def video(
    source: Any,
    *,
    preset: str = "paper",
    pixels: PixelLimits = PIXELS,
    limits: MediaLimits = DEFAULT_LIMITS,
    **options: Any,
) -> Item:
    """Call `preprocess_video` with the official config, options by keyword."""
    return preprocess_video(
        source,
        vision=VISION,
        pixels=pixels,
        preset=preset,
        options=MediaOptions(**options),
        limits=limits,
        name="video 1",
    )
