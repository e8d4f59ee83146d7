"""Media sources: resolve paths, URLs, bytes and arrays within limits.

A source is a path, a file:// URL, bytes, a binary file object, a PIL image, a numpy array, a torch
tensor, a data URL or an http(s) URL. `read_source`, the only way by which media are read, resolves
it to `Media` without decoding.
`MediaLimits` restricts what may be opened (a server forbids local files). rgb.py decodes images,
video_source.py videos.
(HF: load_image, load_video; qwen_vl_utils: fetch_image, fetch_video.)
"""

from __future__ import annotations

import math
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias
from urllib.parse import unquote

import numpy as np
from PIL import Image

from qwen2vl.errors import ConfigError, InputError, MediaTooLargeError
from qwen2vl.processor.image_formats.formats import IMAGE_FORMATS
from qwen2vl.processor.media.arrays import image_channels_last, tensor_to_array
from qwen2vl.processor.media.data_url import decode_data_url, looks_like_base64

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DEFAULT_LIMITS",
    "Media",
    "MediaLimits",
    "MediaSource",
    "copy_to_memory",
    "out_of_memory",
    "read_head",
    "read_source",
]

_Opened: TypeAlias = "BinaryIO | Image.Image | np.ndarray | Tensor"
MediaSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | _Opened"
_PILLOW_MAX_PIXELS = 2 * 89_478_485  # above it Pillow raises DecompressionBombError
_READ_CHUNK = 1 << 20


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
    image_formats: tuple[str, ...] = IMAGE_FORMATS  # Pillow's names of those that are decoded

    def __post_init__(self) -> None:
        if self.max_image_pixels > _PILLOW_MAX_PIXELS:
            raise ConfigError(
                f"max_image_pixels {self.max_image_pixels:,} exceeds {_PILLOW_MAX_PIXELS:,}, above "
                "which Pillow refuses to open a file"
            )
        if unknown := [name for name in self.image_formats if name not in IMAGE_FORMATS]:
            raise ConfigError(
                f"image_formats has {unknown[0]!r}, must be of {', '.join(IMAGE_FORMATS)}"
            )


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
    source = copy_to_memory(source, limits, name)
    if isinstance(source, np.ndarray):
        return Media(content=image_channels_last(source, name))
    if isinstance(source, Image.Image):
        return Media(content=source)
    if isinstance(source, bytes):
        return Media(content=_check_bytes(source, limits, name))
    if isinstance(source, str):
        return _resolve_string(source, limits, name)
    if isinstance(source, os.PathLike):
        return Media(content=_resolve_file(os.fsdecode(source), limits, name))
    if isinstance(source, (list, tuple)):
        raise InputError(f"{name}: a list is not an image; give a list of frames as video")
    is_nan = isinstance(source, float) and math.isnan(source)  # pandas' empty cell
    kind = "missing value (NaN)" if is_nan else type(source).__name__
    raise InputError(
        f"{name}: cannot read a {kind}; give a path, bytes, a binary file object, a PIL image, a "
        "numpy array, a torch tensor, or a data, file or http URL"
    )


def copy_to_memory(source: Any, limits: MediaLimits, name: str) -> Any:
    """Copy a file object to bytes and a tensor to an array; return other sources unchanged.

    A file object is read from its beginning, wherever it is, and left where it was; one that
    cannot seek, such as a pipe, is read from where it is, once. It is not closed.

    Raises:
        InputError: it cannot be read, holds text, or has more bytes than the limit.
    """
    if _is_tensor(source):
        return tensor_to_array(source, name)
    if isinstance(source, (bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, (bytes, str, os.PathLike)) or not callable(getattr(source, "read", None)):
        return source
    position = _rewind(source)
    try:
        return _read_chunks(source, limits, name)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{name}: the {type(source).__name__} cannot be read; open it again in mode 'rb'"
        ) from error
    finally:
        if position is not None:
            source.seek(position)


def _is_tensor(source: Any) -> bool:
    """Return whether `source` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def _rewind(file: BinaryIO) -> int | None:
    """Go to the beginning; return the position before, or None if the file cannot seek."""
    try:
        position = file.tell()
        file.seek(0)
    except (AttributeError, OSError, ValueError):  # ValueError: closed, which read reports
        return None
    return position


def _read_chunks(file: BinaryIO, limits: MediaLimits, name: str) -> bytes:
    content = bytearray()
    while chunk := file.read(_READ_CHUNK):
        if not isinstance(chunk, bytes):
            raise InputError(
                f"{name}: the {type(file).__name__} returns {type(chunk).__name__}, not bytes; "
                "open it in mode 'rb'"
            )
        content += chunk
        if len(content) > limits.max_bytes:
            raise MediaTooLargeError(
                f"{name} has more than {limits.max_bytes:,} bytes, which is the limit; send a "
                "smaller file"
            )
    return bytes(content)


def out_of_memory(name: str) -> MediaTooLargeError:
    """Return the error for media that cannot be decoded in the memory of this process."""
    return MediaTooLargeError(f"{name} needs more memory to decode than there is; resize it first")


def read_head(media: Media, count: int = 256) -> bytes:
    """Return the first bytes of an encoded source, for `sniff_type`."""
    if isinstance(media.content, Path):
        with media.content.open("rb") as file:
            return file.read(count)
    assert isinstance(media.content, bytes), "pixels have no first bytes"
    return media.content[:count]


def _resolve_string(source: str, limits: MediaLimits, name: str) -> Media:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://|(data):", source, re.IGNORECASE)
    if scheme is None:
        return Media(content=_resolve_file(source, limits, name))
    kind = (scheme[1] or scheme[2]).lower()
    if kind == "data":
        content, content_type = decode_data_url(source, limits.max_bytes, name)
        return Media(content=_check_bytes(content, limits, name), content_type=content_type)
    if kind == "file":
        return Media(content=_resolve_file(_file_url_path(source, name), limits, name))
    if kind not in ("http", "https"):
        raise InputError(f"{name}: {kind}:// is not supported; use http, https, file or data")
    if not limits.allow_urls:
        raise InputError(f"{name}: URLs are not allowed here; send the bytes, as a data URL")
    # Imports urllib and http, which take longer to load than this package.
    from qwen2vl.processor.media.download import download

    content, content_type = download(
        source, max_bytes=limits.max_bytes, timeout=limits.download_timeout, name=name
    )
    return Media(content=_check_bytes(content, limits, name), content_type=content_type)


def _file_url_path(source: str, name: str) -> str:
    # "?" and "#" are ordinary characters in file names, so everything after the host is the path.
    host, slash, path = source[len("file://") :].partition("/")
    if host not in ("", "localhost"):
        raise InputError(
            f"{name}: file URL names the host {host!r:.60}; write file:///path with three slashes"
        )
    return unquote(slash + path)


def _resolve_file(file_name: str, limits: MediaLimits, name: str) -> Path:
    if not limits.allow_files:
        raise InputError(f"{name}: local files are not allowed here; send the bytes, as a data URL")
    shown = repr(file_name if len(file_name) <= 120 else file_name[:117] + "...")
    # An item is named after its file: the name is not repeated before it.
    prefix = "" if name in (file_name, os.path.basename(file_name)) else f"{name}: "
    try:
        path = Path(os.path.expanduser(file_name))  # Path.expanduser would expand ./~x, too
        info = path.stat()
    except FileNotFoundError as error:
        text = f"file {shown} not found; check the path"
        if looks_like_base64(file_name):
            text = f"{shown} {_describe_non_file(file_name)}"
        raise InputError(f"{prefix}{text}") from error
    except PermissionError as error:
        raise InputError(f"{prefix}no permission to read {shown}; change it") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{prefix}{shown} {_describe_non_file(file_name)}") from error
    if stat.S_ISDIR(info.st_mode):
        raise InputError(f"{prefix}{shown} is a folder; name a file in it")
    if not stat.S_ISREG(info.st_mode):
        raise InputError(f"{prefix}{shown} is a pipe or a device; copy it to a file first")
    if not os.access(path, os.R_OK):
        raise InputError(f"{prefix}no permission to read {shown}; change it")
    _check_size(info.st_size, limits, name)
    return path


def _describe_non_file(source: str) -> str:
    if looks_like_base64(source):
        return "looks like base64, not a path; write data:image/png;base64,... before it"
    return "cannot be a file name; check the path"


def _check_bytes(content: bytes, limits: MediaLimits, name: str) -> bytes:
    _check_size(len(content), limits, name)
    return content


def _check_size(size: int, limits: MediaLimits, name: str) -> None:
    if size == 0:
        raise InputError(f"{name} is empty (0 bytes); save or download it again")
    if size > limits.max_bytes:
        raise MediaTooLargeError(
            f"{name} has {size:,} bytes, limit is {limits.max_bytes:,}; send a smaller file"
        )
