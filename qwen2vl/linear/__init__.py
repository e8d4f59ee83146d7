"""CPU layers that stand in for `torch.nn.Linear`: prepacked, fused, GEMV, AOT-compiled.

Each module replaces layers of a loaded model in place and imports only the classes that it searches
for. `loading.py` decides which of them a model gets.
"""
