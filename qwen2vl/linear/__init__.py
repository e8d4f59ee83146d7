"""CPU layers that stand in for `torch.nn.Linear`: prepacked, fused, GEMV, ahead-of-time compiled.

Each module replaces layers of a finished model in place and imports nothing of it but the classes
that it looks for. `loading.py` decides which of them a model gets.
"""
