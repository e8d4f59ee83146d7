"""The Qwen2-VL network in plain PyTorch: vision tower, language model, M-RoPE, KV cache.

Read attention.py, kv_cache.py, rope.py, vision.py, text.py, qwen2vl.py, in this order. The package
depends on `qwen2vl.config` and `qwen2vl.geometry` alone: no files, process groups, requests or
tokenizer. All that depends on a prompt is passed in as tensors and `AttnMeta`.
"""

from qwen2vl.model.int8_kv_cache import Int8KVCache
from qwen2vl.model.kv_cache import KVCache, SequenceKVCaches
from qwen2vl.model.qwen2vl import Qwen2VL, meta_model

__all__ = ["Int8KVCache", "KVCache", "Qwen2VL", "SequenceKVCaches", "meta_model"]
