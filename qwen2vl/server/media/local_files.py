"""Local files of file:// URLs, under one allowed root only, read into bytes.

The real path must lie below the root (symbolic links inside it may point inside it). The file is
then opened component by component from the root, following no link, so that a link that is swapped
in after the check is refused, not followed. Pipes and devices are never opened. Errors do not echo
paths, and do not tell whether something exists outside the root.
(vLLM: --allowed-local-media-path; llama.cpp: --media-path.)
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote_to_bytes

from qwen2vl.errors import ConfigError
from qwen2vl.server.errors import APIError

__all__ = ["LocalFiles"]

logger = logging.getLogger(__name__)

_PREFIX = "file://"
_READ_CHUNK = 1 << 20


class LocalFiles:
    """Reads the files below one folder.

    Args:
        root: the folder of --allowed-local-media-path.

    Raises:
        ConfigError: it is no folder.
    """

    def __init__(self, root: Path) -> None:
        self._given = os.path.abspath(root)
        self._root = os.path.realpath(root)
        if not os.path.isdir(self._root):
            raise ConfigError(f"--allowed-local-media-path {root} is not a folder; name one")

    def read(self, url: str, name: str, max_bytes: int) -> bytes:
        """Return the bytes of the file that a file:// URL names; blocks.

        Args:
            url: file:///PATH, percent-encoded or not; "?" and "#" are parts of the name.
            name: of the item, for errors.
            max_bytes: limit of the size.

        Raises:
            APIError: 400: the path is not below the root, there is no such file, it is not a
                regular file, it cannot be read, or it is too large.
        """
        path = self._resolve(_decode_path(url, name), name)
        try:
            with self._open(path) as file:
                return _read(file, name, max_bytes)
        except FileNotFoundError as error:
            raise _not_found(name) from error
        except OSError as error:
            logger.info("%s: the file cannot be read: %s", name, type(error).__name__)
            text = "the file cannot be read; check that it is a file and its permissions"
            raise _refusal(name, text, "invalid_value") from error

    def _resolve(self, path: str, name: str) -> str:
        """Return the real path, relative to the root."""
        text = "the path is not under --allowed-local-media-path"
        refusal = _refusal(name, text, "media_not_allowed")
        # Before the file system is asked: nothing outside the root is looked at.
        if ".." in path.split("/") or not any(
            _is_below(path, r) for r in (self._given, self._root)
        ):
            raise refusal
        try:
            real = os.path.realpath(path)
        except (OSError, ValueError) as error:  # a loop of links, or a name that is too long
            raise refusal from error
        if not _is_below(real, self._root):
            raise refusal
        return os.path.relpath(real, self._root)

    @contextmanager
    def _open(self, path: str) -> Iterator[int]:
        """Open a path without links, relative to the root; a folder, pipe or device is not."""
        folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            *parents, file_name = path.split("/")
            for parent in parents:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                child = os.open(parent, flags, dir_fd=folder)
                os.close(folder)
                folder = child
            # Opening a device may already do something, and opening a pipe waits for its writer.
            if not stat.S_ISREG(os.stat(file_name, dir_fd=folder, follow_symlinks=False).st_mode):
                raise OSError("not a regular file")
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(file_name, flags, dir_fd=folder)
        finally:
            os.close(folder)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError("not a regular file")
            yield file
        finally:
            os.close(file)


def _decode_path(url: str, name: str) -> str:
    host, slash, path = url[len(_PREFIX) :].partition("/")
    if host.lower() not in ("", "localhost") or not slash:
        text = "the file URL names a host; write file:///path with three slashes"
        raise APIError(400, f"{name}: {text}", param=name, code="invalid_url")
    try:
        decoded = unquote_to_bytes(f"/{path}")
    except UnicodeEncodeError as error:  # a lone surrogate
        raise _not_found(name) from error
    if b"\0" in decoded:
        raise _not_found(name)
    return os.fsdecode(decoded)


def _is_below(path: str, root: str) -> bool:
    """Return whether a path lies below a root, by whole components: /tmp/x is not below /tm."""
    return path.startswith(root.rstrip("/") + "/")


def _read(file: int, name: str, max_bytes: int) -> bytes:
    size = os.fstat(file).st_size
    content = bytearray()
    # One byte more than the limit: the file may grow meanwhile.
    while size <= max_bytes and (
        chunk := os.read(file, min(_READ_CHUNK, max_bytes + 1 - len(content)))
    ):
        content += chunk
        size = max(size, len(content))
    if size > max_bytes:
        raise APIError(
            400,
            f"{name}: the file has {size:,} bytes, the limit is {max_bytes:,}; give a smaller one",
            param=name,
            code="media_too_large",
        )
    return bytes(content)


def _not_found(name: str) -> APIError:
    """Return the error of a file under the root, or of a path that no file can have."""
    text = f"{name}: the file does not exist; check the path"
    return APIError(400, text, param=name, code="media_not_found")


def _refusal(name: str, text: str, code: str) -> APIError:
    return APIError(400, f"{name}: {text}", param=name, code=code)
