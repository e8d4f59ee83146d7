"""Hugging Face folders: config files and safetensors are read, verified and written.

hub.py resolves a name to a folder; config_files.py reads its JSON files; header.py and tensors.py
open safetensors, memory-mapped, under official names; packing/ has the formats of quantized
matrices; state_dict.py checks names and shapes against the model; adapter.py reads and writes LoRA
folders; save.py writes model folders; source_models.py and init_pretrained.py build a starting
checkpoint. Models with weights are built by loading.py.
"""

from qwen2vl.weights.adapter import read_adapter, save_adapter
from qwen2vl.weights.config_files import (
    GenerationDefaults,
    log_foreign_chat_template,
    read_config,
    read_generation_defaults,
    read_preprocessor_config,
)
from qwen2vl.weights.hub import resolve_model
from qwen2vl.weights.packing.packed_format import PackedFormat, QuantizedMatrix
from qwen2vl.weights.packing.quantization_config import QuantizationConfig
from qwen2vl.weights.save import check_output_folder, save_folder, stream_folder
from qwen2vl.weights.state_dict import check_state_dict, expected_shapes, nonfinite_tensors
from qwen2vl.weights.tensors import TensorFolder, open_tensors

__all__ = [
    "GenerationDefaults",
    "PackedFormat",
    "QuantizationConfig",
    "QuantizedMatrix",
    "TensorFolder",
    "check_output_folder",
    "check_state_dict",
    "expected_shapes",
    "log_foreign_chat_template",
    "nonfinite_tensors",
    "open_tensors",
    "read_adapter",
    "read_config",
    "read_generation_defaults",
    "read_preprocessor_config",
    "resolve_model",
    "save_adapter",
    "save_folder",
    "stream_folder",
]
