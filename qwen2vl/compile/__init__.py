"""Compilation of a built model: torch.compile of everything but the attention kernel.

`regions.py` compiles for training and for inference. It is optional: a model that is not compiled
runs eagerly, with the same results up to rounding.
"""
