"""Image decoding: any image file, PIL image or array -> upright, opaque 8-bit RGB.

The header is checked against the limits before anything is decoded. Then the first frame is
decoded, the EXIF orientation applied, transparency composited on white, 16-bit and float values
scaled, and other modes converted. Opaque 8-bit files become exactly Pillow's `convert("RGB")`.
Color profiles are ignored, as in transformers. (HF: load_image, ImageOps.exif_transpose.)
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from qwen2vl.errors import InputError
from qwen2vl.processor.media.source import (
    Media,
    MediaLimits,
    MediaSource,
    read_head,
    read_source,
    sniff_type,
)

__all__ = [
    "FORMATS",
    "array_to_image",
    "check_image_size",
    "decode_rgb",
    "open_encoded",
    "open_image",
    "oriented_size",
    "to_uint8",
]

# Pillow logs damaged files; without any handler its records would be printed to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# The only decoders that are used for untrusted bytes.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")

_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPED_ORIENTATIONS = (5, 6, 7, 8)  # those that swap height and width
_WIDE_MODES = frozenset({"I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
_ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "RGBa", "La"})


def open_image(
    source: MediaSource, limits: MediaLimits, name: str, *, apply_exif_orientation: bool = True
) -> tuple[Image.Image, tuple[str, ...]]:
    """Open any image as RGB; return it with notes on what was adjusted.

    Arrays are (height, width, channels) with 1, 3 (RGB) or 4 (RGBA) channels, or (height, width).

    Raises:
        InputError: not found, not a supported image, damaged, or larger than the limits.
    """
    media = read_source(source, limits, name)
    if isinstance(media.content, np.ndarray):
        return array_to_image(media.content, limits, name)
    if isinstance(media.content, Image.Image):
        check_image_size(media.content, limits, name)
        return decode_rgb(media.content, name, apply_exif_orientation=apply_exif_orientation)
    with open_encoded(media, limits, name) as (image, notes):
        rgb, decode_notes = decode_rgb(image, name, apply_exif_orientation=apply_exif_orientation)
    return rgb, notes + decode_notes


@contextmanager
def open_encoded(
    media: Media, limits: MediaLimits, name: str
) -> Iterator[tuple[Image.Image, tuple[str, ...]]]:
    """Read the header of an encoded image; pixels are decoded lazily, inside the context."""
    assert isinstance(media.content, (Path, bytes)), "pixels need no decoder"
    kind = sniff_type(read_head(media))
    notes: tuple[str, ...] = ()
    if (
        media.content_type
        and media.content_type.startswith("image/")
        and _types_differ(media.content_type, kind)
    ):
        notes = (f"declared as {media.content_type}, read as {kind}",)
    with _open_binary(media.content) as file, _ignore_pillow_warnings():
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise InputError(
                f"{name} has more than {limits.max_image_pixels:,} pixels, which is the limit; "
                "resize it first"
            ) from error
        except Exception as error:  # plugins raise all kinds of errors for damaged headers
            raise InputError(f"{name} {_describe_unreadable(kind)}") from error
        check_image_size(image, limits, name)
        yield image, notes


def check_image_size(image: Image.Image, limits: MediaLimits, name: str) -> None:
    """Check the size of an image against the limit, by its header alone.

    Raises:
        InputError: no pixels, or more than the limit.
    """
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"{name} is {width} x {height} pixels; an image needs at least 1 x 1")
    if width * height > limits.max_image_pixels:
        raise InputError(
            f"{name} is {width} x {height} = {width * height:,} pixels, limit is "
            f"{limits.max_image_pixels:,}; resize it first"
        )


def oriented_size(image: Image.Image, *, apply_exif_orientation: bool = True) -> tuple[int, int]:
    """Return (height, width) of the image that `decode_rgb` returns, by its header alone."""
    width, height = image.size
    return (
        (width, height)
        if apply_exif_orientation and _orientation(image) in _SWAPPED_ORIENTATIONS
        else (height, width)
    )


def decode_rgb(
    image: Image.Image, name: str, *, apply_exif_orientation: bool = True
) -> tuple[Image.Image, tuple[str, ...]]:
    """Decode the current frame fully and convert it to upright RGB.

    Raises:
        InputError: the data are damaged or end early, or the pixels cannot be shown as RGB.
    """
    notes: list[str] = []
    if frames := _num_frames(image):
        notes.append(f"first of {frames} frames")
    try:
        image.load()
    except Exception as error:  # decoders of damaged data raise many kinds of errors
        raise InputError(
            f"{name} is damaged: its pixels end early or cannot be decoded; save it again"
        ) from error
    method = _TRANSPOSE_OF_ORIENTATION.get(_orientation(image)) if apply_exif_orientation else None
    if method is not None:
        image = image.transpose(method)
        notes.append("EXIF orientation applied")
    rgb, mode_notes = _to_rgb(image, name)
    return rgb, (*notes, *mode_notes)


def _to_rgb(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Convert decoded pixels of any Pillow mode to opaque 8-bit RGB.

    Raises:
        InputError: the mode, or the range of its values, cannot be converted to a color.
    """
    if image.mode in _WIDE_MODES:
        gray, note = to_uint8(np.asarray(image), name)
        return Image.fromarray(gray).convert("RGB"), (note,)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return _composite_on_white(image, name)
    if image.mode == "RGB":
        return image, ()
    try:
        return image.convert("RGB"), ()
    except ValueError as error:
        raise InputError(
            f"{name}: color mode {image.mode!r} cannot become RGB; convert it first"
        ) from error


def array_to_image(
    array: np.ndarray, limits: MediaLimits, name: str
) -> tuple[Image.Image, tuple[str, ...]]:
    """Convert an array (height, width, channels) or (height, width); the axes are never inferred.

    Raises:
        InputError: another shape or dtype, no pixels, or more than the limit.
    """
    _check_shape(array.shape, name)
    if array.shape[0] * array.shape[1] > limits.max_image_pixels:
        raise InputError(
            f"{name} is {array.shape[1]} x {array.shape[0]} pixels, limit is "
            f"{limits.max_image_pixels:,} in all; resize it first"
        )
    notes: tuple[str, ...] = ()
    if array.dtype != np.uint8:
        array, note = to_uint8(array, name)
        notes = (note,)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    rgb, mode_notes = _to_rgb(Image.fromarray(np.ascontiguousarray(array)), name)
    return rgb, notes + mode_notes


def _check_shape(shape: tuple[int, ...], name: str) -> None:
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        hint = (
            "array.transpose(1, 2, 0)" if len(shape) == 3 and shape[0] in (1, 3, 4) else "reshape"
        )
        raise InputError(
            f"{name}: array of shape {shape} is not an image; give (height, width, 3) RGB, "
            f"(height, width, 4) RGBA or (height, width) gray: {hint}"
        )
    if len(shape) == 3 and shape[0] in (3, 4) and shape[1] > 4:
        raise InputError(
            f"{name}: array of shape {shape} could have its channels first or last; give a PIL "
            "image instead"
        )
    if 0 in shape:
        raise InputError(f"{name}: array of shape {shape} has no pixels")


def to_uint8(values: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """Scale 16-bit, 32-bit and float values to uint8; return them with a note on the scale.

    16-bit values are divided by 257, so that 65535 becomes 255. 32-bit integers are read as 8-bit
    when all fit, else as 16-bit. Floats are read as [0, 1], or as [0, 255] when a value exceeds 1.

    Raises:
        InputError: values of another dtype, out of range, or not finite.
    """
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind not in "biufc":
        raise InputError(f"{name}: an array of {values.dtype} holds no numbers; give uint8 0..255")
    if not np.all(np.isfinite(values)):
        raise InputError(f"{name} holds NaN or infinite values; clean and scale it to 0..255")
    low, high = values.min(), values.max()
    if kind == "f" and low >= 0 and high <= 255:
        scale = 255.0 if high <= 1 else 1.0
        note = f"float values scaled from [0, {255 / scale:g}]"
        return np.rint(values.astype(np.float64) * scale).astype(np.uint8), note
    if kind == "i" and size == 4 and low >= 0 and high <= 255:
        return values.astype(np.uint8), "32-bit values read as 8-bit"
    if (kind, size) in (("u", 2), ("i", 4)) and low >= 0 and high <= 65535:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8), "16-bit scaled to 8-bit"
    raise InputError(
        f"{name}: {values.dtype} values from {low} to {high} are not colors; scale them to uint8 "
        "0..255 first"
    )


def _composite_on_white(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    alpha_low, _ = rgba.getchannel("A").getextrema()
    if alpha_low == 255:
        return rgba.convert("RGB"), ()
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB"), ("transparency composited on white",)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 for missing or damaged EXIF data, as image viewers do."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # the parser raises many kinds of errors on garbage
        return 1
    return value if isinstance(value, int) else 1


def _num_frames(image: Image.Image) -> int:
    """Return the number of frames of an animation or multi-page file; 0 for a still image."""
    try:
        return getattr(image, "n_frames", 1) if getattr(image, "is_animated", False) else 0
    except Exception:  # a later frame is damaged, and only the first is used
        return 0


def _describe_unreadable(kind: str) -> str:
    supported = "supported are JPEG, PNG, GIF, WebP, BMP and TIFF"
    if kind.startswith("image/") and kind.removeprefix("image/").upper() in FORMATS:
        return f"is a damaged {kind.removeprefix('image/').upper()} file; save it again"
    if kind == "application/octet-stream":
        return f"is not an image in a known format; {supported}"
    return f"is {kind}, not a supported image; {supported}"


def _types_differ(declared: str, kind: str) -> bool:
    return declared.replace("image/jpg", "image/jpeg") != kind


@contextmanager
def _open_binary(content: Path | bytes) -> Iterator[BinaryIO]:
    if isinstance(content, bytes):
        yield io.BytesIO(content)
        return
    with content.open("rb") as file:
        yield file


@contextmanager
def _ignore_pillow_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings about damaged metadata: relevant damage is raised or noted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
