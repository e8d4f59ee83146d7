"""Adapters that stay unmerged, in one engine: each request as PEFT's own unmerged model answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.model import Qwen2VL
from qwen2vl.model.vision import normalize_pixels
from tests.parity.oracle import ask_reference, random_model, twin
from tests.prompts import Prompt, image
from tests.tiny import tiny_config, tiny_processor

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

TARGETS = {
    "one": ["q_proj", "v_proj", "down_proj", "qkv", "attn.proj", "merger.mlp.2", "lm_head"],
    "other": ["o_proj", "fc1"],
}


def adapt(model: Qwen2VL, folder: Path, targets: list[str]) -> Any:
    """Let PEFT adapt the twin of a model, at random, and save the adapter."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=targets)
    adapted = get_peft_model(twin(model), config).eval()
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return adapted


def test_requests_are_answered_as_by_the_reference_with_their_adapter(tmp_path: Path) -> None:
    model = random_model(tiny_config(tie_word_embeddings=False))
    references = {name: adapt(model, tmp_path / name, TARGETS[name]) for name in TARGETS}
    llm = LLM.of(model, tiny_processor(), adapters={name: tmp_path / name for name in TARGETS})
    seen = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    said = {"type": "text", "text": "What is this?"}
    question = [{"role": "user", "content": [{"type": "image", "image": seen}, said]}]
    wishes = [
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, adapter=name)
        for name in TARGETS
    ]
    told = llm.chat([question, question], wishes)
    asked = llm.processor(question)
    assert asked.patches_NP is not None
    pixels_NP = normalize_pixels(asked.patches_NP, model.config.vision)
    visuals = [image(asked.grids[0].h, asked.grids[0].w)]
    for answer, reference in zip(told, references.values(), strict=True):
        ids = list(asked.input_ids)
        for token in answer.token_ids:
            with torch.no_grad():
                logits_TV = ask_reference(reference, Prompt(ids, visuals), pixels_NP, model.config)
            assert token == int(logits_TV[-1].argmax())
            ids.append(token)
    assert told[0].token_ids != told[1].token_ids
