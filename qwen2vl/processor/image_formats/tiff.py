"""TIFF: Pillow's plugin, extended to every layout of gray, RGB, palette, CMYK and YCbCr pixels.

Pillow unpacks what it has a raw mode for and reads right; for other layouts the samples are read by
tiff_samples.py and become 8-bit colors here. Photometric interpretations without a fixed meaning in
RGB (CIELab, LogLuv, CFA, ...), and numbers that are no brightness (signed 8 and 16 bit), are
refused by name. (TIFF 6.0; libtiff: tif_getimage.c.)
"""

from __future__ import annotations

import io
import struct
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from qwen2vl.processor.image_formats.formats import (
    COMPOSITED_NOTE,
    UnsupportedImageError,
    add_note,
)
from qwen2vl.processor.image_formats.samples import float_white, row_blocks
from qwen2vl.processor.image_formats.tiff_samples import (
    BYTE_CODECS,
    TiffLayout,
    check_pieces,
    read_layout,
    read_samples,
)

__all__ = ["TiffFile"]

_WHITE_IS_ZERO, _GRAY, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_NAMES = {
    0: "gray (WhiteIsZero)",
    1: "gray",
    2: "RGB",
    3: "palette",
    4: "transparency mask",
    5: "CMYK",
    6: "YCbCr",
    8: "CIELab",
    9: "ICCLab",
    10: "ITULab",
    32803: "color filter array (raw camera data)",
    32844: "LogL",
    32845: "LogLuv",
    34892: "linear raw camera data",
}
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_MAX_SAMPLES = 6  # a pixel, in one strip or tile
_MAX_PAGES = 1 << 16  # that are counted
_MAX_TAGS = 1 << 16  # of a page, whose number has 16 bits; in a BigTIFF 64
# Layouts that Pillow reads right: (photometric, bits, samples), unsigned and not planar.
_READ_BY_PILLOW = (
    {(_WHITE_IS_ZERO, bits, 1) for bits in (1, 8)}
    | {(_GRAY, bits, 1) for bits in (1, 2, 4, 8, 16)}
    | {(_PALETTE, bits, 1) for bits in (1, 2, 4, 8)}
    | {(_GRAY, 8, 2), (_RGB, 8, 3), (_RGB, 8, 4), (_CMYK, 8, 4)}
)
_USUAL_LUMA = (0.299, 0.587, 0.114)  # YCbCrCoefficients


class TiffFile(TiffImagePlugin.TiffImageFile):
    """A TIFF file of any layout that is supported.

    Raises (when it is opened, or a page of it is sought):
        UnsupportedImageError: the layout of the page is not read; the text names it.
    """

    _layout: TiffLayout | None = None  # of the page, where Pillow does not read it right

    def _setup(self) -> None:
        """Prepare the page whose tags were read: called by Pillow for each."""
        layout = read_layout(self.tag_v2)
        check_pieces(layout)
        self._layout = None
        if _is_read_by_pillow(layout):
            try:
                super()._setup()
                return
            except (SyntaxError, KeyError) as error:
                if not layout.is_bytes:
                    raise _unsupported(layout) from error
        _check_supported(layout)
        self._layout = layout
        self._describe_pixels(layout)
        super()._setup()

    @property
    def n_frames(self) -> int:
        """The number of pages, by their links alone: nothing else of later pages is read."""
        if self._n_frames is None:
            file: Any = self._fp
            position = file.tell()
            self._n_frames = _count_pages(file)
            file.seek(position)
        return self._n_frames

    def load(self) -> Any:
        """Decode the pixels of the page, upright; those with alpha are composited on white."""
        if self._layout is not None and self.tile:
            layout = self._layout
            self.getexif()  # reads the file, which is replaced now
            pixels, is_transparent = _read_pixels(self.fp, layout)
            if is_transparent:
                add_note(self, COMPOSITED_NOTE)
            self.fp = io.BytesIO(pixels.tobytes())
            self.use_load_libtiff = False
            extents = (0, 0, layout.width, layout.height)
            self.tile = [ImageFile._Tile("raw", extents, 0, (self.mode, 0, 1))]
        return super().load()

    def _describe_pixels(self, layout: TiffLayout) -> None:
        """Replace the tags by those of the pixels that `load` makes, for Pillow's `_setup`."""
        for tag in (317, 322, 323, 324, 325, 338, 339):  # predictor, tiles, extra samples, format
            if tag in self.tag_v2:
                del self.tag_v2[tag]
        photometric = _GRAY if _is_gray(layout) else _RGB
        bits = (8,) if _is_gray(layout) else (8, 8, 8)
        tags = {258: bits, 259: 1, 262: photometric, 266: 1, 277: len(bits), 284: 1}
        tags |= {273: (8,), 278: layout.height}
        for tag, value in tags.items():
            self.tag_v2[tag] = value


def _count_pages(file: IO[bytes]) -> int:
    """Follow the links from page to page, up to one that was seen before or cannot be read."""
    file.seek(0)
    head = file.read(8)
    order, is_big = "<>"[head[:2] == b"MM"], 43 in head[2:4]
    count_format, entry, link_format = ("Q", 20, "Q") if is_big else ("H", 12, "I")
    count_of, link_of = struct.Struct(order + count_format), struct.Struct(order + link_format)
    start = 8 if is_big else 4  # of the link to the next page
    pages: set[int] = set()
    while len(pages) < _MAX_PAGES:
        file.seek(start)
        link = file.read(link_of.size)
        if len(link) < link_of.size:
            break
        (page,) = link_of.unpack(link)
        if page in pages or not 0 < page < 1 << 63:
            break
        file.seek(page)
        count = file.read(count_of.size)
        if len(count) < count_of.size:
            break
        pages.add(page)
        start = page + count_of.size + min(count_of.unpack(count)[0], _MAX_TAGS) * entry
    return max(1, len(pages))


def _is_read_by_pillow(layout: TiffLayout) -> bool:
    if not layout.is_bytes:  # JPEG, CCITT: only libtiff reads them
        return True
    key = (layout.photometric, layout.bits[0], layout.num_samples)
    if len(set(layout.bits)) > 1 or layout.is_planar or layout.fill_order == 2:
        return False
    if layout.photometric == _PALETTE and max(layout.tags.get(320, (0,))) < 256:
        return False  # a color map of 8 bits, which Pillow reads as black
    if layout.alpha == 1 or (layout.photometric == _CMYK and layout.tags.get(332, 1) != 1):
        return False  # colors that were multiplied by alpha; other inks
    if set(layout.formats) == {_UNSIGNED} and key in _READ_BY_PILLOW:
        return True
    # Numbers in place of colors: modes I and F, whose range is found as that of arrays.
    if layout.photometric == _GRAY and layout.num_samples == 1 and layout.bits[0] == 32:
        return True
    is_plain = layout.compression == 1 and layout.subsampling == (1, 1)
    return key == (_YCBCR, 8, 3) and is_plain and _has_usual_levels(layout)


def _check_supported(layout: TiffLayout) -> None:
    """Raise UnsupportedImageError where the samples are not read, or are no colors."""
    bits = layout.bits[0]
    is_supported = (
        layout.num_colors > 0
        and len(set(layout.bits)) == len(set(layout.formats)) == 1
        and layout.num_colors <= layout.num_samples
        and (layout.is_planar or layout.num_samples <= _MAX_SAMPLES)
        and layout.predictor in (1, 2)
        and (layout.predictor == 1 or bits in (8, 16))
        and (layout.photometric != _CMYK or layout.tags.get(332, 1) == 1)
    )
    if layout.photometric == _PALETTE:
        is_supported = is_supported and bits <= 8 and 320 in layout.tags
    if layout.photometric == _YCBCR:
        is_supported = is_supported and bits in (8, 16) and layout.alpha != 1
        if layout.subsampling != (1, 1):
            usual = set(layout.subsampling) <= {1, 2, 4} and layout.predictor == 1
            is_supported = is_supported and usual and bits == 8 and not layout.is_planar
    if layout.formats[0] == _FLOAT:
        is_supported = is_supported and layout.photometric == _RGB and bits == 32
    elif layout.formats[0] != _UNSIGNED or bits not in (1, 2, 4, 8, 16):
        is_supported = False
    if not is_supported:
        raise _unsupported(layout)


def _unsupported(layout: TiffLayout) -> UnsupportedImageError:
    name = _NAMES.get(layout.photometric, "of an unknown kind")
    kind = {_SIGNED: "signed ", _FLOAT: "float "}.get(layout.formats[0], "")
    bits = "+".join(map(str, sorted(set(layout.bits))))
    codec = BYTE_CODECS.get(layout.compression, f"compression {layout.compression}")
    details = ", planar" * layout.is_planar + f", {codec}" * (layout.compression != 1)
    return UnsupportedImageError(
        f"a TIFF of {kind}{bits}-bit samples, {layout.num_samples} a pixel, photometric "
        f"interpretation {layout.photometric} ({name}){details}, which is not read; save it as "
        "8-bit RGB"
    )


def _is_gray(layout: TiffLayout) -> bool:
    return layout.photometric in (_WHITE_IS_ZERO, _GRAY)


def _read_pixels(file: Any, layout: TiffLayout) -> tuple[np.ndarray, bool]:
    """Return gray or RGB pixels, (height, width, 1 or 3) uint8, and whether any is transparent."""
    samples = read_samples(file, layout, layout.num_colors + bool(layout.alpha))
    most = _largest_value(samples[..., : layout.num_colors], layout)
    alpha_max = _largest_value(samples[..., -1:], layout) if layout.alpha else 1.0
    pixels = np.empty((*samples.shape[:2], 1 if _is_gray(layout) else 3), np.uint8)
    is_transparent = False
    for rows in row_blocks(samples.shape):
        colors = samples[rows, :, : layout.num_colors]
        opacity = None
        if layout.alpha:
            opacity = np.clip(samples[rows, :, -1:] / np.float32(alpha_max), 0, 1)
            is_transparent = is_transparent or bool(opacity.min() < 1)
        fractions = _to_fractions(colors, most, layout, opacity)
        if opacity is not None:
            fractions = fractions * opacity + (1 - opacity)
        pixels[rows] = np.clip(np.rint(255 * fractions), 0, 255)
    return pixels, is_transparent


def _largest_value(values: np.ndarray, layout: TiffLayout) -> float:
    """Return the value of full brightness or opacity; that of floats is found as that of arrays."""
    if layout.formats[0] != _FLOAT:
        return float((1 << layout.bits[0]) - 1)
    low, high = float(values.min()), float(values.max())
    white = float_white(low, high)
    if white is None:  # NaN, too
        raise UnsupportedImageError(
            f"a TIFF of float values from {low:g} to {high:g}, which are not colors; scale them to "
            "0..1"
        )
    return white


def _to_fractions(
    colors: np.ndarray, most: float, layout: TiffLayout, opacity: np.ndarray | None
) -> np.ndarray:
    """Return gray or RGB of rows as fractions of full brightness, (rows, width, 1 or 3) float32."""
    if layout.photometric == _PALETTE:
        return (_color_map(layout) / np.float32(255))[colors[..., 0]]
    mode = {_CMYK: "CMYK", _YCBCR: "YCbCr"}.get(layout.photometric)
    is_associated = layout.alpha == 1
    if mode and layout.bits[0] == 8 and _has_usual_levels(layout) and not is_associated:
        # Exactly as Pillow.
        image = Image.frombytes(mode, colors.shape[1::-1], colors.tobytes())
        return np.asarray(image.convert("RGB")) / np.float32(255)
    fractions = colors / np.float32(most)
    if is_associated and opacity is not None:  # brightness or ink was multiplied by alpha
        fractions = np.minimum(fractions / np.maximum(opacity, 1e-6), 1)
    if layout.photometric == _WHITE_IS_ZERO:
        return 1 - fractions
    if layout.photometric == _CMYK:
        return (1 - fractions[..., :3]) * (1 - fractions[..., 3:])
    if layout.photometric == _YCBCR:
        return _rgb_of_ycbcr(colors, layout)
    return fractions


def _color_map(layout: TiffLayout) -> np.ndarray:
    """Return the palette, (colors, 3); some writers store 8-bit values in place of 16-bit ones."""
    size = 1 << layout.bits[0]
    values = np.array(layout.tags[320], np.uint32)
    if len(values) < 3 * size:
        raise ValueError("the color map ends early")
    palette = values[: 3 * size].reshape(3, size).T
    return palette if palette.max() < 256 else palette >> 8


def _has_usual_levels(layout: TiffLayout) -> bool:
    """Return whether YCbCr is that of JPEG."""
    luma = np.array(layout.tags.get(529, _USUAL_LUMA), np.float64)
    levels = tuple(map(float, layout.tags.get(532, _usual_levels(layout))))
    return bool(np.abs(luma - _USUAL_LUMA).max() < 1e-3) and levels == _usual_levels(layout)


def _usual_levels(layout: TiffLayout) -> tuple[int, ...]:
    """Return ReferenceBlackWhite: black and white of each sample."""
    most, half = (1 << layout.bits[0]) - 1, 1 << layout.bits[0] - 1
    return (0, most, half, most, half, most)


def _rgb_of_ycbcr(samples: np.ndarray, layout: TiffLayout) -> np.ndarray:
    """Convert by the coefficients and the reference levels of the tags. (TIFF 6.0, section 21.)"""
    red, green, blue = map(float, layout.tags.get(529, _USUAL_LUMA))
    usual = np.array(_usual_levels(layout), np.float32)
    levels = np.array(layout.tags.get(532, usual), np.float32)
    if not green > 0 or len(levels) != 6 or not (levels[1::2] > levels[::2]).all():
        raise ValueError("reference levels or coefficients of YCbCr that convert no color")
    ranges = (usual[1::2] - usual[::2]) / (levels[1::2] - levels[::2]) / usual[1]
    luma, cb, cr = np.moveaxis((samples - levels[::2]) * ranges, -1, 0)
    r = luma + (2 - 2 * red) * cr
    b = luma + (2 - 2 * blue) * cb
    return np.stack((r, (luma - blue * b - red * r) / green, b), 2)
