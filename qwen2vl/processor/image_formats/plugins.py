"""Opening and loading of images by Pillow's plugins and by those of this package.

`open_format` reads the header alone. `load_pixels` decodes the current frame, with what Pillow
leaves out of it; JPEG, PNG, GIF and BMP images that a user opened by Pillow are corrected in the
same way where they are not loaded yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin

from qwen2vl.processor.image_formats.bmp import BmpFile, without_empty_alpha
from qwen2vl.processor.image_formats.formats import UnsupportedImageError, format_of
from qwen2vl.processor.image_formats.gif import GifFile, load_gif
from qwen2vl.processor.image_formats.jpeg import load_jpeg, unsupported_kind
from qwen2vl.processor.image_formats.png import load_png, open_png
from qwen2vl.processor.image_formats.pnm import PnmFile
from qwen2vl.processor.image_formats.tiff import TiffFile

__all__ = ["load_pixels", "open_format"]

_OWN_PLUGINS = {"TIFF": TiffFile, "BMP": BmpFile, "GIF": GifFile, "PPM": PnmFile}
_JPEG_HEAD = 1 << 18  # bytes that are searched for the frame header: profiles may come first


def open_format(file: BinaryIO, media_type: str, formats: Sequence[str]) -> Image.Image:
    """Read the header of an image; pixels are decoded by `load_pixels`.

    Args:
        file: at its beginning; stays open until the pixels are loaded.
        media_type: as `sniff_type` finds it.
        formats: those that are read, by Pillow's names.

    Raises:
        UnsupportedImageError: of a kind that is not read; the text names it.
        OSError, SyntaxError, ValueError, ...: not an image of these formats, or a damaged header.
    """
    name = format_of(media_type)
    if name in _OWN_PLUGINS and name in formats:
        return _OWN_PLUGINS[name](file)
    if name == "PNG" and name in formats:
        return open_png(file)
    if name == "JPEG" and name in formats:
        kind = unsupported_kind(file.read(_JPEG_HEAD))
        file.seek(0)
        if kind:
            raise UnsupportedImageError(f"{kind}, which is not read; save it as baseline JPEG")
    # Others need magic bytes that are sure: Netpbm, and AVIF, which older Pillow does not know.
    others = [one for one in formats if one not in ("PPM", "AVIF")]
    return Image.open(file, formats=["AVIF"] if name == "AVIF" and name in formats else others)


def load_pixels(image: Image.Image) -> Image.Image:
    """Decode the current frame; return it, or another image with its pixels.

    Raises:
        UnsupportedImageError: of a kind that is not read; the text names it.
        OSError, SyntaxError, ValueError, ...: the data are damaged.
    """
    if isinstance(image, PngImagePlugin.PngImageFile):
        return load_png(image)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        return load_jpeg(image)
    if isinstance(image, GifImagePlugin.GifImageFile) and not isinstance(image, GifFile):
        return load_gif(image)
    image.load()
    return without_empty_alpha(image) if isinstance(image, BmpImagePlugin.BmpImageFile) else image
