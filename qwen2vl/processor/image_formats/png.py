"""PNG: 16-bit colors in full precision, transparent colors of every depth, bad metadata.

Pillow keeps the high bytes of 16-bit colors, and compares the transparent color of 2, 4 and 16 bit
with values of 8 bit. Here the low bytes are decoded as well, and tRNS is compared with the values
that are stored. Files that Pillow refuses for their metadata (texts and color profiles of more than
1 MB, wrong checksums) are read without them, as by libpng. (PNG specification, third edition:
11.3.1.1, 13.1, 13.12; libpng: png_set_crc_action.)
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from typing import IO, Any

import numpy as np
from PIL import Image, PngImagePlugin

from qwen2vl.processor.image_formats.formats import COMPOSITED_NOTE, add_note, notes_of
from qwen2vl.processor.image_formats.samples import composite_on_white, to_8_bit

__all__ = ["load_png", "open_png"]

# Raw mode of the plugin for 16 bit -> mode and raw mode by which the low bytes are decoded.
_LOW_BYTES = {"RGB;16B": ("RGB", "RGB;16L"), "RGBA;16B": ("RGBA", "RGBA;16L")}
_OPAQUE = 65535
_GRAY_ALPHA = "LA;16B"  # its four bytes are decoded as those of RGBA
_LEVELS = {"L;2": 3, "L;4": 15}  # raw modes that are scaled to 255
_SIGNATURE_BYTES = 8
# Ancillary chunks that change pixels: transparency, orientation, frames.
_USED = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
_METADATA_NOTE = "damaged or oversized metadata of the PNG ignored"


def open_png(file: IO[bytes]) -> Image.Image:
    """Read the header; where Pillow refuses it, that of the file without its metadata.

    Raises:
        Image.DecompressionBombError, OSError, SyntaxError, ValueError, ...: as `Image.open`.
    """
    try:
        return Image.open(file, formats=["PNG"])
    except (Image.DecompressionBombError, MemoryError):
        raise
    except Exception:  # the plugin raises all kinds of errors for damaged chunks
        image = _open_without_metadata(file)
        if image is None:
            raise
        add_note(image, _METADATA_NOTE)
        return image


def load_png(image: PngImagePlugin.PngImageFile) -> Image.Image:
    """Decode the current frame; return it, or an image of its pixels.

    Transparent pixels are composited on white, and noted, where Pillow has no mode for them.

    Raises:
        OSError, SyntaxError, ValueError, ...: as `image.load`.
    """
    file = image.fp
    notes = notes_of(image)
    try:
        pixels = _decode(image)
        for note in notes if pixels is not image else ():
            add_note(pixels, note)
        return pixels
    except MemoryError:
        raise
    except Exception:  # texts after the pixels are read by `load`
        plain = None if file is None or image.tell() else _open_without_metadata(file)
        if plain is None:
            raise
        pixels = _decode(plain)
        add_note(pixels, _METADATA_NOTE)
        return pixels


def _open_without_metadata(file: IO[bytes]) -> PngImagePlugin.PngImageFile | None:
    """Read the header of a copy without metadata; None: there is none that could be left out."""
    content, is_changed = _without_metadata(file)
    if not is_changed:
        return None
    return PngImagePlugin.PngImageFile(io.BytesIO(content))


def _without_metadata(file: IO[bytes]) -> tuple[bytes, bool]:
    """Copy a PNG without ancillary chunks that are not used, or whose checksum is wrong.

    Returns:
        The copy, and whether a chunk was left out. It ends where the chunks do.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    copy = io.BytesIO(file.read(_SIGNATURE_BYTES))
    copy.seek(0, os.SEEK_END)
    is_changed = False
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        length = min(length, size - file.tell())  # of a file that ends early
        is_ancillary = bool(kind[0] & 0x20)
        if is_ancillary and kind not in _USED:
            file.seek(length + 4, os.SEEK_CUR)
            is_changed = True
            continue
        body, checksum = file.read(length), file.read(4)
        if is_ancillary and checksum != struct.pack(">I", zlib.crc32(kind + body)):
            is_changed = True
            continue
        copy.write(head + body + checksum)
    return copy.getvalue(), is_changed


def _decode(image: PngImagePlugin.PngImageFile) -> Image.Image:
    raw_mode = _raw_mode(image)
    if image.tell() == 0 and not getattr(image, "is_animated", False):
        if raw_mode in _LOW_BYTES:
            return _load_wide(image, raw_mode)
        if raw_mode == _GRAY_ALPHA:
            return _load_wide_gray_alpha(image)
    image.load()
    key = image.info.get("transparency")
    if isinstance(key, int) and image.mode in ("L", "I;16"):
        values = np.asarray(image)[..., None]
        is_key = values == key * 255 // _LEVELS.get(raw_mode, 255)
        return _with_white(to_8_bit(values), is_key)
    return image


def _raw_mode(image: PngImagePlugin.PngImageFile) -> str:
    args: Any = image.tile[0][3] if image.tile else ""
    return args if isinstance(args, str) else str(args[0])


def _load_wide(image: PngImagePlugin.PngImageFile, raw_mode: str) -> Image.Image:
    """Decode RGB and RGBA of 16 bit: the low bytes first, by a second reader of the same file."""
    file = image.fp
    assert file is not None, "pixels are not loaded yet"
    position = file.tell()
    file.seek(0)
    second = PngImagePlugin.PngImageFile(file)
    low = _load_as(second, *_LOW_BYTES[raw_mode])
    file.seek(position)
    image.load()
    values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
    key = image.info.get("transparency")
    if isinstance(key, tuple):
        return _with_white(to_8_bit(values), (values == np.array(key)).all(2, keepdims=True))
    return _opaque(values) if values.shape[2] == 4 else Image.fromarray(to_8_bit(values))


def _load_wide_gray_alpha(image: PngImagePlugin.PngImageFile) -> Image.Image:
    stored = np.asarray(_load_as(image, "RGBA", "RGBA")).astype(np.uint16)
    return _opaque(stored[..., ::2] << 8 | stored[..., 1::2])


def _load_as(image: PngImagePlugin.PngImageFile, mode: str, raw_mode: str) -> Image.Image:
    """Decode the bytes of the file by another raw mode of the same number of bits."""
    image._mode = mode
    image.tile = [image.tile[0]._replace(args=raw_mode)]
    image.load()
    return image


def _opaque(values: np.ndarray) -> Image.Image:
    """Composite 16-bit colors, whose last channel is alpha, on white."""
    colors, alpha = values[..., :-1], values[..., -1:]
    if alpha.min() == _OPAQUE:
        return _image_of(to_8_bit(colors))
    image = _image_of(composite_on_white(colors, alpha))
    add_note(image, COMPOSITED_NOTE)
    return image


def _with_white(colors: np.ndarray, is_transparent: np.ndarray) -> Image.Image:
    """Return 8-bit colors, white where they are transparent."""
    image = _image_of(np.where(is_transparent, np.uint8(255), colors))
    if is_transparent.any():
        add_note(image, COMPOSITED_NOTE)
    return image


def _image_of(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
