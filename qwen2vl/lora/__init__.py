"""LoRA: layers for training and merging, PEFT's file format, and several adapters per batch.

Source: Hu et al., arXiv 2106.09685. Names of files and settings are those of PEFT.
"""
