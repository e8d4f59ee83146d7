"""Media sources: resolve paths, URLs, bytes and arrays within limits; options and type sniffing.

A source is a path, a file:// URL, bytes, a PIL image, a numpy array, a data URL or an http(s)
URL. `read_source`, the only way by which media are read, resolves it to `Media` without decoding.
`MediaLimits` restricts what may be opened (a server forbids local files); `MediaOptions` holds the
user's options of one image or video. Decoding: rgb.py (images), video_source.py (videos).
(HF: load_image, load_video; qwen_vl_utils: fetch_image, fetch_video.)
"""

from __future__ import annotations

import base64
import binascii
import math
import os
import re
import stat
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image

from qwen2vl.errors import ConfigError, InputError
from qwen2vl.processor.media.download import download

__all__ = [
    "DEFAULT_LIMITS",
    "NO_OPTIONS",
    "Media",
    "MediaLimits",
    "MediaOptions",
    "MediaSource",
    "read_head",
    "read_source",
    "sniff_type",
]

MediaSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | Image.Image | np.ndarray"

# Field -> smallest and largest meaningful value; the largest keep a typing error or a malicious
# request from allocating gigabytes.
_RANGES: dict[str, tuple[float, float]] = {
    "min_pixels": (1, 100_000_000),
    "max_pixels": (1, 100_000_000),
    "total_pixels": (1, 10_000_000_000),
    "resized_height": (1, 100_000),
    "resized_width": (1, 100_000),
    "nframes": (1, 100_000),
    "min_frames": (1, 100_000),
    "max_frames": (1, 100_000),
    "fps": (1e-6, 1e6),
    "video_start": (0, 1e9),
    "video_end": (0, 1e9),
}
_PILLOW_MAX_PIXELS = 2 * 89_478_485  # above it Pillow raises DecompressionBombError
_FRACTIONAL = frozenset({"fps", "video_start", "video_end"})
_EXCLUSIVE = (
    ("fps", "nframes"),
    ("resized_height", "min_pixels"),
    ("resized_height", "max_pixels"),
)
_ORDERED = (
    ("min_pixels", "max_pixels"),
    ("min_frames", "max_frames"),
    ("video_start", "video_end"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaOptions:
    """Options of one image or video; None: the default of the model's folder.

    Names are those of qwen-vl-utils' messages. Validated when built.

    Raises:
        InputError: a value is out of range, or two of them contradict each other.
    """

    min_pixels: int | None = None  # of one image or frame after resizing
    max_pixels: int | None = None  # the same, as an upper limit
    resized_height: int | None = None  # resize to this size, rounded to whole tokens
    resized_width: int | None = None  # given together with resized_height
    fps: float | None = None  # sampled frames per second; for a list of frames: its frame rate
    nframes: int | None = None  # number of sampled frames, instead of fps
    min_frames: int | None = None  # fewest sampled frames
    max_frames: int | None = None  # most sampled frames
    total_pixels: int | None = None  # budget of a video: area of a frame, summed over pairs
    video_start: float | None = None  # seconds from the first frame
    video_end: float | None = None  # the same

    def __post_init__(self) -> None:
        options = self.to_dict()
        for name, value in options.items():
            _check_range(name, value)
        for first, second in _EXCLUSIVE:
            if first in options and second in options:
                raise InputError(
                    f"{first} {options[first]} and {second} {options[second]} exclude each other; "
                    "use either one"
                )
        for low, high in _ORDERED:
            if low in options and high in options and options[low] > options[high]:
                raise InputError(
                    f"{low} {options[low]} is greater than {high} {options[high]}; lower the first "
                    "or raise the second"
                )
        if ("resized_height" in options) != ("resized_width" in options):
            raise InputError("resized_height and resized_width go together; give both or neither")

    def to_dict(self) -> dict[str, int | float]:
        """Return the options that are set, with their values."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in pairs if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    """Limits on the media that may be opened. The defaults are for local use, not for a server."""

    max_bytes: int = 4 * 1024**3  # of a file, a download or a data URL
    max_image_pixels: int = 100_000_000  # of one image or frame, checked before decoding
    max_frames: int = 500_000  # of one video
    max_seconds: float = 6 * 3600.0  # duration of one video
    download_timeout: float = 60.0  # seconds for one URL in total
    decode_timeout: float = 900.0  # seconds for one video
    allow_urls: bool = True
    allow_files: bool = True

    def __post_init__(self) -> None:
        if self.max_image_pixels > _PILLOW_MAX_PIXELS:
            raise ConfigError(
                f"max_image_pixels {self.max_image_pixels:,} exceeds {_PILLOW_MAX_PIXELS:,}, above "
                "which Pillow refuses to open a file"
            )


NO_OPTIONS = MediaOptions()
DEFAULT_LIMITS = MediaLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """A source that has been resolved, but not decoded."""

    content: Path | bytes | Image.Image | np.ndarray
    content_type: str | None = None  # media type that a URL or its server declared


def read_source(source: MediaSource, limits: MediaLimits, name: str) -> Media:
    """Resolve `source`; files stay on disk, URLs are read into memory.

    Raises:
        InputError: it cannot be found, is not allowed, empty, or too large.
    """
    if isinstance(source, (Image.Image, np.ndarray)):
        return Media(content=source)
    if isinstance(source, (bytes, bytearray)):
        return Media(content=_check_bytes(bytes(source), limits, name))
    if isinstance(source, str):
        return _resolve_string(source, limits, name)
    if isinstance(source, os.PathLike):
        return Media(content=_resolve_file(os.fspath(source), limits, name))
    raise InputError(
        f"{name}: cannot read a {type(source).__name__}; give a path, bytes, a PIL image, a numpy "
        "array, or a data, file or http URL"
    )


def read_head(media: Media, count: int = 64) -> bytes:
    """Return the first bytes of an encoded source, for `sniff_type`."""
    if isinstance(media.content, Path):
        with media.content.open("rb") as file:
            return file.read(count)
    assert isinstance(media.content, bytes), "pixels have no first bytes"
    return media.content[:count]


_MAGIC: tuple[tuple[bytes, int, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", 0, "image/png"),
    (b"\xff\xd8\xff", 0, "image/jpeg"),
    (b"GIF8", 0, "image/gif"),
    (b"WEBP", 8, "image/webp"),
    (b"BM", 0, "image/bmp"),
    (b"II*\x00", 0, "image/tiff"),
    (b"MM\x00*", 0, "image/tiff"),
    (b"II+\x00", 0, "image/tiff"),
    (b"MM\x00+", 0, "image/tiff"),
    (b"%PDF", 0, "application/pdf"),
    (b"%!PS", 0, "application/postscript"),
    (b"\xc5\xd0\xd3\xc6", 0, "application/postscript"),
    (b"8BPS", 0, "image/vnd.adobe.photoshop"),
    (b"\x00\x00\x00\x0cjP  ", 0, "image/jp2"),
    (b"\xff\x4f\xff\x51", 0, "image/jp2"),
    (b"ftypheic", 4, "image/heic"),
    (b"ftypheix", 4, "image/heic"),
    (b"ftypmif1", 4, "image/heic"),
    (b"ftypavif", 4, "image/avif"),
    (b"ftyp", 4, "video/mp4"),
    (b"\x1aE\xdf\xa3", 0, "video/x-matroska"),
    (b"AVI ", 8, "video/x-msvideo"),
    (b"WAVE", 8, "audio/wav"),
    (b"FLV\x01", 0, "video/x-flv"),
    (b"OggS", 0, "video/ogg"),
    (b"\x00\x00\x01\xba", 0, "video/mpeg"),
    (b"\x00\x00\x01\xb3", 0, "video/mpeg"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", 0, "video/x-ms-asf"),
    (b"ID3", 0, "audio/mpeg"),
    (b"fLaC", 0, "audio/flac"),
    (b"PK\x03\x04", 0, "application/zip"),
    (b"\x1f\x8b", 0, "application/gzip"),
)
_TEXT_STARTS = (
    (("<!doctype html", "<html", "<head", "<body"), "text/html"),
    (("<svg",), "image/svg+xml"),
    (("<?xml",), "text/xml"),
    (("{", "["), "application/json"),
)


def sniff_type(head: bytes) -> str:
    """Return the media type by magic bytes; for error texts and dispatch, not for security."""
    for magic, offset, kind in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return kind
    text = head.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n").lower()
    for starts, kind in _TEXT_STARTS:
        if text.startswith(starts):
            return "image/svg+xml" if "<svg" in text else kind
    binary = sum(byte < 9 or 13 < byte < 32 or byte == 127 for byte in head)
    return "text/plain" if text and not binary else "application/octet-stream"


def _check_range(name: str, value: int | float) -> None:
    low, high = _RANGES[name]
    types = (int, float) if name in _FRACTIONAL else (int,)
    is_nan = isinstance(value, float) and math.isnan(value)
    if isinstance(value, bool) or not isinstance(value, types) or is_nan:
        want = "a number" if name in _FRACTIONAL else "a whole number"
        raise InputError(f"{name} is {value!r}, must be {want}")
    if not low <= value <= high:
        raise InputError(f"{name} is {value}, must lie between {low:g} and {high:g}")


def _resolve_string(source: str, limits: MediaLimits, name: str) -> Media:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://|(data):", source, re.IGNORECASE)
    if scheme is None:
        return Media(content=_resolve_file(source, limits, name))
    kind = (scheme[1] or scheme[2]).lower()
    if kind == "data":
        return _decode_data_url(source, limits, name)
    if kind == "file":
        return Media(content=_resolve_file(_file_url_path(source, name), limits, name))
    if kind not in ("http", "https"):
        raise InputError(f"{name}: {kind}:// is not supported; use http, https, file or data")
    if not limits.allow_urls:
        raise InputError(f"{name}: URLs are not allowed here; send the bytes, as a data URL")
    content, content_type = download(
        source, max_bytes=limits.max_bytes, timeout=limits.download_timeout, name=name
    )
    return Media(content=_check_bytes(content, limits, name), content_type=content_type)


def _decode_data_url(source: str, limits: MediaLimits, name: str) -> Media:
    """Decode "data:image/png;base64,...": base64, or percent-encoded without ";base64"."""
    head, comma, payload = source[5:].partition(",")
    if not comma:
        raise InputError(f"{name}: data URL without a comma; write data:image/png;base64,...")
    if len(payload) > limits.max_bytes / 3 * 4 + 4:
        raise InputError(
            f"{name}: data URL of {len(payload):,} characters, limit is {limits.max_bytes:,} bytes"
        )
    content_type, *parameters = head.lower().split(";")
    try:
        if "base64" in parameters:
            content = base64.b64decode("".join(unquote(payload).split()), validate=True)
        else:
            content = unquote_to_bytes(payload)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name}: the data URL is not valid base64; encode it again") from error
    return Media(content=_check_bytes(content, limits, name), content_type=content_type or None)


def _file_url_path(source: str, name: str) -> str:
    parts = urlsplit(source)
    if parts.netloc not in ("", "localhost"):
        raise InputError(
            f"{name}: file URL names the host {parts.netloc!r}; write file:///path with three "
            "slashes"
        )
    # "?" and "#" are ordinary characters in file names, so everything after the host is the path.
    return unquote(source[len("file://") + len(parts.netloc) :])


def _resolve_file(file_name: str, limits: MediaLimits, name: str) -> Path:
    if not limits.allow_files:
        raise InputError(f"{name}: local files are not allowed here; send the bytes, as a data URL")
    shown = repr(file_name if len(file_name) <= 120 else file_name[:117] + "...")
    try:
        path = Path(os.path.expanduser(file_name))  # Path.expanduser would expand ./~x, too
        info = path.stat()
    except FileNotFoundError as error:
        raise InputError(f"{name}: file {shown} not found; check the path") from error
    except PermissionError as error:
        raise InputError(f"{name}: no permission to read {shown}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: {shown} cannot be a file name; check the path") from error
    if stat.S_ISDIR(info.st_mode):
        raise InputError(f"{name}: {shown} is a folder; name a file in it")
    if not stat.S_ISREG(info.st_mode):
        raise InputError(f"{name}: {shown} is a pipe or a device; copy it to a file first")
    if not os.access(path, os.R_OK):
        raise InputError(f"{name}: no permission to read {shown}")
    _check_size(info.st_size, limits, name)
    return path


def _check_bytes(content: bytes, limits: MediaLimits, name: str) -> bytes:
    _check_size(len(content), limits, name)
    return content


def _check_size(size: int, limits: MediaLimits, name: str) -> None:
    if size == 0:
        raise InputError(f"{name} is empty (0 bytes); check where it comes from")
    if size > limits.max_bytes:
        raise InputError(
            f"{name} has {size:,} bytes, limit is {limits.max_bytes:,}; send a smaller file"
        )
