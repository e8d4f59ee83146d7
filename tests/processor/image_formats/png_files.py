"""PNG files written byte by byte, for tests: depths and chunks that Pillow does not write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np

# First row and column, and steps, of each pass.
_ADAM7 = (
    *((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)),
    *((2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)),
)
GRAY, RGB, PALETTE, GRAY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
DEPTHS = {
    GRAY: (1, 2, 4, 8, 16),
    RGB: (8, 16),
    PALETTE: (1, 2, 4, 8),
    GRAY_ALPHA: (8, 16),
    RGB_ALPHA: (8, 16),
}


def png(
    samples: np.ndarray,
    *,
    color_type: int,
    depth: int = 8,
    palette: np.ndarray | None = None,
    transparency: bytes = b"",
    chunks: Sequence[tuple[bytes, bytes]] = (),
    interlaced: bool = False,
) -> bytes:
    """Write a PNG.

    Args:
        samples: (height, width, channels), values of `depth` bits as they are stored.
        color_type: of the header: GRAY, RGB, PALETTE, GRAY_ALPHA or RGB_ALPHA.
        depth: bits a channel.
        palette: (colors, 3) uint8.
        transparency: content of the tRNS chunk.
        chunks: further ones that stand before the pixels, such as (b"eXIf", ...).
        interlaced: in the seven passes of Adam7.
    """
    height, width, channels = samples.shape
    step = max(1, channels * depth // 8)
    passes = [samples[y::dy, x::dx] for y, x, dy, dx in _ADAM7] if interlaced else [samples]
    raster = b"".join(_filtered(_packed(part, depth), step) for part in passes if part.size)
    header = (width, height, depth, color_type, 0, 0, interlaced)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", *header))]
    parts += chunks
    if palette is not None:
        parts.append((b"PLTE", palette.astype(np.uint8).tobytes()))
    if transparency:
        parts.append((b"tRNS", transparency))
    parts += [(b"IDAT", zlib.compress(raster)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, *zip(*parts, strict=True)))


def _packed(samples: np.ndarray, depth: int) -> np.ndarray:
    """Return the bytes of rows of samples, (rows, bytes)."""
    rows = samples.reshape(len(samples), -1)
    if depth >= 8:
        return rows.astype(f">u{depth // 8}").view(np.uint8).reshape(len(rows), -1)
    planes = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(planes.astype(np.uint8).reshape(len(rows), -1), axis=1)


def _filtered(rows: np.ndarray, step: int) -> bytes:
    """Filter rows by the differences to the left and above in turn, as encoders do."""
    raw = b""
    for number, row in enumerate(rows):
        if number % 2:
            raw += b"\2" + (row - rows[number - 1]).tobytes()
        else:
            left = np.concatenate((np.zeros(step, np.uint8), row[:-step]))[: len(row)]
            raw += b"\1" + (row - left).tobytes()
    return raw


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
