"""Decode backends for pure decode batches: CUDA graphs on a GPU, compiled blocks on a CPU.

They are optional: without one, every step runs the model's forward, with the same results.
"""
