"""PBM, PGM and PPM: Pillow's plugin, with samples of every largest value scaled to 8 bit.

Pillow reads a PGM of more than 8 bit as 32-bit integers, whose range is unknown then, and plain
files, and binary ones whose largest value is not 255, a sample at a time, which takes seconds a
megapixel. PAM and PFM, which the plugin reads too, are refused by their magic bytes (formats.py).
(Netpbm: pgm(5), ppm(5).)
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from PIL import ImageFile, PpmImagePlugin

__all__ = ["PnmFile"]

_COMMENT = re.compile(rb"#[^\r\n]*")
_SPACE = re.compile(rb"\s")
_BLOCK_BYTES = 1 << 20  # of a plain file that are split at once
_LARGEST_SAMPLE = 65535


class PnmFile(PpmImagePlugin.PpmImageFile):
    """A PBM, PGM or PPM file, plain or binary: modes 1, L and RGB."""

    def _open(self) -> None:
        super()._open()
        codec, extents, offset, args = self.tile[0]
        if self.mode == "I" or codec == "ppm" or (codec == "ppm_plain" and self.mode != "1"):
            most = 65535 if codec == "raw" else int(args[-1])  # type: ignore[index]
            mode = "L" if self.mode == "I" else self.mode
            self._samples: tuple[str, int, int] | None = (codec, offset, most)
            self._mode = mode
            # Replaced by the samples when they are loaded.
            self.tile = [ImageFile._Tile("raw", extents, 0, (mode, 0, 1))]
        else:
            self._samples = None

    def load(self) -> Any:
        """Decode the pixels."""
        if self._samples is not None and self.tile:
            codec, offset, most = self._samples
            assert self.fp is not None, "the file is open until the pixels are loaded"
            self.fp.seek(offset)
            count = self.width * self.height * len(self.getbands())
            if codec == "ppm_plain":
                values = _plain_samples(self.fp.read(), count)
            else:
                dtype = np.dtype(">u2" if most > 255 else "u1")
                data = self.fp.read(count * dtype.itemsize)
                if len(data) < count * dtype.itemsize:
                    raise OSError("the samples end early")
                values = np.frombuffer(data, dtype)
            wide = np.minimum(values, most).astype(np.uint32)
            self.fp = io.BytesIO(((wide * 255 + most // 2) // most).astype(np.uint8).tobytes())
        return super().load()


def _plain_samples(text: bytes, count: int) -> np.ndarray:
    """Return the first `count` numbers of a text; a comment goes from # to the end of its line.

    Raises:
        OSError, OverflowError, ValueError: there are fewer, or others than whole numbers.
    """
    text = _COMMENT.sub(b"", text)
    values = np.empty(count, np.uint32)
    found = start = 0
    while found < count and start < len(text):
        space = _SPACE.search(text, start + _BLOCK_BYTES)
        stop = space.start() if space else len(text)
        numbers = np.array(list(map(int, text[start:stop].split()[: count - found])), np.int64)
        if len(numbers) and numbers.min() < 0:
            raise ValueError("a negative sample")
        values[found : found + len(numbers)] = np.minimum(numbers, _LARGEST_SAMPLE)
        found, start = found + len(numbers), stop
    if found < count:
        raise OSError("the samples end early")
    return values
