"""BMP: Pillow's plugin, extended to all bit masks and to run lengths that end early.

A file of 16 or 32 bit names the bits of red, green, blue and alpha by masks, of which Pillow knows
a few, none of 16 bit with alpha. Alpha that is 0 everywhere is not meant: such a picture is opaque,
as in browsers. (Microsoft: BITMAPV5HEADER; Chromium: BMPImageReader.)
"""

from __future__ import annotations

import io
import struct
from typing import IO, Any

import numpy as np
from PIL import BmpImagePlugin, Image, ImageFile

from qwen2vl.processor.image_formats.samples import row_blocks

__all__ = ["BmpFile", "without_empty_alpha"]

_BITFIELDS, _ALPHA_BITFIELDS = 3, 6
_RLE8, _RLE4 = 1, 2
_MAX_PIXEL_BYTES = 6  # of run lengths: a move to each pixel (4 bytes), and a run of it
_BLACK_AND_WHITE = bytes((0, *[255] * 255))
_INFO_HEADER = 40  # bytes: BITMAPINFOHEADER; later versions begin with it
_OS2_HEADER = 64  # has other meanings of the compression


class BmpFile(BmpImagePlugin.BmpImageFile):
    """A BMP file."""

    _masks: tuple[int, ...] = ()  # of red, green, blue and alpha, where Pillow does not read them
    _run_lengths = 0

    def _open(self) -> None:
        assert self.fp is not None
        head = self.fp.read(14 + _INFO_HEADER)
        header_size, width, height, bits, compression = _read_header(head)
        if compression in (_BITFIELDS, _ALPHA_BITFIELDS) and bits in (16, 32):
            masks = _read_masks(self.fp, header_size, compression)
            if any(masks[:3]) and not _is_read_by_pillow(bits, masks):
                self._masks = masks
        if self._masks:
            self._mode = "RGBA" if self._masks[3] else "RGB"
            self._size = width, abs(height)
            start = int.from_bytes(head[10:14], "little")
            self._stored = start, bits, height < 0
            self.tile = [ImageFile._Tile("raw", (0, 0, *self._size), 0, (self.mode, 0, 1))]
            return
        self.fp.seek(0)
        super()._open()
        if compression in (_RLE8, _RLE4) and self.tile[0][0] == "bmp_rle":
            self._run_lengths = compression

    def load(self) -> Any:
        """Decode the pixels."""
        if self.tile and self._masks:
            self.fp = io.BytesIO(self._masked_pixels().tobytes())
        elif self.tile and self._run_lengths:
            assert self.fp is not None
            extents, start = self.tile[0][1], self.tile[0][2]
            self.fp.seek(start)
            data = self.fp.read((_MAX_PIXEL_BYTES * self.width + 2) * self.height + 2)
            indices = _decode_runs(data, self.size, self._run_lengths == _RLE4)
            if self.mode == "1":
                self._mode, indices = "L", indices.translate(_BLACK_AND_WHITE)
            self.fp = io.BytesIO(indices)
            self.tile = [ImageFile._Tile("raw", extents, 0, (self.mode, 0, -1))]
        return super().load()

    def _masked_pixels(self) -> np.ndarray:
        """Return the pixels (height, width, 3 or 4) of a file with masks."""
        start, bits, is_top_down = self._stored
        assert self.fp is not None, "the file is open until the pixels are loaded"
        self.fp.seek(start)
        row_bytes = (self.width * bits + 31) // 32 * 4
        data = self.fp.read(row_bytes * self.height)
        if len(data) < row_bytes * self.height:
            raise OSError("the pixels end early")
        rows = np.frombuffer(data, np.uint8).reshape(self.height, row_bytes)
        values = rows.view(f"<u{bits // 8}")[:, : self.width]
        if not is_top_down:
            values = values[::-1]
        pixels = np.empty((*values.shape, len(self.getbands())), np.uint8)
        for block in row_blocks(values.shape):
            for channel, mask in enumerate(self._masks[: len(self.getbands())]):
                pixels[block, :, channel] = _channel(values[block], mask)
        return pixels


def without_empty_alpha(image: Image.Image) -> Image.Image:
    """Return a decoded BMP as RGB where its alpha is 0 everywhere, else unchanged."""
    if image.mode == "RGBA" and image.getchannel("A").getextrema()[1] == 0:
        return image.convert("RGB")
    return image


def _read_header(head: bytes) -> tuple[int, int, int, int, int]:
    """Return the size of the header, width, height, bits a pixel and compression; else zeros."""
    if len(head) < 14 + _INFO_HEADER:
        return 0, 0, 0, 0, 0
    size, width, height, _, bits, compression = struct.unpack_from("<IiiHHI", head, 14)
    if size < _INFO_HEADER or size == _OS2_HEADER:
        return size, 0, 0, 0, 0
    return size, width, height, bits, compression


def _read_masks(file: IO[bytes], header_size: int, compression: int) -> tuple[int, ...]:
    """Return the masks of red, green, blue and alpha, which follow the first 40 bytes."""
    data = file.read(16).ljust(16, b"\0")
    masks = struct.unpack("<4I", data)
    has_alpha = header_size >= 56 or compression == _ALPHA_BITFIELDS
    return masks if has_alpha else (*masks[:3], 0)


def _is_read_by_pillow(bits: int, masks: tuple[int, ...]) -> bool:
    rgb = masks[:3]
    if bits == 16:
        return masks[3] == 0 and rgb in ((0xF800, 0x7E0, 0x1F), (0x7C00, 0x3E0, 0x1F))
    return masks in ((0xFF0000, 0xFF00, 0xFF, 0), (0xFF0000, 0xFF00, 0xFF, 0xFF000000))


def _channel(values: np.ndarray, mask: int) -> np.ndarray:
    """Return the bits of a mask, scaled to 8 bit."""
    if not mask:
        return np.zeros(values.shape, np.uint8)
    shift = (mask & -mask).bit_length() - 1
    most = mask >> shift
    levels = (values.astype(np.uint64) & np.uint64(mask)) >> np.uint64(shift)
    return ((levels * 255 + most // 2) // most).astype(np.uint8)


def _decode_runs(data: bytes, size: tuple[int, int], is_four_bit: bool) -> bytes:
    """Decode run lengths to palette indices, the last row first; what is skipped is index 0.

    A run may reach beyond its row, as padding, but none may follow: each code draws or moves.

    Raises:
        OSError: the data end before the last row does, or have too many runs.
    """
    width, height = size
    pixels = bytearray(width * height)
    x = y = position = 0
    while position + 1 < len(data) and y < height:
        count, value = data[position], data[position + 1]
        position += 2
        run = b""
        if count:
            pair = (value >> 4, value & 15) if is_four_bit else (value, value)
            run = (bytes(pair) * ((count + 1) // 2))[:count]
        elif value == 0:  # end of the row
            x, y = 0, y + 1
        elif value == 1:  # end of the bitmap
            break
        elif value == 2:  # move
            move = data[position : position + 2].ljust(2, b"\0")
            x, y, position = x + move[0], y + move[1], position + 2
        else:  # pixels as they are, padded to 16 bit
            length = (value + 1) // 2 if is_four_bit else value
            run = data[position : position + length]
            if is_four_bit:
                run = bytes(index for byte in run for index in (byte >> 4, byte & 15))[:value]
            position += length + length % 2
        if run:
            if x > width:
                raise OSError("the runs of a row are longer than it")
            inside = run[: max(0, width - x)]
            start = y * width + x
            pixels[start : start + len(inside)] = inside
            x += len(run)
    else:
        if y < height - 1 or (y == height - 1 and x < width):
            raise OSError("the run lengths end early")
    return bytes(pixels)
