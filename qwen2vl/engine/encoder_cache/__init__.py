"""Encoder cache: vision embeddings by content, of running requests, in memory and on disk.

`manager.py` is the interface to the engine; `memory_cache.py` and `disk_cache.py` keep embeddings
between requests; `weights_digest.py` identifies the weights that computed them.
"""
