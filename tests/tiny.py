"""A tiny model for tests: the real architecture and code, small sizes, no download.

The tokenizer is a byte-level tokenizer, written into a temporary folder once per process; special
token ids are looked up in it by name, independent of the official numbers.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qwen2vl.config import Qwen2VLConfig, TextConfig, VisionConfig
from qwen2vl.model.qwen2vl import Qwen2VL
from qwen2vl.processor.image import PixelLimits
from qwen2vl.processor.processor import Processor
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.processor.tokenizer_files import (
    END_OF_TEXT,
    IM_END,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    write_byte_tokenizer,
)

# Beyond ASCII: characters of two and three bytes, Latin, Chinese, and the star of tool keywords.
CHARACTERS = "\u00e9\u00fc\u00df\u00b0\u20ac\u4f60\u597d\u56fe\uff01\u273f"


@cache
def tiny_tokenizer_dir() -> Path:
    """Write the tokenizer's files; the folder is deleted when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="tiny-tokenizer-")
    _TEMPORARY_FOLDERS.append(folder)
    write_byte_tokenizer(folder.name, CHARACTERS)
    return Path(folder.name)


_TEMPORARY_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


@cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(tiny_tokenizer_dir())


def tiny_config(*, tie_word_embeddings: bool = True, **ids: Any) -> Qwen2VLConfig:
    """Build 2 + 2 layers, widths 32 and 64, sections (2, 3, 3), over the byte vocabulary."""
    tokenizer = tiny_tokenizer()
    return Qwen2VLConfig(
        vision=VisionConfig(depth=2, embed_dim=32, num_heads=2, hidden_size=64),
        text=TextConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            mrope_section=(2, 3, 3),
            tie_word_embeddings=tie_word_embeddings,
        ),
        **{
            "bos_token_id": tokenizer.token_to_id(END_OF_TEXT),
            "eos_token_id": tokenizer.token_to_id(IM_END),
            "vision_start_token_id": tokenizer.token_to_id(VISION_START),
            "vision_end_token_id": tokenizer.token_to_id(VISION_END),
            "image_token_id": tokenizer.token_to_id(IMAGE_PAD),
            "video_token_id": tokenizer.token_to_id(VIDEO_PAD),
            **ids,
        },
    )


def tiny_processor(*, max_pixels: int = 64 * 28 * 28, **options: Any) -> Processor:
    """Build a processor with at most 64 tokens per image."""
    pixels = PixelLimits(min_pixels=4 * 28 * 28, max_pixels=max_pixels)
    return Processor(tiny_config(), tiny_tokenizer(), pixels=pixels, **options)


def tiny_model(seed: int = 0, config: Qwen2VLConfig | None = None) -> Qwen2VL:
    """Build the model with random weights, large enough that outputs differ."""
    torch.manual_seed(seed)
    model = Qwen2VL(config or tiny_config()).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                scale = 1.0 if "embed_tokens" in name else fan_in**-0.5
                parameter.normal_(0.0, scale, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.02, generator=generator)
    return model
