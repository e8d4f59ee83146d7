"""BMP files written byte by byte, for tests: headers and masks that Pillow does not write."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

RAW, RLE8, RLE4, BITFIELDS = range(4)


def bmp(
    pixels: np.ndarray,
    *,
    bits: int,
    header: int = 40,
    palette: np.ndarray | None = None,
    compression: int = RAW,
    masks: Sequence[int] = (),
    top_down: bool = False,
    data: bytes | None = None,
) -> bytes:
    """Write a BMP.

    Args:
        pixels: (height, width), a number of `bits` bits for each pixel, first row at the top.
        bits: a pixel: 1, 4, 8, 16, 24 or 32.
        header: size of the header: 12 (OS/2), 40, 52, 56, 64, 108 or 124 bytes.
        palette: (colors, 3) RGB.
        compression: RAW, RLE8, RLE4 or BITFIELDS.
        masks: of red, green, blue and alpha, for BITFIELDS.
        top_down: the first row is stored first.
        data: pixel data that are stored in place of `pixels`, as for RLE.
    """
    height, width = pixels.shape
    colors = b""
    if palette is not None:
        padding = b"" if header == 12 else b"\0"
        colors = b"".join(bytes(color[::-1]) + padding for color in palette.astype(int).tolist())
    if data is None:
        rows = pixels if top_down else pixels[::-1]
        data = b"".join(_row(row, bits) for row in rows)
    if header == 12:
        body = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        count = 0 if palette is None else len(palette)
        signed = -height if top_down else height
        body = struct.pack(
            "<IiiHHIIiiII", header, width, signed, 1, bits, compression, len(data), 0, 0, count, 0
        )
        inside = struct.pack(f"<{len(masks)}I", *masks)
        if header == 40:
            body += inside
        else:
            body += inside.ljust(header - 40, b"\0")
        if header >= 108:  # the color space: sRGB
            body = body[:56] + b"BGRs" + body[60:]
    start = 14 + len(body) + len(colors)
    return struct.pack("<2sIHHI", b"BM", start + len(data), 0, 0, start) + body + colors + data


def _row(row: np.ndarray, bits: int) -> bytes:
    if bits < 8:
        planes = (row[:, None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = np.packbits(planes.astype(np.uint8).ravel()).tobytes()
    else:
        packed = b"".join(int(value).to_bytes(bits // 8, "little") for value in row)
    return packed + bytes(-len(packed) % 4)
