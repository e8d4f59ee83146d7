"""What is computed: the network of Qwen2-VL in pure torch, readable in one sitting.

Read attention.py, rope.py, vision.py, text.py, qwen2vl.py, in this order. This floor knows no
file, no process group, no request and no tokenizer; everything it needs to know about a prompt
arrives as tensors and AttnMeta.
"""

from qwen2vl.model.attention import KVCache
from qwen2vl.model.qwen2vl import Qwen2VL

__all__ = ["KVCache", "Qwen2VL"]
