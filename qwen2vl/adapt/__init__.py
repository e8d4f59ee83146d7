"""What acts on a finished model, which never knows: LoRA, compiled parts, single rows.

Each file changes a Qwen2VL in place: weights or modules are exchanged, parameters keep their names.
It must not know files, requests or stages.
"""
