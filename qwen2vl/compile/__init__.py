"""torch.compile applied to a loaded model: regions of both towers, and one decode block on a CPU.

Without this package every computation runs eagerly, with the same results up to rounding.
"""
