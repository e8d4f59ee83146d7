"""Tiny model folders for the tests, and edits of their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qwen2vl.model import Qwen2VL
from qwen2vl.processor.image import PixelLimits
from qwen2vl.weights import GenerationDefaults, save_folder
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer_dir

PIXELS = PixelLimits(min_pixels=4 * 28 * 28, max_pixels=64 * 28 * 28)


def write_tiny(
    path: Path,
    *,
    model: Qwen2VL | None = None,
    dtype: torch.dtype = torch.float32,
    generation: GenerationDefaults | None = None,
    max_shard_bytes: int = 10**9,
) -> Qwen2VL:
    """Write a model folder and return its model; untied by default, so that it has lm_head."""
    model = model or tiny_model(config=tiny_config(tie_word_embeddings=False))
    save_folder(
        path,
        config=model.config,
        state_dict=model.state_dict(),
        tokenizer_folder=tiny_tokenizer_dir(),
        pixels=PIXELS,
        generation=generation,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )
    return model


def edit_json(path: Path, **changes: Any) -> None:
    """Change or add keys of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    remaining = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(remaining), encoding="utf-8")


def official_config_json(size: str) -> dict[str, Any]:
    """Return config.json of an official repository."""
    hidden, ffn, layers, heads, kv, vocab, tied = {
        "2B": (1536, 8960, 28, 12, 2, 151936, True),
        "7B": (3584, 18944, 28, 28, 4, 152064, False),
        "72B": (8192, 29568, 80, 64, 8, 152064, False),
    }[size]
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "model_type": "qwen2_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "vocab_size": vocab,
    }
