"""Items kept by what their source holds, so that a chat does not open its pictures every turn.

A source is named by its bytes, not by its path: a file that changed is opened again, one that was
copied is not. Reading and hashing a JPEG costs a hundredth of decoding and resizing it. What comes
over the network is fetched and opened anew; so are Pillow's pictures, whose look depends on more
than their pixels, and very large files. It must not know messages. Back up: processor.py.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from qwen2vl.errors import InputError
from qwen2vl.processor.inputs import Item
from qwen2vl.processor.media.source import MediaLimits, read_source

__all__ = ["KeptItems", "content_digest"]

LARGEST = 256 * 1024**2  # bytes of a source that are hashed: a fifth of a second


class KeptItems:
    """A bounded number of bytes of patches, the items unused for longest first to go."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._items: OrderedDict[tuple[Any, ...], Item] = OrderedDict()
        self._lock = Lock()  # prompts may be made in any thread

    def get(self, key: tuple[Any, ...]) -> Item | None:
        """Find what `put` has kept under the same key."""
        with self._lock:
            item = self._items.get(key)
            if item is not None:
                self._items.move_to_end(key)
            return item

    def put(self, key: tuple[Any, ...], item: Item) -> None:
        """Keep an item that nobody will write to."""
        if item.patches_NP.nbytes > self.max_bytes:
            return
        with self._lock:
            old = self._items.pop(key, None)
            self._items[key] = item
            self.num_bytes += item.patches_NP.nbytes - (0 if old is None else old.patches_NP.nbytes)
            while self.num_bytes > self.max_bytes:
                _, oldest = self._items.popitem(last=False)
                self.num_bytes -= oldest.patches_NP.nbytes


def content_digest(source: Any, limits: MediaLimits, name: str) -> bytes | None:
    """Hash what a source holds; None: it is of a kind that is not kept.

    Raises:
        InputError: the source cannot be found, or is not allowed.
    """
    if isinstance(source, np.ndarray):
        shape = f"{source.dtype.str} {source.shape}".encode()
        return sha256(shape + np.ascontiguousarray(source).tobytes()).digest()
    if not isinstance(source, (str, bytes, bytearray, Path)) or _is_remote(source):
        return None
    media = read_source(source, limits, name)
    if isinstance(media.content, Path):
        return _file_digest(media.content, name)
    assert isinstance(media.content, bytes)
    declared = f"{media.declared} ".encode()
    return sha256(declared + media.content).digest() if len(media.content) <= LARGEST else None


def _file_digest(path: Path, name: str) -> bytes | None:
    try:
        return sha256(path.read_bytes()).digest() if path.stat().st_size <= LARGEST else None
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from None


def _is_remote(source: Any) -> bool:
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))
