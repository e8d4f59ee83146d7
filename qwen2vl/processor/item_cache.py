"""LRU cache of preprocessed images and videos: a multi-turn chat decodes each of them once.

Of a long video the digests of its frame pairs are kept, not the patches (FramePairStream).

Keys are content hashes, not paths: a file that changed is decoded again, a copy of a file is not.
Reading and hashing a JPEG costs a hundredth of decoding and resizing it. Not cached: URLs, which
are downloaded every time; PIL images, whose appearance depends on more than their pixels; lists of
frames; and files above `MAX_HASHED_BYTES`. (vLLM: the multi-modal processor cache.)
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

__all__ = ["ItemCache", "content_digest"]

MAX_HASHED_BYTES = 256 * 1024**2  # larger sources are not cached; hashing takes a fifth of a second


class ItemCache:
    """LRU cache of items, bounded by the bytes of their patches. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._items: OrderedDict[tuple[Any, ...], Item] = OrderedDict()
        self._lock = Lock()  # prompts may be preprocessed in any thread

    def get(self, key: tuple[Any, ...]) -> Item | None:
        """Return the item stored under `key`, or None."""
        with self._lock:
            item = self._items.get(key)
            if item is not None:
                self._items.move_to_end(key)
            return item

    def put(self, key: tuple[Any, ...], item: Item) -> None:
        """Store an item; its tensors must not be modified afterwards."""
        if item.num_bytes > self.max_bytes:
            return
        with self._lock:
            old = self._items.pop(key, None)
            self._items[key] = item
            self.num_bytes += item.num_bytes - (0 if old is None else old.num_bytes)
            while self.num_bytes > self.max_bytes:
                _, oldest = self._items.popitem(last=False)
                self.num_bytes -= oldest.num_bytes


def content_digest(source: Any, limits: MediaLimits, name: str) -> bytes | None:
    """Hash the content of a source; None for a kind of source that is not cached.

    File objects and tensors are copied to memory before (`copy_to_memory`).

    Raises:
        InputError: the source cannot be found, or is not allowed.
    """
    if isinstance(source, np.ndarray):
        prefix = f"{source.dtype.str} {source.shape}".encode()
        return sha256(prefix + np.ascontiguousarray(source).tobytes()).digest()
    if not isinstance(source, (str, bytes, Path)) or _is_remote(source):
        return None
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _data_url_digest(source)
    media = read_source(source, limits, name)
    if isinstance(media.content, Path):
        return _file_digest(media.content, name)
    assert isinstance(media.content, bytes)
    return (
        sha256(b"None " + media.content).digest()
        if len(media.content) <= MAX_HASHED_BYTES
        else None
    )


def _data_url_digest(url: str) -> bytes | None:
    """Hash the text of a data URL, which saves decoding its base64 when the item is cached."""
    if len(url) > MAX_HASHED_BYTES:
        return None
    return sha256(b"URL " + url.encode("utf-8", "surrogatepass")).digest()


def _file_digest(path: Path, name: str) -> bytes | None:
    try:
        return (
            sha256(path.read_bytes()).digest() if path.stat().st_size <= MAX_HASHED_BYTES else None
        )
    except OSError as error:
        raise InputError(
            f"{name} cannot be read ({error.strerror}); check the file and its disk"
        ) from error


def _is_remote(source: Any) -> bool:
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))
