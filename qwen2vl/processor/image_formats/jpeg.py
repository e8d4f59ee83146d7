"""JPEG: kinds that are refused before they are decoded, by their markers.

A progressive JPEG may cost a whole image for twenty bytes, so that scans are counted. 12-bit,
lossless and hierarchical files, which Pillow does not read, are named. (ITU T.81, table B.1.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["MAX_JPEG_SCANS", "has_many_scans", "unsupported_kind"]

MAX_JPEG_SCANS = 100  # encoders write about ten
MAX_JPEG_SEGMENTS = 5000
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # not stuffing or a restart
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame: without DHT, JPG, DAC
_LOSSLESS = (0xC3, 0xC7, 0xCB, 0xCF)
_HIERARCHICAL = (0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF)


def has_many_scans(content: bytes) -> bool:
    """Return whether a JPEG has too many scans: each may cost a whole image in twenty bytes."""
    num_scans = 0
    for num_segments, (code, _) in enumerate(_segments(content), 1):
        if code == _END_OF_IMAGE:
            return False
        num_scans += code == _START_OF_SCAN
        if num_scans > MAX_JPEG_SCANS or num_segments > MAX_JPEG_SEGMENTS:
            return True
    return False


def unsupported_kind(head: bytes) -> str:
    """Return what a JPEG is that is not read, such as "a lossless JPEG", or nothing.

    Args:
        head: the first bytes, which should hold the frame header.
    """
    for code, position in _segments(head):
        if code == _START_OF_SCAN:
            break
        if code in _FRAMES:
            precision = head[position + 2 : position + 3]
            if code in _LOSSLESS:
                return "a lossless JPEG"
            if code in _HIERARCHICAL:
                return "a hierarchical JPEG"
            if precision and precision != b"\x08":
                return f"a JPEG of {precision[0]} bits a sample"
            break
    return ""


def _segments(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield the code of each marker, and the position after it."""
    position = 2
    while marker := _JPEG_MARKER.search(content, position):
        yield marker[0][-1], marker.end()
        length = int.from_bytes(content[marker.end() : marker.end() + 2])
        position = marker.end() + max(2, length)
