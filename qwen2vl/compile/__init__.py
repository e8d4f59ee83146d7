"""Compilation of a built model: torch.compile by regions, and decoder blocks ahead of time.

`regions.py` compiles everything but the attention kernel, for training and for inference;
`decode_block.py` compiles the decoder block for single tokens on a CPU. Both are optional: a model
that is not compiled runs eagerly, with the same results up to rounding.
"""
