"""KV cache: block pool with prefix caching, GPU arena, and capacity checks.

`block_pool.py` assigns blocks to requests and touches no tensor; `arena.py` holds the keys and
values of all requests on a GPU; `capacity.py` checks prompts against context and cache.
"""
