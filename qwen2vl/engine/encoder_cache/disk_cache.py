"""Disk cache of vision embeddings: one safetensors file per key, checksummed, bounded in bytes.

    FOLDER/vision-embeddings/<BLAKE2b of the key>.safetensors    vision_MD; checksum in the metadata

Files are written atomically, so readers in other processes find a complete file or none. There is
no fsync: a file truncated by a power failure fails its checksum. I/O errors are logged once and
only prevent reuse; they never fail a request. The folder is accessible to its owner only, since
images could be reconstructed from their embeddings.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qwen2vl.errors import InputError
from qwen2vl.files import atomic_file, evict_lru

__all__ = ["DiskEmbeddingCache", "EmbeddingKey"]

logger = logging.getLogger(__name__)

SUBFOLDER = "vision-embeddings"  # own folder: permissions and eviction affect nothing else
_CHECKSUM = "blake2b"
_CACHE_FILE = re.compile(r"\.?[0-9a-f]{64}\.safetensors(\.[^.]+\.partial)?")


class EmbeddingKey(NamedTuple):
    """All that vision embeddings depend on."""

    pair_digest: bytes  # Item.pair_digests: pixels, normalization, and the vision adapter if any
    weights_digest: bytes  # VisionWeightsDigest.digest()


class DiskEmbeddingCache:
    """Vision embeddings by key in a folder that several processes may share; LRU eviction."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        """Open or create the folder.

        Raises:
            InputError: it cannot be created, or other users could write to it.
        """
        self.path = _private_folder(folder / SUBFOLDER)
        self.max_bytes = max_bytes
        self.num_damaged = 0  # corrupt files found and removed
        self._bytes_until_scan = 0  # bytes that may be written before the next scan
        self._has_warned = False

    def read(self, key: EmbeddingKey) -> Tensor | None:
        """Return embeddings on the CPU; None if there are none or the file is corrupt."""
        path = self._path_of(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            return self._warn_once("read", error)
        vision_MD = _unpack(key, content)
        if vision_MD is None:
            return self._remove_damaged(path)
        try:
            os.utime(path)  # the modification time records the last use, for LRU eviction
        except FileNotFoundError:  # evicted by another process in the meantime
            pass
        except OSError as error:
            self._warn_once("marked as used", error)
        return vision_MD

    def write(self, key: EmbeddingKey, vision_MD: Tensor) -> None:
        """Store embeddings, evicting the least recently used."""
        vision_MD = vision_MD.detach().to("cpu").contiguous()
        content = save({"vision_MD": vision_MD}, {_CHECKSUM: _checksum(key, vision_MD)})
        if len(content) > self.max_bytes:
            return
        try:
            self.path.mkdir(0o700, parents=True, exist_ok=True)  # somebody may have deleted it
            self._evict_for(len(content))
            with atomic_file(self._path_of(key), mode=0o600) as partial:
                partial.write_bytes(content)
        except OSError as error:
            self._warn_once("written", error)

    def remove(self, key: EmbeddingKey) -> None:
        """Remove the file of `key`, if there is one."""
        self._unlink(self._path_of(key))

    def _path_of(self, key: EmbeddingKey) -> Path:
        return self.path / f"{blake2b(b''.join(key), digest_size=32).hexdigest()}.safetensors"

    def _evict_for(self, num_bytes: int) -> None:
        """Remove the least recently used files until `num_bytes` more fit.

        Scanning the folder costs some microseconds per file. Therefore a full folder is reduced by
        an eighth, and a sixteenth may be written before the next scan. By that sixteenth each
        further process that writes here may exceed the bound until its next scan.
        """
        self._bytes_until_scan -= num_bytes
        if self._bytes_until_scan >= 0:
            return
        max_bytes = self.max_bytes - num_bytes  # of the files that are there
        remaining = evict_lru(
            self.path,
            max_bytes,
            target_bytes=max_bytes - self.max_bytes // 8,
            names=_CACHE_FILE,
            ignore_errors=False,
        )
        self._bytes_until_scan = min(max_bytes - remaining, self.max_bytes // 16)

    def _remove_damaged(self, path: Path) -> None:
        self.num_damaged += 1
        logger.warning("%s: damaged on disk; it is removed and encoded anew", path)
        self._unlink(path)

    def _unlink(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._warn_once("removed", error)

    def _warn_once(self, verb: str, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            reason = error.strerror or str(error)
            logger.warning(
                "%s: vision embeddings cannot be %s: %s; requests continue without them",
                self.path,
                verb,
                reason,
            )


def _private_folder(path: Path) -> Path:
    """Create a folder that only its owner can access (mode 700).

    Raises:
        InputError: that is impossible.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = path.lstat()
        is_own = not hasattr(os, "geteuid") or state.st_uid == os.geteuid()
        if not is_own or not stat.S_ISDIR(state.st_mode):
            raise InputError(
                f"{path}: is a link, or belongs to somebody else, who could change its files; "
                "name another folder"
            )
        if stat.S_IMODE(state.st_mode) & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be made a private folder for vision embeddings: {error.strerror}; "
            "name another folder"
        ) from error
    return path


def _unpack(key: EmbeddingKey, content: bytes) -> Tensor | None:
    """Parse a file's content; None unless the checksum matches `key` and the data."""
    try:
        vision_MD = load(content)["vision_MD"]
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        checksum = header["__metadata__"][_CHECKSUM]
    except (SafetensorError, KeyError, ValueError):
        return None
    return vision_MD if checksum == _checksum(key, vision_MD) else None


def _checksum(key: EmbeddingKey, vision_MD: Tensor) -> str:
    """Hash the data, their dtype and shape, and the key."""
    head = f"{vision_MD.dtype} {tuple(vision_MD.shape)} ".encode()
    hasher = blake2b(head + b"".join(key), digest_size=32)
    hasher.update(vision_MD.view(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
