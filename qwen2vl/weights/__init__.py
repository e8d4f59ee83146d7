"""A Hugging Face folder <-> config, settings and tensors, checked before anything is trusted.

Read find.py (a name becomes a folder), settings.py (its small files), header.py and tensors.py
(safetensors, memory-mapped, under official names), packing.py with gptq.py and awq.py (matrices of
small integers), fit.py (do they belong to this model?), adapter.py (a LoRA folder), save.py (the
way back). This floor builds no running model: load.py, one floor up, does.
"""

from qwen2vl.weights.adapter import read_adapter, save_adapter
from qwen2vl.weights.config_files import (
    GenerationDefaults,
    note_chat_template,
    read_config,
    read_generation_defaults,
    read_preprocessor,
)
from qwen2vl.weights.hub import find
from qwen2vl.weights.quantization_config import PackedMatrix, Packing
from qwen2vl.weights.save import check_target, save_folder
from qwen2vl.weights.state_dict import check_fit, expected_shapes, nonfinite_tensors
from qwen2vl.weights.tensors import TensorFolder, layout_of, open_tensors

__all__ = [
    "GenerationDefaults",
    "PackedMatrix",
    "Packing",
    "TensorFolder",
    "check_fit",
    "check_target",
    "expected_shapes",
    "find",
    "layout_of",
    "nonfinite_tensors",
    "note_chat_template",
    "open_tensors",
    "read_adapter",
    "read_config",
    "read_generation_defaults",
    "read_preprocessor",
    "save_adapter",
    "save_folder",
]
