"""Multimodal preprocessing: chat messages with images and videos -> one ModelInput, on the CPU.

Training and inference use the same code, so the two cannot drift apart. The entry point is
`processor.Processor`; its result, `ModelInput`, is defined in inputs.py. Nothing here depends on
model weights or devices.
(HF: Qwen2VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor; qwen_vl_utils.)
"""
