"""Videos as the model sees them, kept on disk: decoded once, mapped ever after.

An entry is named by the video's content and by all that decides which frames are taken and at
which size, so nothing in it can become stale. It appears whole (written aside, renamed), one that
differs from its own digest is made again, and the least recently used leave when the folder
outgrows its limit. Several processes may share a folder. (Qwen2-VL sec. 2.3: decoding was the
bottleneck.) Next: prepare.py.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen2vl.data.disk_cache import PARTIAL, trim
from qwen2vl.geometry import Grid
from qwen2vl.processor.inputs import Item

__all__ = ["FrameCache"]

logger = logging.getLogger(__name__)

ENDING = ".safetensors"
_PIECE = 1 << 22  # bytes hashed at a time


class FrameCache:
    """Items of videos by content and sampling, in at most `limit` bytes on disk."""

    def __init__(self, folder: str | Path, *, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self._digests: dict[tuple[str, int, int], str] = {}
        self._told = False

    def item(self, source: Path | bytes, sampling: str, make: Callable[[], Item]) -> Item:
        """Give the item of `source` under `sampling`, made by `make` unless it is here.

        Raises whatever `make` raises; a folder that cannot be written costs a warning, no item.
        """
        key = blake2b(f"{self._digest(source)}/{sampling}".encode(), digest_size=20).hexdigest()
        path = self.folder / key[:2] / f"{key}{ENDING}"
        found = _read(path)
        if found is not None:
            return found
        made = make()
        try:
            _write(path, made)
            trim(self.folder, self.limit)
        except (OSError, SafetensorError) as error:
            if not self._told:
                logger.warning("%s: decoded videos cannot be kept: %s", self.folder, error)
            self._told = True
        return made

    def _digest(self, source: Path | bytes) -> str:
        if isinstance(source, bytes):
            return blake2b(source, digest_size=20).hexdigest()
        info = source.stat()
        key = (str(source), info.st_size, info.st_mtime_ns)
        if key not in self._digests:
            whole = blake2b(digest_size=20)
            with source.open("rb") as file:
                while piece := file.read(_PIECE):
                    whole.update(piece)
            self._digests[key] = whole.hexdigest()
        return self._digests[key]


def _read(path: Path) -> Item | None:
    try:
        with safe_open(path, "pt") as file:
            text, promised = file.metadata()["item"], file.metadata()["digest"]
            patches_NP = file.get_tensor("patches_NP")
        if _digest_of(text, patches_NP) != promised:
            return None
        about = json.loads(text)
        os.utime(path)  # used now
        return Item(
            kind="video",
            patches_NP=patches_NP,
            grid=Grid(*about["grid"]),
            digest=bytes.fromhex(about["digest"]),
            name=about["name"],
            size_given=tuple(about["size_given"]),
            size_seen=tuple(about["size_seen"]),
            frame_times=tuple(about["frame_times"]),
            notes=tuple(about["notes"]),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None  # not there, or not whole: it is made again


def _write(path: Path, item: Item) -> None:
    patches_NP = item.patches_NP.contiguous()
    about = {
        "grid": list(item.grid),
        "digest": item.digest.hex(),
        "name": item.name,
        "size_given": item.size_given,
        "size_seen": item.size_seen,
        "frame_times": item.frame_times,
        "notes": item.notes,
    }
    text = json.dumps(about)
    told = {"item": text, "digest": _digest_of(text, patches_NP)}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{os.getpid()}{PARTIAL}")
    try:
        save_file({"patches_NP": patches_NP}, aside, told)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _digest_of(about: str, patches_NP: Tensor) -> str:
    """Name an entry's whole content."""
    whole = blake2b(about.encode(), digest_size=20)
    whole.update(patches_NP.numpy().data)
    return whole.hexdigest()
