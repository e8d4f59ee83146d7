"""What acts on a finished model, which never knows: LoRA, small integers, compiled parts, rows.

Each file changes a Qwen2VL in place: weights or modules are exchanged, parameters that stay keep
their names. It must not know files, requests or stages.
"""
