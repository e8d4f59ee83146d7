"""Arrays that cost minutes to make, kept on disk by name: made once, by one process.

A file is written aside and renamed, so that it is whole or not there; a damaged one counts as not
there. Where several ranks of a machine want the same, the first makes (or mends) it and the others
wait. Folders of what is kept stay bounded: what was used longest ago leaves. It must not know what
the arrays mean. Next rooms: lengths.py, corpus.py.
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

__all__ = ["PARTIAL", "Arrays", "cache_folder", "keep", "trim", "used"]

Arrays = Mapping[str, np.ndarray]

PARTIAL = ".partial"  # in the name of what is being written, which also begins with a dot
STALE = 3600.0  # seconds in which a writer that lives has written more


def cache_folder(given: str) -> Path:
    """Say where things are kept: in `given`, or else in the user's cache."""
    if given:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "qwen2vl"


def keep(
    path: Path,
    make: Callable[[], Arrays],
    *,
    mender: Callable[[Arrays], Callable[[], Arrays] | None] = lambda found: None,
) -> Arrays:
    """Read the arrays in `path`, or make them and write them there.

    Args:
        path: of the file.
        make: makes the arrays.
        mender: looks at arrays that were kept, and gives what makes better ones where it can.

    Raises:
        ConfigError: the folder cannot be written. And whatever `make` raises.
    """
    stamp = _stamp(path)
    found = _read(path) if used(path) else None
    wanted = make if found is None else mender(found)
    if found is not None and wanted is None:
        return found
    assert wanted is not None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise _refusal(path, error) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go of when the file is closed, or its process dies
        # Another process may have made it in the meantime.
        if _stamp(path) != stamp and (found := _read(path)) is not None:
            return found
        made = wanted()
        try:
            aside = path.with_name(f".{path.stem}.partial.npz")
            np.savez(aside, **made)  # pyright: ignore[reportArgumentType] - arrays by name
            os.replace(aside, path)
        except OSError as error:
            raise _refusal(path, error) from error
        path.with_suffix(".lock").unlink(missing_ok=True)
    return made


def used(path: Path) -> bool:
    """Say whether a file is there, and note that it is used now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # somebody else's, or on a medium that is only read
        return path.is_file()
    return True


def trim(folder: Path, limit: int, *, idle: float = 0.0) -> None:
    """Delete what a dead writer left, then the least recently used until the rest fits.

    Other processes may do the same, and use what is there, at the same time. What cannot be
    deleted stays.

    Args:
        folder: of files, and of folders of files.
        limit: in bytes.
        idle: seconds; what was used since is spared, even above the limit.
    """
    now, entries = time.time(), []
    for path in folder.glob("**/*"):
        with suppress(OSError):  # gone meanwhile, somebody else's, or on a medium only read
            info = path.stat()
            if path.name.startswith(".") and PARTIAL in path.name:
                if now - info.st_mtime > STALE:
                    path.unlink()
            elif path.is_file():
                entries.append((info.st_mtime_ns, info.st_size, path))
    total = sum(size for _, size, _ in entries)
    for stamp, size, path in sorted(entries):
        if total <= limit or now - stamp / 1e9 < idle:
            return
        if _leaves(path, stamp):
            total -= size


def _leaves(path: Path, stamp: int) -> bool:
    """Delete a file unless it was used after `stamp`, and say whether it is gone."""
    try:
        if path.stat().st_mtime_ns != stamp:
            return False
        path.unlink()
    except FileNotFoundError:  # another process was faster
        return True
    except OSError:  # somebody else's, or on a medium that is only read
        return False
    return True


def _stamp(path: Path) -> tuple[int, int]:
    """Tell one file of this name from another; its time says only when it was used."""
    try:
        info = path.stat()
    except OSError:
        return 0, 0
    return info.st_ino, info.st_size


def _read(path: Path) -> Arrays | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}
    except (OSError, ValueError, EOFError, BadZipFile):
        return None


def _refusal(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path.parent}: nothing can be kept here: {error.strerror}; give another folder, "
        "data.cache=FOLDER"
    )
