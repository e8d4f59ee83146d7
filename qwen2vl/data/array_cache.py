"""Disk cache of arrays that take minutes to compute: each is computed once, by one process.

Files are written atomically; a damaged one counts as absent. If several ranks of a machine need the
same arrays, the first creates (or refreshes) them while the others wait on a file lock.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from qwen2vl.errors import ConfigError
from qwen2vl.files import atomic_file, touch, user_cache_dir

__all__ = ["Arrays", "load_or_create", "resolve_cache_dir"]

Arrays = Mapping[str, np.ndarray]


def resolve_cache_dir(folder: str) -> Path:
    """Return the cache folder: `folder`, or by default one in the user's cache."""
    return Path(folder).expanduser() if folder else user_cache_dir()


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
            with atomic_file(path) as partial, partial.open("wb") as file:
                np.savez(file, **created)  # pyright: ignore[reportArgumentType] - arrays by name
        except OSError as error:
            raise _cache_dir_error(path, error) from error
        path.with_suffix(".lock").unlink(missing_ok=True)
    return created


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
