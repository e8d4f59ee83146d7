"""The image formats that are read, by Pillow's names: media types, extensions, and error texts.

`MediaLimits.image_formats` selects from them: the library and the command line read all, a server
reads `SERVER_IMAGE_FORMATS`. No other decoder is ever used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "COMPOSITED_NOTE",
    "IMAGE_FORMATS",
    "IMAGE_SUFFIXES",
    "SERVER_IMAGE_FORMATS",
    "UnsupportedImageError",
    "add_note",
    "describe_unreadable",
    "format_of",
    "list_formats",
    "notes_of",
]

COMPOSITED_NOTE = "transparency composited on white"

SERVER_IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
IMAGE_FORMATS = (*SERVER_IMAGE_FORMATS, "AVIF", "PPM")
# fmt: off
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff",
    ".avif", ".ppm", ".pgm", ".pbm", ".pnm",
)
# fmt: on

_FORMAT_OF = {f"image/{name.lower()}": name for name in IMAGE_FORMATS if name != "PPM"} | {
    f"image/x-portable-{name}": "PPM" for name in ("bitmap", "graymap", "pixmap")
}
_LABELS = {"WEBP": "WebP"}
_NOTES = "qwen2vl notes"  # key of Image.info; texts of a PNG are under keys of their own choice


class UnsupportedImageError(Exception):
    """A file of a supported format that holds what is not read; the text follows "... is "."""


def add_note(image: Image.Image, note: str) -> None:
    """Keep a note on what was adjusted or ignored in `Image.info`, for `notes_of`."""
    image.info[_NOTES] = (*notes_of(image), note)


def notes_of(image: Image.Image) -> tuple[str, ...]:
    """Return the notes that `add_note` kept; a text of the file under their key is none."""
    notes = image.info.get(_NOTES)
    return notes if isinstance(notes, tuple) else ()


def format_of(media_type: str) -> str | None:
    """Return Pillow's name of the format of a media type; None: not one that is read."""
    return _FORMAT_OF.get(media_type)


def list_formats(formats: Sequence[str]) -> str:
    """Return "JPEG, PNG and TIFF"."""
    *names, last = (_LABELS.get(name, name) for name in formats)
    return f"{', '.join(names)} and {last}" if names else last


def describe_unreadable(media_type: str, formats: Sequence[str]) -> str:
    """Return why a file of a media type cannot be opened as an image, to follow a name.

    Args:
        media_type: as `sniff_type` finds it.
        formats: those that are read here.
    """
    name = format_of(media_type)
    if name in formats:
        if name == "AVIF" and not _has_avif_decoder():
            return "is an AVIF file, which this build of Pillow cannot read; install pillow>=11.3"
        return f"is a damaged {name} file; save it again"
    supported = f"supported are {list_formats(formats)}"
    if media_type == "application/octet-stream":
        return f"is not an image in a known format; {supported}"
    remedy = ": save it as one of these" if media_type.startswith("image/") else ""
    return f"is {media_type}, not a supported image; {supported}{remedy}"


def _has_avif_decoder() -> bool:
    # Not at the top: the command line imports this module before it needs Pillow.
    from PIL import features

    return bool(features.check("avif"))
