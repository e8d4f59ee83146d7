"""Samples of a TIFF: its layout by the tags, and the values of its strips and tiles.

For what Pillow's plugin has no raw mode for: planes, 16-bit alpha, depths of colors. Strips and
tiles are decompressed (zlib, or libtiff through Pillow), split into samples, and put in place.
(TIFF 6.0, sections 3, 8, 14 and 15.)
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from qwen2vl.processor.image_formats.formats import UnsupportedImageError

__all__ = ["BYTE_CODECS", "TiffLayout", "check_pieces", "read_layout", "read_samples"]

BYTE_CODECS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits"}
BYTE_CODECS |= {34925: "LZMA", 50000: "Zstandard"}
_NUM_COLORS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}  # PhotometricInterpretation -> colors a pixel
_NONE, _DEFLATE, _YCBCR = 1, (8, 32946), 6
_KINDS = {1: "u", 2: "i", 3: "f"}  # SampleFormat -> kind of numpy's dtype
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_MAX_PIECES = 1 << 16  # strips or tiles, each of which takes some time
# Tiles reach beyond the image: so many times its pixels are decoded at most, or these.
_MAX_PADDING, _MIN_DECODED = 16, 1 << 22


class TiffLayout(NamedTuple):
    """How the samples of a page are stored."""

    width: int
    height: int
    photometric: int
    bits: tuple[int, ...]  # of each sample
    formats: tuple[int, ...]  # of each sample: 1 unsigned, 2 signed, 3 float
    extra: tuple[int, ...] | None  # kind of the samples after the colors: 1 and 2 are alpha
    is_planar: bool
    compression: int
    predictor: int
    fill_order: int
    byte_order: str  # "<" or ">"
    piece: tuple[int, int]  # height and width of strips or tiles
    is_tiled: bool
    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    subsampling: tuple[int, int]  # of the chroma: horizontal and vertical
    tags: Any  # ImageFileDirectory_v2

    @property
    def num_samples(self) -> int:
        """Samples a pixel."""
        return len(self.bits)

    @property
    def num_colors(self) -> int:
        """Colors a pixel; 0: an unknown photometric interpretation."""
        return _NUM_COLORS.get(self.photometric, 0)

    @property
    def alpha(self) -> int:
        """Kind of the alpha: 0 none, 1 associated (premultiplied), 2 unassociated.

        A sample after the colors whose kind is not declared at all is alpha; one that is declared
        to be unspecified (0), such as a near-infrared band, is not.
        """
        if self.num_samples <= self.num_colors:
            return 0
        first = self.extra[0] if self.extra else 2
        return {1: 1, 2: 2, 999: 2}.get(first, 0)  # 999: written by Corel Draw

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples, in the byte order of the file; those below 8 bit are uint8."""
        num_bytes = max(self.bits[0], 8) // 8
        return np.dtype(f"{self.byte_order}{_KINDS[self.formats[0]]}{num_bytes}")

    @property
    def is_bytes(self) -> bool:
        """Whether the codec compresses bytes, whatever they mean, so that numpy can split them."""
        return self.compression in BYTE_CODECS


def read_layout(tags: Any) -> TiffLayout:
    """Read the layout of a page from its tags, an ImageFileDirectory_v2.

    Raises:
        KeyError, TypeError, ValueError: a tag is absent or malformed.
    """
    width, height = int(tags[256]), int(tags[257])
    photometric = int(tags.get(262, 0))
    bits = _values(tags.get(258, 1))
    num_samples = int(tags.get(277, len(bits)))
    is_tiled = 324 in tags
    return TiffLayout(
        width=width,
        height=height,
        photometric=photometric,
        bits=_per_sample(bits, num_samples),
        formats=_per_sample(_values(tags.get(339, 1)), num_samples),
        extra=_values(tags[338]) if 338 in tags else None,
        is_planar=tags.get(284, 1) == 2,
        compression=int(tags.get(259, 1)),
        predictor=int(tags.get(317, 1)),
        fill_order=int(tags.get(266, 1)),
        byte_order=">" if tags.prefix == b"MM" else "<",
        piece=(
            (int(tags[323]), int(tags[322]))
            if is_tiled
            else (min(int(tags.get(278, height)), height), width)
        ),
        is_tiled=is_tiled,
        offsets=_values(tags.get(324 if is_tiled else 273, ())),
        counts=_values(tags.get(325 if is_tiled else 279, ())),
        subsampling=_subsampling(tags) if photometric == _YCBCR else (1, 1),
        tags=tags,
    )


def check_pieces(layout: TiffLayout) -> None:
    """Check the number of strips or tiles, and their pixels: all may be one place of a small file.

    Raises:
        UnsupportedImageError: there are too many.
        ValueError: they have no pixels, or far more than the image.
    """
    height, width = layout.piece
    if height < 1 or width < 1:
        raise ValueError("strips or tiles without pixels")
    per_plane = -(-layout.height // height) * -(-layout.width // width)
    count = per_plane * (layout.num_samples if layout.is_planar else 1)
    if count > _MAX_PIECES:
        raise UnsupportedImageError(
            f"a TIFF of {count:,} strips or tiles, limit is {_MAX_PIECES:,}; save it with larger "
            "ones"
        )
    decoded = per_plane * height * width
    if decoded > max(_MAX_PADDING * layout.width * layout.height, _MIN_DECODED):
        raise ValueError("tiles far larger than the image")


def read_samples(file: IO[bytes], layout: TiffLayout, count: int) -> np.ndarray:
    """Read the first `count` samples of each pixel: (height, width, count), as they are stored.

    Raises:
        OSError, ValueError: the file ends early, or its data are damaged.
    """
    _check_places(layout)
    samples = np.zeros((layout.height, layout.width, count), layout.dtype)
    height, width = layout.piece
    down, across = -(-layout.height // height), -(-layout.width // width)
    first_planes = range(count) if layout.is_planar else range(1)
    for plane in first_planes:
        where = slice(plane, plane + 1) if layout.is_planar else slice(0, count)
        for number in range(down * across):
            y, x = number // across * height, number % across * width
            num_rows = height if layout.is_tiled else min(height, layout.height - y)
            piece = _read_piece(file, layout, plane * down * across + number, num_rows)
            target = samples[y : y + num_rows, x : x + width, where]
            target[:] = piece[: target.shape[0], : target.shape[1], :count]
    return samples


def _values(value: Any) -> tuple[int, ...]:
    return tuple(map(int, value)) if isinstance(value, tuple | list) else (int(value),)


def _subsampling(tags: Any) -> tuple[int, int]:
    across, down = _values(tags.get(530, (2, 2)))
    return across, down


def _per_sample(values: tuple[int, ...], num_samples: int) -> tuple[int, ...]:
    """Return a value for each sample; one that is given for all is repeated."""
    if not 0 < num_samples <= 1 << 16:
        raise ValueError(f"{num_samples} samples a pixel")
    return values[:num_samples] if len(values) >= num_samples else values[:1] * num_samples


def _check_places(layout: TiffLayout) -> None:
    per_plane = -(-layout.height // layout.piece[0]) * -(-layout.width // layout.piece[1])
    needed = per_plane * (layout.num_samples if layout.is_planar else 1)
    if min(len(layout.offsets), len(layout.counts)) < needed:
        raise ValueError("strips or tiles are missing")
    if min(*layout.offsets, *layout.counts) < 0:
        raise ValueError("negative offsets or lengths")


def _read_piece(file: IO[bytes], layout: TiffLayout, number: int, num_rows: int) -> np.ndarray:
    """Return one strip or tile, (rows, width, samples)."""
    width = layout.piece[1]
    num_samples = 1 if layout.is_planar else layout.num_samples
    end = file.seek(0, os.SEEK_END)
    file.seek(layout.offsets[number])
    data = file.read(min(layout.counts[number], max(0, end - layout.offsets[number])))
    if layout.subsampling != (1, 1) and not layout.is_planar:
        return _read_blocks(data, layout, num_rows)
    row_bytes = -(-width * num_samples * layout.bits[0] // 8)
    rows = _decompress(data, layout, num_rows, row_bytes)
    return _unpack(rows, layout, num_samples)


def _decompress(data: bytes, layout: TiffLayout, num_rows: int, row_bytes: int) -> np.ndarray:
    """Return the bytes of a strip or tile, (rows, bytes a row)."""
    size = num_rows * row_bytes
    if layout.fill_order == 2 and layout.compression in (_NONE, *_DEFLATE):
        data = data.translate(_REVERSED_BITS)
    if layout.compression in _DEFLATE:
        data = zlib.decompressobj().decompress(data, size)
    elif layout.compression != _NONE:
        data = _decompress_by_libtiff(data, layout, num_rows, row_bytes)
    if len(data) < size:
        raise OSError("a strip or tile ends early")
    return np.frombuffer(data, np.uint8, size).reshape(num_rows, row_bytes)


def _decompress_by_libtiff(data: bytes, layout: TiffLayout, num_rows: int, row_bytes: int) -> bytes:
    """Decompress by way of a TIFF of its own, whose bytes are the pixels of a gray image."""
    start = 8 + 2 + 12 * 9 + 4
    entries = (
        (256, row_bytes), (257, num_rows), (258, 8), (259, layout.compression), (262, 1),
        (266, layout.fill_order), (273, start), (278, num_rows), (279, len(data)),
    )  # fmt: skip
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    header = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + table + bytes(4)
    with Image.open(io.BytesIO(header + data), formats=["TIFF"]) as image:
        return image.tobytes()


def _unpack(rows: np.ndarray, layout: TiffLayout, num_samples: int) -> np.ndarray:
    """Split rows of bytes into samples, (rows, width, samples)."""
    bits, width = layout.bits[0], layout.piece[1]
    if bits < 8:
        shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)  # the high bits come first
        values = (rows[..., None] >> shifts) & np.uint8((1 << bits) - 1)
        values = values.reshape(len(rows), -1)[:, : width * num_samples]
    else:
        values = rows.view(layout.dtype)
    values = values.reshape(len(rows), width, num_samples)
    if layout.predictor == 2:  # differences to the pixel at the left
        values = np.cumsum(values, axis=1, dtype=values.dtype.newbyteorder("="))
    return values


def _read_blocks(data: bytes, layout: TiffLayout, num_rows: int) -> np.ndarray:
    """Return a piece of YCbCr whose chroma is stored once for a block of pixels."""
    across, down = layout.subsampling
    width = layout.piece[1]
    blocks = -(-num_rows // down), -(-width // across)
    row_bytes = blocks[1] * (across * down + 2)
    units = _decompress(data, layout, blocks[0], row_bytes).reshape(*blocks, -1)
    shape = (blocks[0] * down, blocks[1] * across)
    luma = units[..., :-2].reshape(*blocks, down, across).transpose(0, 2, 1, 3).reshape(shape)
    chroma = units[..., -2:].repeat(down, 0).repeat(across, 1)
    return np.concatenate((luma[..., None], chroma), 2)[:num_rows, :width]
