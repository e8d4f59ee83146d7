"""JPEG: kinds that are refused by their markers, and files without their end marker.

A progressive JPEG may cost a whole image for twenty bytes, so that scans are counted. 12-bit,
lossless and hierarchical files, which Pillow does not read, are named. A file that lacks no more
than its end marker is read. (ITU T.81, table B.1, F.2.2.5.)
"""

from __future__ import annotations

import io
import random
import re
import zlib
from collections.abc import Iterator

from PIL import Image, JpegImagePlugin

from qwen2vl.processor.image_formats.formats import UnsupportedImageError, add_note

__all__ = ["MAX_JPEG_SCANS", "has_many_scans", "load_jpeg", "unsupported_kind"]

MAX_JPEG_SCANS = 100  # encoders write about ten
MAX_JPEG_SEGMENTS = 5000
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # not stuffing or a restart
_START_OF_SCAN, _END_OF_IMAGE, _RESTART_INTERVAL = 0xDA, 0xD9, 0xDD
_SEQUENTIAL = (0xC0, 0xC1)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame: without DHT, JPG, DAC
_LOSSLESS = (0xC3, 0xC7, 0xCB, 0xCF)
_HIERARCHICAL = (0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF)
# What may follow the data: nothing (libjpeg adds bits of 0) or random bits, enough for ten blocks,
# the most of a unit. The first bits of two of them differ, so that a missing bit changes a code.
_TAIL_BYTES = 4096
_TAILS = (
    *(
        first + random.Random(first).randbytes(_TAIL_BYTES).replace(b"\xff", b"\0")
        for first in (b"\x55", b"\xaa", b"\x33")
    ),
    b"",
)
_NO_END_NOTE = "the end marker of the JPEG is missing, but no pixels are"


def load_jpeg(image: JpegImagePlugin.JpegImageFile) -> Image.Image:
    """Decode the pixels; return the image, or another where the end marker is missing.

    Raises:
        UnsupportedImageError: it has too many scans.
        OSError, SyntaxError, ValueError, ...: the data are damaged, or end early.
    """
    file = image.fp
    if not image.tile or file is None or image.tell():  # loaded, or a later picture of an MPO file
        image.load()
        return image
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    if has_many_scans(content):
        raise UnsupportedImageError(
            f"a JPEG of more than {MAX_JPEG_SCANS} scans, which is the limit; save it again"
        )
    try:
        image.load()
        return image
    except OSError:
        whole = _decode_without_end(content) if _may_lack_end_alone(content) else None
        if whole is None:
            raise
        return whole


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
    """Return what a JPEG is that is not read, such as "a lossless JPEG"; "": it is read.

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


def _may_lack_end_alone(content: bytes) -> bool:
    """Return whether the data are one sequential scan that ends with the file.

    In other files (progressive, one scan a color, restart intervals) whole parts may be missing
    before the end, which `_decode_without_end` would not see.
    """
    num_colors, scans = 0, []
    for code, position in _segments(content):
        if code in (_END_OF_IMAGE, _RESTART_INTERVAL):
            return False
        if code in _FRAMES:
            num_colors = _byte(content, position + 7) if code in _SEQUENTIAL else 0
        if code == _START_OF_SCAN:
            scans.append(_byte(content, position + 2))
    return num_colors > 0 and scans == [num_colors]


def _byte(content: bytes, position: int) -> int:
    """Return a byte; 0 where the file ends before it."""
    return content[position] if position < len(content) else 0


def _decode_without_end(content: bytes) -> Image.Image | None:
    """Decode a JPEG without its end marker; None: its data end before the last pixel.

    Where a bit of the last block is missing, the pixels depend on the bits that follow the data.
    """
    first, *others = _TAILS
    image = _decode_with_tail(content, first)
    checksum = zlib.crc32(image.tobytes())
    for tail in others:
        if zlib.crc32(_decode_with_tail(content, tail).tobytes()) != checksum:
            return None
    add_note(image, _NO_END_NOTE)
    return image


def _decode_with_tail(content: bytes, tail: bytes) -> Image.Image:
    data = content.rstrip(b"\xff")  # half of the marker
    image = Image.open(io.BytesIO(data + tail + b"\xff\xd9"), formats=["JPEG"])
    image.load()
    return image


def _segments(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield the code of each marker, and the position after it."""
    position = 2
    while marker := _JPEG_MARKER.search(content, position):
        yield marker[0][-1], marker.end()
        length = int.from_bytes(content[marker.end() : marker.end() + 2])
        position = marker.end() + max(2, length)
