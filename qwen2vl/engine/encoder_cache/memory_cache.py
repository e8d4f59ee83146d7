"""Vision rows by content: what was encoded once is not encoded again while there is room.

Rows (vision_MD of one item) lie in memory, least recently used first to go, and where a folder is
given on disk too, so that a repeated page costs no vision work after a restart either. A key names
the pixels and the weights; a retrained or quantized tower therefore never meets old rows. It must
not know requests or the model, and belongs to one thread. (vLLM: EncoderCacheManager.) Next rooms:
fingerprint.py, rows_folder.py; encode.py fills it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwen2vl.engine.encoder_cache.disk_cache import RowsFolder, VisionKey

__all__ = ["VisionCache", "VisionCacheStats"]

GIB = 1024**3


@dataclass(slots=True, kw_only=True)
class VisionCacheStats:
    """What the cache did since it was made, and what it holds now."""

    hits_memory: int = 0
    hits_disk: int = 0
    misses: int = 0
    evictions: int = 0  # from memory
    num_bytes: int = 0  # held in memory now


class VisionCache:
    """Rows of items in memory, in order of use, and on disk below them."""

    def __init__(
        self,
        *,
        max_bytes: int = GIB // 2,
        folder: str | Path | None = None,
        max_disk_bytes: int = 4 * GIB,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start empty, over whatever an earlier process left in `folder`.

        Args:
            max_bytes: held in memory; pinned rows may exceed it. 0 keeps only these.
            folder: where rows are kept between runs; None: nowhere.
            max_disk_bytes: held in `folder`.
            device: where the rows are wanted.

        Raises:
            InputError: the folder cannot be made, or belongs to somebody else.
        """
        self.stats = VisionCacheStats()
        self.max_bytes = max_bytes
        self.folder = None if folder is None else RowsFolder(Path(folder), max_bytes=max_disk_bytes)
        self._device = torch.device(device)
        self._rows: OrderedDict[VisionKey, Tensor] = OrderedDict()
        self._pins: Counter[VisionKey] = Counter()

    def get(self, key: VisionKey) -> Tensor | None:
        """Return the rows of `key` for reading, from memory or else from disk; None: encode."""
        rows_MD = self._rows.get(key)
        if rows_MD is not None:
            self._rows.move_to_end(key)
            self.stats.hits_memory += 1
            return rows_MD
        rows_MD = None if self.folder is None else self.folder.read(key)
        if rows_MD is None:
            self.stats.misses += 1
            return None
        self.stats.hits_disk += 1
        rows_MD = rows_MD.to(self._device)
        self._keep(key, rows_MD)
        return rows_MD

    def put(self, key: VisionKey, rows_MD: Tensor) -> None:
        """Keep rows that nobody will write to again; on disk as well."""
        rows_MD = rows_MD.to(self._device)
        if rows_MD.untyped_storage().nbytes() > rows_MD.nbytes:
            rows_MD = rows_MD.clone()  # a view would hold the rows of a whole batch alive
        self._keep(key, rows_MD)
        if self.folder is not None:
            self.folder.write(key, rows_MD)

    def clear(self) -> None:
        """Let go of all rows in memory that are not pinned."""
        for key in [key for key in self._rows if key not in self._pins]:
            self.stats.num_bytes -= self._rows.pop(key).nbytes

    def pin(self, key: VisionKey) -> None:
        """Hold `key` in memory, now or as soon as it comes, until as many `unpin`s."""
        self._pins[key] += 1

    def unpin(self, key: VisionKey) -> None:
        """Take one pin back."""
        assert self._pins[key] > 0, "unpinned more often than pinned"
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]
            self._evict()

    @property
    def pinned_bytes(self) -> int:
        """Bytes in memory that cannot be evicted now."""
        return sum(self._rows[key].nbytes for key in self._pins if key in self._rows)

    def _keep(self, key: VisionKey, rows_MD: Tensor) -> None:
        old = self._rows.pop(key, None)
        self._rows[key] = rows_MD
        self.stats.num_bytes += rows_MD.nbytes - (0 if old is None else old.nbytes)
        self._evict()

    def _evict(self) -> None:
        """Let go of the rows unused for longest, but for those pinned, until the rest fits."""
        if self.stats.num_bytes <= self.max_bytes:
            return
        free = [key for key in self._rows if key not in self._pins]
        # What could never stay goes first, else it would take everything else along.
        free.sort(key=lambda key: self._rows[key].nbytes <= self.max_bytes)
        for key in free:
            self.stats.num_bytes -= self._rows.pop(key).nbytes
            self.stats.evictions += 1
            if self.stats.num_bytes <= self.max_bytes:
                return
