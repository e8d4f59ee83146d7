"""TIFF files written byte by byte, for tests: layouts that Pillow does not write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

_SHORT, _LONG = 3, 4
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def tiff(
    samples: np.ndarray,
    *,
    photometric: int,
    bits: int = 8,
    planar: bool = False,
    byte_order: str = "<",
    extra_samples: Sequence[int] = (),
    sample_format: int = 1,
    fill_order: int = 1,
    deflate: bool = False,
    predictor: int = 1,
    tile: tuple[int, int] | None = None,
    rows_per_strip: int | None = None,
    tags: Mapping[int, Sequence[int]] | None = None,
) -> bytes:
    """Write a TIFF of one page.

    Args:
        samples: (height, width, samples a pixel), values of `bits` bits as they are stored.
        photometric: PhotometricInterpretation.
        bits: BitsPerSample.
        planar: each sample in its own plane.
        byte_order: "<" or ">".
        extra_samples: ExtraSamples.
        sample_format: 1 unsigned, 2 signed, 3 float.
        fill_order: 2: the bits of each byte are reversed.
        deflate: compress.
        predictor: 2: horizontal differences, of 8 and 16 bit.
        tile: (height, width) of tiles; None: strips.
        rows_per_strip: None: one strip.
        tags: further SHORT tags, such as {274: [6]}.
    """
    height, width, num_samples = samples.shape
    pieces = _pieces(samples, planar, tile, rows_per_strip)
    packed = [_packed(piece, bits, byte_order, predictor) for piece in pieces]
    if fill_order == 2:
        packed = [piece.translate(_REVERSED) for piece in packed]
    if deflate:
        packed = [zlib.compress(piece) for piece in packed]
    entries: dict[int, tuple[int, Sequence[int]]] = {
        256: (_LONG, [width]),
        257: (_LONG, [height]),
        258: (_SHORT, [bits] * num_samples),
        259: (_SHORT, [8 if deflate else 1]),
        262: (_SHORT, [photometric]),
        266: (_SHORT, [fill_order]),
        277: (_SHORT, [num_samples]),
        284: (_SHORT, [2 if planar else 1]),
        339: (_SHORT, [sample_format] * num_samples),
    }
    if predictor > 1:
        entries[317] = (_SHORT, [predictor])
    if extra_samples:
        entries[338] = (_SHORT, extra_samples)
    for tag, values in (tags or {}).items():
        entries[tag] = (_SHORT, values)
    offsets, counts = (324, 325) if tile else (273, 279)
    if tile:
        entries |= {322: (_LONG, [tile[1]]), 323: (_LONG, [tile[0]])}
    else:
        entries[278] = (_LONG, [rows_per_strip or height])
    position, starts = 8, []
    for piece in packed:
        starts.append(position)
        position += len(piece) + len(piece) % 2
    entries |= {offsets: (_LONG, starts), counts: (_LONG, [len(piece) for piece in packed])}
    body = b"".join(piece + bytes(len(piece) % 2) for piece in packed)
    return _header(byte_order, position) + body + _directory(entries, position, byte_order)


def _pieces(
    samples: np.ndarray, planar: bool, tile: tuple[int, int] | None, rows_per_strip: int | None
) -> list[np.ndarray]:
    """Cut samples into strips or tiles, plane by plane."""
    height, width, num_samples = samples.shape
    pieces = []
    for plane in np.split(samples, num_samples, 2) if planar else [samples]:
        if tile is None:
            step = rows_per_strip or height
            pieces += [plane[y : y + step] for y in range(0, height, step)]
            continue
        padded = np.pad(plane, ((0, -height % tile[0]), (0, -width % tile[1]), (0, 0)))
        for y in range(0, height, tile[0]):
            for x in range(0, width, tile[1]):
                pieces.append(padded[y : y + tile[0], x : x + tile[1]])
    return pieces


def color_map(palette: np.ndarray) -> list[int]:
    """Return the ColorMap of a palette (colors, 3) of 8-bit values."""
    return (palette.astype(int).T.ravel() * 257).tolist()


def _packed(piece: np.ndarray, bits: int, byte_order: str, predictor: int) -> bytes:
    rows = piece
    if predictor == 2:
        rows = np.diff(piece.astype(np.int64), axis=1, prepend=0) % (1 << bits)
    if piece.dtype.kind == "f":
        return rows.astype(f"{byte_order}f{bits // 8}").tobytes()
    flat = rows.reshape(len(rows), -1)
    if bits >= 8:
        return (
            (flat.astype(np.int64) & ((1 << bits) - 1))
            .astype(f"{byte_order}u{bits // 8}")
            .tobytes()
        )
    planes = (flat[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(planes.astype(np.uint8).reshape(len(rows), -1), axis=1).tobytes()


def _header(byte_order: str, directory: int) -> bytes:
    mark = b"II" if byte_order == "<" else b"MM"
    return mark + struct.pack(f"{byte_order}HI", 42, directory)


def _directory(
    entries: dict[int, tuple[int, Sequence[int]]], position: int, byte_order: str
) -> bytes:
    heap_at = position + 2 + 12 * len(entries) + 4
    table, heap = struct.pack(f"{byte_order}H", len(entries)), b""
    for tag, (kind, values) in sorted(entries.items()):
        data = struct.pack(f"{byte_order}{len(values)}{'H' if kind == _SHORT else 'I'}", *values)
        if len(data) > 4:
            data, heap = struct.pack(f"{byte_order}I", heap_at + len(heap)), heap + data
        table += struct.pack(f"{byte_order}HHI", tag, kind, len(values)) + data.ljust(4, b"\0")
    return table + bytes(4) + heap
