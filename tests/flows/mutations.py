"""Mutations of files, and the small valid files of every format that are mutated."""

from __future__ import annotations

import functools
import json
import re
import struct
import zlib
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from tests.adapters import write_adapter
from tests.media import animation, encoded, encoded_video, smooth
from tests.processor.image_formats import bmp_files, png_files
from tests.processor.image_formats.pnm_files import pnm
from tests.processor.image_formats.reference import samples
from tests.processor.image_formats.tiff_files import color_map, tiff
from tests.tiny import tiny_model

FIXTURES = Path(__file__).parent.parent / "data" / "formats" / "fixtures"
HEADER_BYTES = 300  # that most mutations hit
_CHUNK = re.compile(rb"[A-Za-z]{4}")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
KINDS = ("flip", "integer", "truncate", "insert", "delete", "splice", "duplicate", "move")


class Mutation(NamedTuple):
    """One change of a file: where, as a fraction of the file or of its first bytes, and how."""

    kind: str
    place: float
    seed: int


mutations = st.lists(
    st.builds(Mutation, st.sampled_from(KINDS), st.floats(0, 1), st.integers(0, 1 << 20)),
    min_size=1,
    max_size=5,
)


def mutated(data: bytes, changes: Sequence[Mutation], others: Sequence[bytes]) -> bytes:
    """Apply changes in order; half of the changed PNG files get right checksums afterwards."""
    random = Random(0)
    for kind, place, seed in changes:
        random = Random(seed)
        extent = len(data) if random.random() < 0.4 else min(len(data), HEADER_BYTES)
        at = min(int(place * extent), max(0, len(data) - 1))
        data = _mutate(data, kind, at, random, others)
    return _with_checksums(data) if random.random() < 0.5 else data


def _mutate(data: bytes, kind: str, at: int, random: Random, others: Sequence[bytes]) -> bytes:
    length = random.choice((1, 4, 12, 60))
    if kind == "flip":
        return data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]
    if kind == "integer":
        return _with_integer(data, at, random)
    if kind == "truncate":
        return data[: max(at, random.choice((0, 12, 40)))]
    if kind == "insert":
        return data[:at] + random.randbytes(length) + data[at:]
    if kind == "delete":
        return data[:at] + data[at + length :]
    if kind == "splice":
        other = random.choice(others)
        return data[:at] + other[random.randrange(len(other)) :]
    start, stop = _chunk_at(data, at, length)
    if kind == "duplicate":
        return data[:stop] + data[start:stop] * random.choice((1, 1, 2, 9)) + data[stop:]
    return data[:start] + data[stop:] + data[start:stop]


def _with_integer(data: bytes, at: int, random: Random) -> bytes:
    size = random.choice((2, 4, 8))
    order = random.choice("<>")
    code = {2: "H", 4: "I", 8: "Q"}[size]
    field = data[at : at + size].ljust(size, b"\0")
    (now,) = struct.unpack(order + code, field)
    most = (1 << 8 * size) - 1
    near = (0, 1, most, most >> 1, (most >> 1) + 1, now - 1, now + 1, 2 * now, len(data) - at)
    value = random.choice(near) & most
    return data[:at] + struct.pack(order + code, value) + data[at + size :]


def _chunk_at(data: bytes, at: int, length: int) -> tuple[int, int]:
    """Return the span from one four-letter name to the next, with the lengths before them."""
    first = _CHUNK.search(data, at)
    second = _CHUNK.search(data, first.end()) if first else None
    if first is None or second is None or second.start() - first.start() > 4000:
        return at, min(len(data), at + length)
    return max(0, first.start() - 4), max(0, second.start() - 4)


def _with_checksums(data: bytes) -> bytes:
    """Return a PNG whose chunks have right checksums; other files as they are."""
    if not data.startswith(_PNG_SIGNATURE):
        return data
    result, position = data[:8], 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4])
        stop = position + 8 + length
        if stop > len(data):
            break
        body = data[position + 4 : stop]
        result += data[position : position + 4] + body + struct.pack(">I", zlib.crc32(body))
        position = stop + 4
    return result + data[position:]


@functools.cache
def pictures() -> Sequence[bytes]:
    """Return pictures of every format, and of many layouts of PNG, TIFF, BMP, PNM and JPEG."""
    return (*_plain_pictures(), *_pngs(), *_tiffs(), *_bmps(), *_pnms())


def _plain_pictures() -> list[bytes]:
    image = Image.fromarray(smooth(14, 22))
    exif = Image.Exif()
    exif[0x112] = 6
    found = [encoded(image, name) for name in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")]
    found += [encoded(image, name, exif=exif.tobytes()) for name in ("JPEG", "PNG", "TIFF")]
    found += [encoded(image, "AVIF"), encoded(image, "PPM"), encoded(image.convert("P"), "GIF")]
    found += [encoded(image.convert("CMYK"), "JPEG"), encoded(image, "JPEG", progressive=True)]
    found += [encoded(image, "JPEG", restart_marker_rows=1), encoded(image, "WEBP", lossless=True)]
    found += [animation(name, 3) for name in ("GIF", "WEBP", "PNG", "TIFF", "AVIF")]
    for codec in ("tiff_lzw", "packbits", "jpeg", "zstd", "lzma"):
        found.append(encoded(image, "TIFF", compression=codec))
    found.append(encoded(image.convert("1"), "TIFF", compression="group4"))
    found.append(encoded(image, "TIFF", big_tiff=True))
    return found


def _pngs() -> list[bytes]:
    channels = {png_files.GRAY_ALPHA: 2, png_files.RGB: 3, png_files.RGB_ALPHA: 4}
    palette = np.random.default_rng(2).integers(0, 256, (256, 3))
    found = []
    for color_type, depths in png_files.DEPTHS.items():
        for depth in depths:
            is_paletted = color_type == png_files.PALETTE
            key = {png_files.GRAY: bytes(2), png_files.RGB: bytes(6), png_files.PALETTE: b"\0\x80"}
            found.append(
                png_files.png(
                    samples(depth, channels.get(color_type, 1)),
                    color_type=color_type,
                    depth=depth,
                    palette=palette[: 1 << depth] if is_paletted else None,
                    transparency=key.get(color_type, b""),
                    chunks=[(b"tEXt", b"comment\0text")],
                    interlaced=depth == 8,
                )
            )
    return found


def _tiffs() -> list[bytes]:
    counts = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}
    palette = np.random.default_rng(2).integers(0, 256, (256, 3))
    found = []
    for photometric, bits, planar in product(counts, (1, 4, 8, 16), (False, True)):
        if (photometric, bits) in ((3, 16), (6, 1), (6, 4)):  # not read
            continue
        tags = {3: {320: color_map(palette[: 1 << min(bits, 8)])}, 6: {530: [1, 1]}}
        options: dict[str, Any] = {"photometric": photometric, "bits": bits, "planar": planar}
        options |= {"tags": tags.get(photometric, {}), "byte_order": "><"[planar]}
        options |= {"deflate": bits == 4, "predictor": 2 if bits == 16 else 1}
        found.append(tiff(samples(bits, counts[photometric]), **options))
        if photometric == 2:
            found.append(tiff(samples(bits, 4), extra_samples=[2], tile=(16, 16), **options))
    found.append(tiff(samples(8, 3) / 255, photometric=2, bits=32, sample_format=3))
    found.append(tiff(samples(8, 3), photometric=6))  # subsampled, as its tags do not say otherwise
    return found


def _bmps() -> list[bytes]:
    palette = np.random.default_rng(2).integers(0, 256, (256, 3))
    indices = samples(4, 1)[..., 0]
    runs = b"".join(bytes((2, i * 17)) for i in range(11)) + b"\0\0\0\2\1\1"
    masks = (0xF00, 0xF0, 0xF, 0xF000)
    found = [
        bmp_files.bmp(indices, bits=bits, header=header, palette=palette[: 1 << bits])
        for bits, header in product((1, 4, 8), (12, 40, 64, 124))
    ]
    found += [bmp_files.bmp(indices, bits=bits) for bits in (16, 24, 32)]
    for bits in (16, 32):
        options = {"bits": bits, "compression": bmp_files.BITFIELDS, "masks": masks}
        found.append(bmp_files.bmp(indices, header=124, **options))
    for bits, code in ((8, bmp_files.RLE8), (4, bmp_files.RLE4)):
        options = {"bits": bits, "compression": code, "palette": palette[: 1 << bits]}
        literal = b"\0\4" + bytes(bits // 2) + b"\0\1"
        found.append(bmp_files.bmp(indices, data=runs + literal, **options))
    return found


def _pnms() -> list[bytes]:
    values = samples(8, 3)
    found = [pnm(kind, values[..., : 3 if kind % 3 == 0 else 1], 1000) for kind in (2, 3, 5, 6)]
    return [*found, pnm(1, values[..., :1] % 2, None), pnm(4, values[..., :1] % 2, None)]


@functools.cache
def clips() -> Sequence[bytes]:
    """Return short clips: MP4, Matroska, WebM, AVI, MPEG-TS, and animations."""
    size: dict[str, Any] = {"width": 32, "height": 32}
    found = [
        encoded_video(4, **size),
        encoded_video(4, options={"movflags": "frag_keyframe+empty_moov"}, **size),
        encoded_video(4, codec="mpeg4", container="matroska", **size),
        encoded_video(4, codec="libvpx", container="webm", **size),
        encoded_video(4, codec="mjpeg", container="avi", pixel_format="yuvj420p", **size),
        encoded_video(4, codec="mpeg4", container="avi", **size),
        encoded_video(4, codec="png", container="mov", pixel_format="rgba", **size),
        encoded_video(4, codec="mpeg4", container="mpegts", **size),
    ]
    names = ("GIF", "WEBP", "PNG", "AVIF", "TIFF")
    found += [animation(name, 3) for name in names]
    pictures = [Image.fromarray(smooth(14, 22, seed)) for seed in range(3)]
    for name, options in (("GIF", {"disposal": 2}), ("PNG", {"disposal": 1, "blend": 1})):
        found.append(
            encoded(pictures[0], name, save_all=True, append_images=pictures[1:], **options)
        )
    return found


@functools.cache
def row_files() -> dict[str, bytes]:
    """Return the files of rows by name."""
    return {path.name: path.read_bytes() for path in sorted(FIXTURES.iterdir())}


@functools.cache
def adapter_files(folder: Path) -> dict[str, bytes]:
    """Return the files of an adapter, with what trainers write beside it."""
    write_adapter(folder, tiny_model(), ["q_proj", "v_proj"], rank=2)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    found["tokenizer_config.json"] = json.dumps({"chat_template": "{{ x }}"}).encode()
    found["added_tokens.json"] = json.dumps({"<|im_end|>": 1}).encode()
    found["vit.safetensors"] = _empty_safetensors()
    return found


def _empty_safetensors() -> bytes:
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    return struct.pack("<Q", len(header)) + header
