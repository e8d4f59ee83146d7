"""Files that several processes share: atomic writes (write, then rename), eviction.

    with atomic_file(path) as partial: ...      .NAME.xxxxxxxx.partial -> NAME
    with atomic_folder(path) as partial: ...    .NAME.partial -> NAME
    evict_lru(folder, max_bytes)                least recently used first, by modification time

A file or folder is written under a temporary name beside its own and renamed, so that other
processes, and a crash or a full disk, find it complete or not at all. OSErrors are passed on after
the temporary file is deleted; callers convert them to errors that name a remedy.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

__all__ = [
    "STALE_SECONDS",
    "atomic_file",
    "atomic_folder",
    "evict_lru",
    "partial_folder",
    "touch",
    "user_cache_dir",
]

PARTIAL_SUFFIX = ".partial"  # of a file or folder being written, whose name also begins with a dot
STALE_SECONDS = 3600.0  # since the last write; a partial file older than this has no writer

_ANY_NAME = re.compile(".*", re.DOTALL)


def user_cache_dir() -> Path:
    """Return this package's folder in the user's cache: in XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen2vl"


@contextmanager
def atomic_file(path: Path, *, mode: int = 0o666) -> Iterator[Path]:
    """Yield an empty temporary file to write; it becomes `path`, replacing an older version.

    Parent folders are created. Several threads and processes may write the same path. There is no
    fsync: after a power failure the file may be empty or truncated.

    Args:
        path: of the file.
        mode: permissions, from which the umask is subtracted as usual.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{token_hex(4)}{PARTIAL_SUFFIX}")
    partial.touch(mode, exist_ok=False)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, fsync: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder to write into; it becomes `path`.

    `path` must not exist, or be an empty folder. Its parent folders are created. Only one process
    may write it at a time: the temporary folder of a killed one is deleted.

    Args:
        path: of the folder.
        fsync: whether to force its files to disk first, so that the rename cannot outlive their
            contents in a power failure; subfolders are not.
    """
    partial = partial_folder(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if fsync:
            for file in filter(Path.is_file, partial.iterdir()):
                _fsync(file)
        if path.is_dir():
            path.rmdir()
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_folder(path: Path) -> Path:
    """Return the temporary name of a folder, under which other processes may write into it too."""
    return path.with_name(f".{path.name}{PARTIAL_SUFFIX}")


def touch(path: Path) -> bool:
    """Return whether a file exists, and mark it as used now by its modification time."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # owned by another user, or on a read-only file system
        return path.is_file()
    return True


def evict_lru(
    folder: Path,
    max_bytes: int,
    *,
    target_bytes: int | None = None,
    min_idle_seconds: float = 0.0,
    names: re.Pattern[str] = _ANY_NAME,
    ignore_errors: bool = True,
) -> int:
    """Delete partial files of dead writers, then least recently used files above `max_bytes`.

    Other processes may do the same, and write and use the files, at the same time. Partial files of
    live writers stay, but count.

    Args:
        folder: of files, also in subfolders.
        max_bytes: of all files together.
        target_bytes: to which the files are reduced once they exceed `max_bytes`; None: max_bytes.
        min_idle_seconds: a file that was used within them stays, even above the limit.
        names: of the files that count and may be deleted, whole, partial files included.
        ignore_errors: whether files that cannot be deleted, and folders that cannot be listed, are
            skipped; else the OSError is raised.

    Returns:
        The bytes of the files that remain.
    """
    now, total = time.time(), 0
    files: list[tuple[int, int, Path]] = []
    for path, info in _list_files(folder, names, ignore_errors):
        is_partial = path.name.startswith(".") and path.suffix == PARTIAL_SUFFIX
        if not is_partial:
            files.append((info.st_mtime_ns, info.st_size, path))
        elif now - info.st_mtime > STALE_SECONDS and _delete(path, info.st_mtime_ns, ignore_errors):
            continue
        total += info.st_size
    limit = max_bytes if target_bytes is None or total <= max_bytes else target_bytes
    for last_used, size, path in sorted(files):
        # A modification time in the future, by another machine's clock, counts as now.
        if total <= limit or max(0.0, now - last_used / 1e9) < min_idle_seconds:
            break
        if _delete(path, last_used, ignore_errors):
            total -= size
    return total


def _list_files(
    folder: Path, names: re.Pattern[str], ignore_errors: bool
) -> Iterator[tuple[Path, os.stat_result]]:
    ignored = OSError if ignore_errors else FileNotFoundError  # deleted meanwhile
    for parent, _, file_names in os.walk(folder, onerror=None if ignore_errors else _raise):
        for path in (Path(parent, name) for name in file_names if names.fullmatch(name)):
            with suppress(ignored):
                info = path.stat()
                if stat.S_ISREG(info.st_mode):
                    yield path, info


def _delete(path: Path, last_used: int, ignore_errors: bool) -> bool:
    """Delete a file unless it was used after `last_used`; return whether it is gone."""
    try:
        if path.stat().st_mtime_ns != last_used:
            return False
        path.unlink()
    except FileNotFoundError:  # another process was faster
        return True
    except OSError:  # owned by another user, or on a read-only file system
        if not ignore_errors:
            raise
        return False
    return True


def _raise(error: OSError) -> None:
    raise error


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
