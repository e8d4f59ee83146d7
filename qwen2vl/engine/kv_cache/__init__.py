"""The KV cache: block accounting with prefix caching, the arena of a GPU, and its capacity.

`block_pool.py` decides which blocks a request owns and touches no tensor; `arena.py` holds keys and values.
"""
