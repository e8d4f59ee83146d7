"""The encoder cache: vision embeddings by content, in work, in memory and on disk.

`manager.py` is what the engine calls; `memory_cache.py` and `disk_cache.py` keep embeddings between requests.
"""
