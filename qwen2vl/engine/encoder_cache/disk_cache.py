"""Vision rows on disk: one safetensors file a key, checked when read, bounded in bytes.

    FOLDER/vision-rows/<BLAKE2b of the key>.safetensors     rows_MD, and a checksum in the metadata

A file appears by being renamed, so that a reader in another process finds a whole one or none, and
is not forced to disk: what a power cut tears the checksum finds. Trouble with the disk is told
once and costs only the reuse, never a request. The folder is its owner's alone, since pictures
could be guessed from their rows. Back up: vision_cache.py.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qwen2vl.errors import InputError

__all__ = ["RowsFolder", "VisionKey"]

logger = logging.getLogger(__name__)

SUBFOLDER = "vision-rows"  # our own, so that nothing else is closed to others, or removed
_CHECKSUM = "blake2b"
_OURS = re.compile(r"[0-9a-f]{64}(\.safetensors|\.[^.]+\.partial)")
_ABANDONED_SECONDS = 3600  # no write takes so long: its process is gone


class VisionKey(NamedTuple):
    """What vision rows are a function of."""

    digest: bytes  # Item.digest: pixels, grid, normalization
    fingerprint: bytes  # VisionWeights.fingerprint(), and whatever adapter a request adds


class RowsFolder:
    """Rows by key in a folder that several processes may share."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        """Open or make the folder.

        Raises:
            InputError: it cannot be made, or others could write to it.
        """
        self.path = _private_folder(folder / SUBFOLDER)
        self.max_bytes = max_bytes
        self.damaged = 0  # files found to differ from what was written, and removed
        self._allowance = 0  # bytes that may be written before the folder is looked at again
        self._has_complained = False

    def read(self, key: VisionKey) -> Tensor | None:
        """Return rows on the CPU; None where there are none, or they are not what was written."""
        path = self._file(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            return self._complain("read", error)
        rows_MD = _unpack(key, content)
        if rows_MD is None:
            return self._remove_damaged(path)
        try:
            os.utime(path)  # the time of last use decides what goes first
        except FileNotFoundError:  # another process has just evicted it
            pass
        except OSError as error:
            self._complain("marked as used", error)
        return rows_MD

    def write(self, key: VisionKey, rows_MD: Tensor) -> None:
        """Keep rows, in place of those used longest ago."""
        rows_MD = rows_MD.detach().to("cpu").contiguous()
        content = save({"rows_MD": rows_MD}, {_CHECKSUM: _checksum(key, rows_MD)})
        if len(content) > self.max_bytes:
            return
        try:
            self._make_room(len(content))
            self._place(self._file(key), content)
        except OSError as error:
            self._complain("written", error)

    def _file(self, key: VisionKey) -> Path:
        return self.path / f"{blake2b(b''.join(key), digest_size=32).hexdigest()}.safetensors"

    def _place(self, path: Path, content: bytes) -> None:
        handle, partial = tempfile.mkstemp(".partial", f"{path.stem}.", self.path)
        try:
            with open(handle, "wb") as file:
                file.write(content)
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    def _make_room(self, need: int) -> None:
        """Remove what was used longest ago until `need` more bytes fit.

        Looking at the whole folder costs some microseconds a file. So a full folder is emptied by
        an eighth, and a sixteenth may be written before the next look: by so much may each
        further process that writes here pass the bound, until it looks.
        """
        self._allowance -= need
        if self._allowance >= 0:
            return
        found = sorted(self._files())
        total = need + sum(size for _, size, _ in found)
        goal = self.max_bytes if total <= self.max_bytes else self.max_bytes * 7 // 8
        abandoned = time.time() - _ABANDONED_SECONDS
        for used, size, path in found:
            is_partial = path.suffix == ".partial"  # of a process at work, or of a killed one
            if used < abandoned if is_partial else total > goal:
                path.unlink(missing_ok=True)
                total -= size
        self._allowance = min(self.max_bytes - total, self.max_bytes // 16)

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        with os.scandir(self.path) as entries:
            for entry in entries:
                if not _OURS.fullmatch(entry.name):
                    continue
                try:
                    state = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # another process was faster
                    continue
                yield state.st_mtime, state.st_size, Path(entry.path)

    def _remove_damaged(self, path: Path) -> None:
        self.damaged += 1
        logger.warning("%s: damaged on disk; it is removed and encoded anew", path)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._complain("removed", error)

    def _complain(self, verb: str, error: OSError) -> None:
        if not self._has_complained:
            self._has_complained = True
            reason = error.strerror or str(error)
            logger.warning(
                "%s: vision rows cannot be %s: %s; answering goes on without",
                self.path,
                verb,
                reason,
            )


def _private_folder(path: Path) -> Path:
    """Make a folder that only its owner may enter.

    Raises:
        InputError: it cannot be made so.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = path.lstat()
        is_own = not hasattr(os, "geteuid") or state.st_uid == os.geteuid()
        if not is_own or not stat.S_ISDIR(state.st_mode):
            raise InputError(
                f"{path}: is a link, or belongs to somebody else, who could change vision rows; "
                "name another folder"
            )
        if stat.S_IMODE(state.st_mode) & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be made a folder of your own for vision rows: {error.strerror}; "
            "name another folder"
        ) from error
    return path


def _unpack(key: VisionKey, content: bytes) -> Tensor | None:
    """Read a file's bytes; None where they are not those written for `key`."""
    try:
        rows_MD = load(content)["rows_MD"]
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        checksum = header["__metadata__"][_CHECKSUM]
    except (SafetensorError, KeyError, ValueError):
        return None
    return rows_MD if checksum == _checksum(key, rows_MD) else None


def _checksum(key: VisionKey, rows_MD: Tensor) -> str:
    """Cover the data, what they are read as, and whose they are."""
    head = f"{rows_MD.dtype} {tuple(rows_MD.shape)} ".encode()
    hasher = blake2b(head + b"".join(key), digest_size=32)
    hasher.update(rows_MD.view(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
