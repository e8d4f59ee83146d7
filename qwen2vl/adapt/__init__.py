"""What acts on a finished model, which never knows: compiled parts, single rows.

Each file takes a Qwen2VL and returns nothing: modules are changed in place, parameters and their
names stay. It must not know files, requests or stages.
"""
