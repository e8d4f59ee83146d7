"""Image decoding: any image file, PIL image or array -> upright, opaque 8-bit RGB.

The header is checked against the limits before anything is decoded. Then the first frame is
decoded, the EXIF orientation applied, transparency composited on white, 16-bit and float values
scaled, and other modes converted. Opaque 8-bit files become exactly Pillow's `convert("RGB")`.
Color profiles are ignored, as in transformers. (HF: load_image, ImageOps.exif_transpose.)
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin

from qwen2vl.errors import InputError, MediaTooLargeError
from qwen2vl.processor.image_formats.formats import (
    COMPOSITED_NOTE,
    UnsupportedImageError,
    describe_unreadable,
    notes_of,
)
from qwen2vl.processor.image_formats.plugins import load_pixels, open_format
from qwen2vl.processor.image_formats.samples import composite_image
from qwen2vl.processor.media.arrays import to_uint8
from qwen2vl.processor.media.sniff import sniff_type
from qwen2vl.processor.media.source import (
    Media,
    MediaLimits,
    MediaSource,
    out_of_memory,
    read_head,
    read_source,
)

__all__ = [
    "DecodedImage",
    "array_to_image",
    "check_image_size",
    "decode_media",
    "decode_rgb",
    "is_animation",
    "open_encoded",
    "open_image",
    "oriented_size",
]

# Pillow logs damaged files; without any handler its records would be printed to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_ANIMATED_TYPES = ("image/gif", "image/webp", "image/png", "image/avif")

_IMAGE_WIDTH, _IMAGE_LENGTH, _ORIENTATION = 0x0100, 0x0101, 0x0112  # tags of TIFF and EXIF
_TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INVERSE_ORIENTATIONS = {6: 8, 8: 6}  # the others are their own
_SWAPPED_ORIENTATIONS = (5, 6, 7, 8)  # those that swap height and width
_WIDE_MODES = frozenset({"I", "F", "I;16", "I;16L", "I;16B", "I;16N"})


class DecodedImage(NamedTuple):
    """An upright RGB image, notes on what was adjusted, and the EXIF orientation it had."""

    image: Image.Image
    notes: tuple[str, ...] = ()
    orientation: int = 1  # that was applied, 1 to 8: 1 changes nothing


def open_image(
    source: MediaSource, limits: MediaLimits, name: str, *, apply_exif_orientation: bool = True
) -> DecodedImage:
    """Open any image as RGB.

    Arrays and tensors have 1, 3 (RGB) or 4 (RGBA) channels, last or first, or (height, width):
    arrays.py has the rules.

    Raises:
        InputError: not found, not a supported image, damaged, or larger than the limits.
    """
    media = read_source(source, limits, name)
    return decode_media(media, limits, name, apply_exif_orientation=apply_exif_orientation)


def decode_media(
    media: Media, limits: MediaLimits, name: str, *, apply_exif_orientation: bool = True
) -> DecodedImage:
    """Decode an image that has been read.

    Raises:
        InputError: not a supported image, damaged, or larger than the limits.
    """
    if isinstance(media.content, np.ndarray):
        return DecodedImage(*array_to_image(media.content, limits, name))
    if isinstance(media.content, Image.Image):
        check_image_size(media.content, limits, name)
        return decode_rgb(media.content, name, apply_exif_orientation=apply_exif_orientation)
    with open_encoded(media, limits, name) as (image, notes):
        decoded = decode_rgb(image, name, apply_exif_orientation=apply_exif_orientation)
    return decoded._replace(notes=notes + decoded.notes)


@contextmanager
def open_encoded(
    media: Media, limits: MediaLimits, name: str
) -> Iterator[tuple[Image.Image, tuple[str, ...]]]:
    """Read the header of an encoded image; pixels are decoded lazily, inside the context."""
    assert isinstance(media.content, (Path, bytes)), "pixels need no decoder"
    kind = sniff_type(read_head(media))
    if kind.startswith("video/"):
        raise InputError(f"{name} is a video ({kind}); give it as video, not image")
    notes: tuple[str, ...] = ()
    if (
        media.content_type
        and media.content_type.startswith("image/")
        and _types_differ(media.content_type, kind)
    ):
        notes = (f"declared as {media.content_type}, read as {kind}",)
    with _open_binary(media.content) as file, _ignore_pillow_warnings():
        try:
            image = open_format(file, kind, limits.image_formats)
        except UnsupportedImageError as error:
            raise InputError(f"{name} is {error}") from error
        except Image.DecompressionBombError as error:
            count = re.search(r"\((\d+) pixels\)", str(error))
            has = f"{int(count[1]):,}" if count else "too many"
            raise MediaTooLargeError(
                f"{name} has {has} pixels, limit is {limits.max_image_pixels:,}; resize it first"
            ) from error
        except MemoryError as error:
            raise out_of_memory(name) from error
        except Exception as error:  # plugins raise all kinds of errors for damaged headers
            raise InputError(f"{name} {describe_unreadable(kind, limits.image_formats)}") from error
        check_image_size(image, limits, name)
        yield image, notes


def is_animation(media: Media, name: str) -> bool:
    """Return whether an encoded GIF, WebP, PNG or AVIF has several frames.

    The pages of a TIFF are no frames. False also for a file that is damaged or too large, as
    decoding reports.
    """
    if sniff_type(read_head(media)) not in _ANIMATED_TYPES:
        return False
    with suppress(InputError), open_encoded(media, MediaLimits(), name) as (image, _):
        return _num_frames(image) > 1
    return False


def check_image_size(image: Image.Image, limits: MediaLimits, name: str) -> None:
    """Check the size of an image against the limit, by its header alone.

    Raises:
        InputError: no pixels, or more than the limit.
    """
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(
            f"{name} is {width} x {height} pixels; an image needs at least 1 x 1, so save it again"
        )
    if width * height > limits.max_image_pixels:
        raise MediaTooLargeError(
            f"{name} is {width} x {height} = {width * height:,} pixels, limit is "
            f"{limits.max_image_pixels:,}; resize it first"
        )


def oriented_size(image: Image.Image, *, apply_exif_orientation: bool = True) -> tuple[int, int]:
    """Return (height, width) of the image that `decode_rgb` returns, by its header alone."""
    width, height = image.size
    orientation = _orientation(image)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and orientation > 1:
        # Pillow's size of a TIFF is that of the upright image, since 11.2, by the tag alone.
        width, height = image.tag_v2[_IMAGE_WIDTH], image.tag_v2[_IMAGE_LENGTH]
    swaps = apply_exif_orientation and orientation in _SWAPPED_ORIENTATIONS
    return (width, height) if swaps else (height, width)


def decode_rgb(
    image: Image.Image, name: str, *, apply_exif_orientation: bool = True
) -> DecodedImage:
    """Decode the current frame fully and convert it to upright RGB.

    Raises:
        InputError: the data are damaged or end early, the pixels cannot be shown as RGB, or there
            is not enough memory.
    """
    try:
        return _decode_rgb(image, name, apply_exif_orientation)
    except MemoryError as error:
        raise out_of_memory(name) from error


def _decode_rgb(image: Image.Image, name: str, apply_exif_orientation: bool) -> DecodedImage:
    notes: list[str] = []
    if frames := _num_frames(image):
        notes.append(f"first of {frames} frames")
    orientation = _orientation(image)
    # Pillow turns a TIFF upright when it loads it.
    is_turned = isinstance(image, TiffImagePlugin.TiffImageFile) and orientation > 1
    image = _load(image, name)
    if orientation > 1 and apply_exif_orientation:
        if not is_turned:
            image = _transpose(image, orientation)
        notes.append("EXIF orientation applied")
    elif is_turned:
        image = _transpose(image, _INVERSE_ORIENTATIONS.get(orientation, orientation))
    notes += notes_of(image)
    rgb, mode_notes = _to_rgb(image, name)
    return DecodedImage(rgb, (*notes, *mode_notes), orientation if apply_exif_orientation else 1)


def _load(image: Image.Image, name: str) -> Image.Image:
    try:
        return load_pixels(image)
    except MemoryError:
        raise
    except UnsupportedImageError as error:
        raise InputError(f"{name} is {error}") from error
    except Exception as error:  # decoders of damaged data raise many kinds of errors
        if _is_closed(image, error):
            raise InputError(
                f"{name} is a closed PIL image; open it again, or load() it before it is closed"
            ) from error
        raise InputError(
            f"{name} is damaged: its pixels end early or cannot be decoded; save it again"
        ) from error


def _is_closed(image: Image.Image, error: Exception) -> bool:
    """Return whether loading failed because the image, or its file, had been closed."""
    has_pixels_to_read = bool(getattr(image, "tile", ()))
    is_without_file = has_pixels_to_read and getattr(image, "fp", None) is None
    return is_without_file or (isinstance(error, ValueError) and "closed" in str(error))


def _transpose(image: Image.Image, orientation: int) -> Image.Image:
    """Return an image as an EXIF orientation says that it is to be shown."""
    turned = image.transpose(_TRANSPOSE_OF_ORIENTATION[orientation])
    turned.info |= image.info
    return turned


def _to_rgb(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Convert decoded pixels of any Pillow mode to opaque 8-bit RGB.

    Raises:
        InputError: the mode, or the range of its values, cannot be converted to a color.
    """
    if image.mode in _WIDE_MODES:
        gray, note = to_uint8(np.asarray(image), name)
        return Image.fromarray(gray).convert("RGB"), (note,)
    try:
        if image.has_transparency_data or image.mode == "La":
            rgb, is_transparent = composite_image(image)
            return rgb, (COMPOSITED_NOTE,) if is_transparent else ()
        return image if image.mode == "RGB" else image.convert("RGB"), ()
    except (ValueError, AssertionError) as error:  # Pillow asserts that a palette is there
        raise InputError(
            f"{name}: color mode {image.mode!r} cannot become RGB; convert it first"
        ) from error


def array_to_image(
    array: np.ndarray, limits: MediaLimits, name: str
) -> tuple[Image.Image, tuple[str, ...]]:
    """Convert an array (height, width, channels) or (height, width), as arrays.py returns it.

    Raises:
        InputError: a dtype or values that are not colors, or more pixels than the limit.
    """
    if array.shape[0] * array.shape[1] > limits.max_image_pixels:
        raise MediaTooLargeError(
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


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 for missing or damaged EXIF data, as image viewers do."""
    try:
        # Not `getexif` of PNG, which decodes the pixels to find what may stand after them.
        value = Image.Image.getexif(image).get(_ORIENTATION)
    except Exception:  # the parser raises many kinds of errors on garbage
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSE_OF_ORIENTATION else 1


def _num_frames(image: Image.Image) -> int:
    """Return the number of frames of an animation or multi-page file; 0 for a still image."""
    try:
        count = getattr(image, "n_frames", 1) if getattr(image, "is_animated", False) else 0
        return count if count > 1 else 0
    except Exception:  # a later frame is damaged, and only the first is used
        return 0


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
