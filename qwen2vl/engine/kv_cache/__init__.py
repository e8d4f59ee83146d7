"""KV cache: block pool with prefix caching, storage, GPU arena, and capacity checks.

`block_pool.py` assigns blocks to requests and touches no tensor; `storage.py` allocates the keys
and values of requests, on a GPU in the arena of `arena.py`; `capacity.py` checks prompts against
context and cache. model/kv_cache.py has the interface that the decoder calls.
"""
