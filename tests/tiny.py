"""A model small enough to test with: the real architecture and code, tiny numbers, no download.

The tokenizer is a byte tokenizer written into a temporary folder once a process; the special ids
are taken from it by name, so nothing here knows the official numbers.
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

# Beyond ASCII: marks of two and three bytes, Latin, Chinese, and the tool keywords' star.
CHARACTERS = "\u00e9\u00fc\u00df\u00b0\u20ac\u4f60\u597d\u56fe\uff01\u273f"


@cache
def tiny_tokenizer_dir() -> Path:
    """Write the tokenizer's files; the folder goes away with the process."""
    keeper = tempfile.TemporaryDirectory(prefix="tiny-tokenizer-")
    _KEEPERS.append(keeper)
    write_byte_tokenizer(keeper.name, CHARACTERS)
    return Path(keeper.name)


_KEEPERS: list[tempfile.TemporaryDirectory[str]] = []


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
            "bos_token_id": tokenizer.id_of(END_OF_TEXT),
            "eos_token_id": tokenizer.id_of(IM_END),
            "vision_start_token_id": tokenizer.id_of(VISION_START),
            "vision_end_token_id": tokenizer.id_of(VISION_END),
            "image_token_id": tokenizer.id_of(IMAGE_PAD),
            "video_token_id": tokenizer.id_of(VIDEO_PAD),
            **ids,
        },
    )


def tiny_processor(*, max_pixels: int = 64 * 28 * 28, **options: Any) -> Processor:
    """Build a processor of at most 64 tokens a picture."""
    pixels = PixelLimits(min_pixels=4 * 28 * 28, max_pixels=max_pixels)
    return Processor(tiny_config(), tiny_tokenizer(), pixels=pixels, **options)


def tiny_model(seed: int = 0, config: Qwen2VLConfig | None = None) -> Qwen2VL:
    """Build the model with weights drawn from `seed`, large enough that answers differ."""
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
