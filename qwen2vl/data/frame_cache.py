"""Frame cache: decoded, resized videos on disk, keyed by content; decoded once, then memory-mapped.

The key covers the video's content, all settings that decide frame sampling and size, and the
version of the decoding, so no entry can become stale. Entries are written atomically; one that does
not match its own digest is decoded again; the least recently used are evicted above a size limit.
Several processes may share a folder.
(Qwen2-VL sec. 2.3: decoding was the bottleneck.)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen2vl.files import atomic_file, evict_lru, touch
from qwen2vl.geometry import Grid
from qwen2vl.processor.inputs import Item

__all__ = ["FrameCache"]

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
READ_CHUNK = 1 << 22  # bytes hashed at a time


class FrameCache:
    """Decoded items of videos by content and sampling, in at most `max_bytes` bytes on disk."""

    def __init__(self, folder: str | Path, *, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._digests: dict[tuple[str, int, int], str] = {}
        self._has_warned = False

    def get_or_decode(
        self, source: Path | bytes, sampling_key: str, decode: Callable[[], Item]
    ) -> Item:
        """Return the item of `source` for a sampling key, from the cache or by calling `decode`.

        Errors of `decode` are passed on; if the folder cannot be written, a warning is logged.
        """
        key = blake2b(f"{self._digest(source)}/{sampling_key}".encode(), digest_size=20).hexdigest()
        path = self.folder / key[:2] / f"{key}{SUFFIX}"
        cached = _read(path)
        if cached is not None:
            return cached
        item = decode()
        try:
            _write(path, item)
            evict_lru(self.folder, self.max_bytes)
        except (OSError, SafetensorError) as error:
            if not self._has_warned:
                logger.warning("%s: cannot cache decoded videos: %s", self.folder, error)
            self._has_warned = True
        return item

    def _digest(self, source: Path | bytes) -> str:
        if isinstance(source, bytes):
            return blake2b(source, digest_size=20).hexdigest()
        info = source.stat()
        key = (str(source), info.st_size, info.st_mtime_ns)
        if key not in self._digests:
            digest = blake2b(digest_size=20)
            with source.open("rb") as file:
                while chunk := file.read(READ_CHUNK):
                    digest.update(chunk)
            self._digests[key] = digest.hexdigest()
        return self._digests[key]


def _read(path: Path) -> Item | None:
    try:
        with safe_open(path, "pt") as file:
            text, stored_digest = file.metadata()["item"], file.metadata()["digest"]
            patches_NP = file.get_tensor("patches_NP")
        if _digest_of(text, patches_NP) != stored_digest:
            return None
        metadata = json.loads(text)
        touch(path)
        return Item(
            kind="video",
            patches_NP=patches_NP,
            grid=Grid(*metadata["grid"]),
            pair_digests=tuple(map(bytes.fromhex, metadata["pair_digests"])),
            name=metadata["name"],
            original_size=tuple(metadata["original_size"]),
            resized_size=tuple(metadata["resized_size"]),
            frame_timestamps=tuple(metadata["frame_timestamps"]),
            notes=tuple(metadata["notes"]),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None  # absent or damaged: it is decoded again


def _write(path: Path, item: Item) -> None:
    patches_NP = item.patches_NP.contiguous()
    metadata = {
        "grid": list(item.grid),
        "pair_digests": [digest.hex() for digest in item.pair_digests],
        "name": item.name,
        "original_size": item.original_size,
        "resized_size": item.resized_size,
        "frame_timestamps": item.frame_timestamps,
        "notes": item.notes,
    }
    text = json.dumps(metadata)
    header = {"item": text, "digest": _digest_of(text, patches_NP)}
    with atomic_file(path) as partial:
        save_file({"patches_NP": patches_NP}, partial, header)


def _digest_of(metadata: str, patches_NP: Tensor) -> str:
    """Hash the whole content of an entry."""
    digest = blake2b(metadata.encode(), digest_size=20)
    digest.update(patches_NP.numpy().data)
    return digest.hexdigest()
