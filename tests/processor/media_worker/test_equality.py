"""What media workers decode equals what this process decodes, bit for bit, errors included."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from qwen2vl.errors import InputError
from qwen2vl.processor.media.decoder import LOCAL_DECODER, MediaDecoder
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.media.video_metadata import VideoReader
from qwen2vl.processor.media_worker.pool import MediaWorkerPool
from tests.media import (
    FORMATS,
    animation,
    audio_only,
    encoded,
    encoded_video,
    frames_of,
    noise,
    png_header,
    smooth,
    wiped,
    with_matrix,
)
from tests.tiny import tiny_processor

LIMITS = MediaLimits(max_image_pixels=50_000_000, max_frames=1000, allow_urls=False)


@pytest.fixture(scope="module")
def pool() -> Iterator[MediaWorkerPool]:
    with MediaWorkerPool(2) as pool:
        yield pool


def with_orientation(orientation: int) -> bytes:
    image = Image.fromarray(smooth(40, 60))
    exif = image.getexif()
    exif[0x0112] = orientation
    return encoded(image, "JPEG", exif=exif)


def in_mode(mode: str, kind: str, **options: Any) -> bytes:
    return encoded(Image.fromarray(smooth(30, 50)).convert(mode), kind, **options)


def text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 50_000_000, zip=True)
    return encoded(smooth(10, 10), "PNG", pnginfo=info)


def with_alpha(mode: str) -> bytes:
    image = Image.fromarray(smooth(30, 50)).convert(mode)
    image.putalpha(Image.fromarray(smooth(30, 50, 1)).convert("L"))
    return encoded(image)


JPEG = encoded(smooth(60, 80), "JPEG")
SIXTEEN_BIT = np.arange(0, 60000, 20, np.uint16).reshape(50, 60)
IMAGES: dict[str, Any] = {
    **{f"{kind} {mode}": in_mode(mode, kind) for kind in FORMATS for mode in ("RGB", "L")},
    **{f"orientation {n}": with_orientation(n) for n in (*range(1, 9), 99)},
    "palette": in_mode("P", "PNG", transparency=3),
    "1 bit": in_mode("1", "PNG"),
    "CMYK": in_mode("CMYK", "JPEG"),
    "RGBA": with_alpha("RGB"),
    "LA": with_alpha("L"),
    "16 bit": encoded(Image.fromarray(SIXTEEN_BIT)),
    "AVIF": in_mode("RGB", "AVIF"),
    "PGM": in_mode("L", "PPM"),
    "float TIFF": encoded(Image.fromarray(np.full((8, 9), 0.5, np.float32)), "TIFF"),
    "NaN TIFF": encoded(Image.fromarray(np.full((8, 9), np.nan, np.float32)), "TIFF"),
    **{kind: animation(kind) for kind in ("GIF", "WEBP", "PNG", "TIFF")},
    **{f"half {k}": (d := encoded(noise(60, 80), k))[: len(d) // 2] for k in FORMATS},
    **{f"head {k}": encoded(noise(60, 80), k)[:24] for k in FORMATS},
    "last byte missing": JPEG[:-1],
    "garbage behind": JPEG + b"garbage",
    "broken checksum": bytes([*encoded(smooth(9, 9))[:29], 0, *encoded(smooth(9, 9))[30:]]),
    "wiped": wiped(encoded(noise(60, 80)), 0.5, 100),
    "size bomb": png_header(30_000, 30_000),
    "huge size": png_header(2**31 - 1, 1),
    "no width": png_header(0, 10),
    "text bomb": text_bomb(),
    "empty": b"",
    "HTML": b"<!doctype html><title>404</title>",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'>" + bytes(64),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64),
    "random": noise(10, 30).tobytes(),
    "wrong type": "data:image/png;base64," + base64.b64encode(JPEG).decode(),
    "odd type": "data:image/\u202epng;base64," + base64.b64encode(JPEG).decode(),
    "not base64": "data:image/png;base64,@@@",
    "array": smooth(30, 40),
    "tensor": torch.from_numpy(smooth(30, 40)),
    "PIL image": Image.fromarray(smooth(30, 40)),
    "file object": io.BytesIO(JPEG),
    "list": [JPEG],
}
CLIPS = Path(__file__).parents[1] / "media" / "clips"
MP4 = encoded_video(30)
JPEG_URL = base64.b64encode(JPEG).decode()
VIDEOS: dict[str, Any] = {
    "MP4": MP4,
    "MKV": encoded_video(20, container="matroska"),
    "one frame": encoded_video(1),
    "variable rate": encoded_video(6, container="matroska", stamps=[0, 1, 2, 50, 51, 100]),
    "odd size": encoded_video(5, width=66, height=50, codec="mpeg4"),
    "rotated": with_matrix(MP4, (0, 1, -1, 0)),
    "narrow pixels": CLIPS / "sar2.mp4",
    "transparent": CLIPS / "al_qtrle.mov",
    "transparent WebM": CLIPS / "al_vp9.webm",
    "half": MP4[: len(MP4) // 2],
    "half MKV": (mkv := encoded_video(60, container="matroska"))[: len(mkv) // 2],
    "wiped": wiped(encoded_video(60, width=320, height=240), 0.5, 400),
    "audio": audio_only(),
    "text": b"not a video",
    "frame list": [encoded(smooth(30, 40, n), "JPEG") for n in range(3)],
    "sizes differ": [encoded(smooth(30, 40)), encoded(smooth(30, 41))],
    "bad frame": [JPEG, JPEG[: len(JPEG) // 2]],
    "array": noise(60, 40)[None].repeat(4, 0),
    "video/jpeg": f"data:video/jpeg;base64,{JPEG_URL},{JPEG_URL}",
    "too many frames": "data:video/jpeg;base64," + "," * 2000,
}


def image_result(decoder: MediaDecoder, source: Any, *, exif: bool = True) -> Any:
    """Return all of what a decoder says of an image, or the text of its error."""
    try:
        decoded = decoder.open_image(source, LIMITS, "image 1", apply_exif_orientation=exif)
    except InputError as error:
        return str(error)
    image, notes, orientation = decoded
    return image.mode, image.size, image.tobytes(), notes, orientation


def video_result(decoder: MediaDecoder, source: Any) -> Any:
    """Return metadata and frames of a video, or the text of its error."""
    try:
        reader = decoder.open_video(source, LIMITS, "video 1", fps=2, apply_exif_orientation=True)
        with closing(reader):
            first = reader.metadata
            frames = some_frames(reader)
            if frames is None:  # the metadata has been replaced
                frames = some_frames(reader)
            return first, reader.metadata, frames
    except InputError as error:
        return str(error)


def some_frames(reader: VideoReader) -> list[Any] | None:
    count = len(reader.metadata.timestamps)
    indices = sorted({0, count // 3, count // 2, count - 1})
    return frames_of(reader, indices, lambda frame: (frame.shape, frame.tobytes()))


@pytest.mark.parametrize("name", IMAGES)
def test_images(pool: MediaWorkerPool, name: str) -> None:
    wanted = image_result(LOCAL_DECODER, IMAGES[name])
    assert image_result(pool, IMAGES[name]) == wanted
    assert image_result(pool, IMAGES[name], exif=False) == image_result(
        LOCAL_DECODER, IMAGES[name], exif=False
    )
    wanted = video_result(LOCAL_DECODER, IMAGES[name])
    assert video_result(pool, IMAGES[name]) == wanted


@pytest.mark.parametrize("name", VIDEOS)
def test_videos(pool: MediaWorkerPool, name: str) -> None:
    assert video_result(pool, VIDEOS[name]) == video_result(LOCAL_DECODER, VIDEOS[name])
    assert image_result(pool, VIDEOS[name]) == image_result(LOCAL_DECODER, VIDEOS[name])


def test_damaged_bytes(pool: MediaWorkerPool) -> None:
    random = np.random.default_rng(0)
    files = [*(encoded(smooth(40, 50), kind) for kind in FORMATS), animation("GIF"), MP4]
    for n in range(80):
        data = bytearray(files[n % len(files)])
        for _ in range(random.integers(1, 6)):
            data[random.integers(len(data))] = random.integers(256)
        result = video_result if data[4:8] == b"ftyp" or n % 3 == 0 else image_result
        assert result(pool, bytes(data)) == result(LOCAL_DECODER, bytes(data)), n


def test_files_are_read_by_the_parent(pool: MediaWorkerPool, tmp_path: Path) -> None:
    for name, data in (("a.jpg", JPEG), ("a.mp4", MP4)):
        (tmp_path / name).write_bytes(data)
    assert image_result(pool, tmp_path / "a.jpg") == image_result(LOCAL_DECODER, JPEG)
    assert video_result(pool, tmp_path / "a.mp4") == video_result(LOCAL_DECODER, MP4)


def test_whole_prompts(pool: MediaWorkerPool) -> None:
    """A processor with workers builds the same input; planning and resizing are the parent's."""
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": with_orientation(6)},
                {"type": "video", "video": MP4, "num_frames": 6},
                {"type": "video", "video": VIDEOS["wiped"]},
                {"type": "video", "video": animation("GIF")},
                {"type": "text", "text": "Compare."},
            ],
        }
    ]
    local, remote = tiny_processor(), tiny_processor().with_media(pool, MediaLimits())
    wanted, got = local(messages), remote(messages)
    assert got.input_ids == wanted.input_ids and got.notes == wanted.notes
    for item, other in zip(got.items, wanted.items, strict=True):
        assert (
            item.pair_digests == other.pair_digests
            and item.frame_timestamps == other.frame_timestamps
        )
        assert item.orientation == other.orientation
        assert torch.equal(item.patches_NP, other.patches_NP)
    assert [item.orientation for item in got.items] == [6, 1, 1, 1]
