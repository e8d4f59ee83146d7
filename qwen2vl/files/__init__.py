"""Files that outlive a process or are shared by several: atomic writes, LRU eviction, records.

    with atomic_file(path) as partial: ...      .NAME.xxxxxxxx.partial -> NAME
    with atomic_folder(path) as partial: ...    .NAME.partial -> NAME
    evict_lru(folder, max_bytes)                least recently used first

These are atomic.py's. record_file.py has RecordFile, whose records are appended and survive
`kill -9`; it needs POSIX locks, and is imported where it is used.
"""

from qwen2vl.files.atomic import (
    STALE_SECONDS,
    atomic_file,
    atomic_folder,
    evict_lru,
    partial_folder,
    touch,
    user_cache_dir,
)

__all__ = [
    "STALE_SECONDS",
    "atomic_file",
    "atomic_folder",
    "evict_lru",
    "partial_folder",
    "touch",
    "user_cache_dir",
]
