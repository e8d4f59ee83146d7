"""torch.compile applied to a loaded model: regional compilation, and one decode block on a CPU.

`regions.py` compiles repeated parts of the vision tower and the decoder; `decode_block.py` compiles
one decoder block for a single token. Without this package every computation runs eagerly, with the
same results up to rounding.
"""
