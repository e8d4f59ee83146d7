"""Faster steps for pure decode batches: CUDA graphs on a GPU, compiled blocks on a CPU.

Without this package every step runs the model's own forward, with the same results.
"""
