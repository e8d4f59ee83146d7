"""Disk cache of arrays that take minutes to compute: each is computed once, by one process.

A file is written under a temporary name and renamed, so that it is complete or absent; a damaged
file counts as absent. If several ranks of a machine need the same arrays, the first creates (or
refreshes) them while the others wait on a file lock. Cache folders are bounded by evicting the
least recently used files.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from qwen2vl.errors import ConfigError

__all__ = ["PARTIAL_SUFFIX", "Arrays", "evict_lru", "load_or_create", "resolve_cache_dir", "touch"]

Arrays = Mapping[str, np.ndarray]

PARTIAL_SUFFIX = ".partial"  # in the name of a file being written, which also begins with a dot
STALE_SECONDS = 3600.0  # since the last write; a partial file older than this has no writer


def resolve_cache_dir(folder: str) -> Path:
    """Return the cache folder: `folder`, or by default one in the user's cache."""
    if folder:
        return Path(folder).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "qwen2vl"


def load_or_create(
    path: Path,
    create: Callable[[], Arrays],
    *,
    refresh: Callable[[Arrays], Callable[[], Arrays] | None] = lambda cached: None,
) -> Arrays:
    """Load the arrays in `path`, or create and store them.

    Args:
        path: of the file.
        create: computes the arrays.
        refresh: given cached arrays, returns a function that computes better ones, or None.

    Raises:
        ConfigError: the folder cannot be written. Errors of `create` are passed on.
    """
    identity = _file_identity(path)
    cached = _read(path) if touch(path) else None
    create_or_refresh = create if cached is None else refresh(cached)
    if cached is not None and create_or_refresh is None:
        return cached
    assert create_or_refresh is not None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise _cache_dir_error(path, error) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed or the process dies
        # Another process may have created the file in the meantime.
        if _file_identity(path) != identity and (cached := _read(path)) is not None:
            return cached
        created = create_or_refresh()
        try:
            partial = path.with_name(f".{path.stem}.partial.npz")
            np.savez(partial, **created)  # pyright: ignore[reportArgumentType] - arrays by name
            os.replace(partial, path)
        except OSError as error:
            raise _cache_dir_error(path, error) from error
        path.with_suffix(".lock").unlink(missing_ok=True)
    return created


def touch(path: Path) -> bool:
    """Return whether a file exists, and mark it as used now by its modification time."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # owned by another user, or on a read-only file system
        return path.is_file()
    return True


def evict_lru(folder: Path, max_bytes: int, *, min_idle_seconds: float = 0.0) -> None:
    """Delete partial files of dead writers, then least recently used files above `max_bytes`.

    Other processes may do the same, and use the files, at the same time. Files that cannot be
    deleted stay.

    Args:
        folder: of files, also in subfolders.
        max_bytes: of all files together.
        min_idle_seconds: a file that was used within them stays, even above the limit.
    """
    now, entries = time.time(), []
    for path in folder.glob("**/*"):
        with suppress(OSError):  # deleted meanwhile, another user's, or a read-only file system
            info = path.stat()
            if path.name.startswith(".") and PARTIAL_SUFFIX in path.name:
                if now - info.st_mtime > STALE_SECONDS:
                    path.unlink()
            elif path.is_file():
                entries.append((info.st_mtime_ns, info.st_size, path))
    total = sum(size for _, size, _ in entries)
    for last_used, size, path in sorted(entries):
        if total <= max_bytes or now - last_used / 1e9 < min_idle_seconds:
            return
        if _evict(path, last_used):
            total -= size


def _evict(path: Path, last_used: int) -> bool:
    """Delete a file unless it was used after `last_used`; return whether it is gone."""
    try:
        if path.stat().st_mtime_ns != last_used:
            return False
        path.unlink()
    except FileNotFoundError:  # another process was faster
        return True
    except OSError:  # owned by another user, or on a read-only file system
        return False
    return True


def _file_identity(path: Path) -> tuple[int, int]:
    """Identify a version of a file; its modification time is only that of its last use."""
    try:
        info = path.stat()
    except OSError:
        return 0, 0
    return info.st_ino, info.st_size


def _read(path: Path) -> Arrays | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, BadZipFile):
        return None


def _cache_dir_error(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path.parent}: cannot write cache files: {error.strerror}; give another folder, "
        "data.cache_dir=FOLDER"
    )
