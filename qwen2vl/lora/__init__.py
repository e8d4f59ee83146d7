"""LoRA: layers for training and merging, PEFT's file format, and several adapters per batch.

`layers.py` trains and merges, `peft.py` reads and writes PEFT's format, `full_weights.py` weights
that are saved in full with an adapter, and `multi.py` is multi-LoRA.
Source: Hu et al., arXiv 2106.09685. Names of files and settings are those of PEFT.
"""
