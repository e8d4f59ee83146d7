"""Multi-LoRA in one engine: each request's tokens equal those of PEFT's unmerged model."""

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
from tests.parity.reference import compute_reference_logits, random_model, to_reference
from tests.prompts import Prompt, image
from tests.tiny import tiny_config, tiny_processor

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

TARGETS = {
    "one": ["q_proj", "v_proj", "down_proj", "qkv", "attn.proj", "merger.mlp.2", "lm_head"],
    "other": ["o_proj", "fc1"],
}


def save_peft_adapter(model: Qwen2VL, folder: Path, targets: list[str]) -> Any:
    """Adapt the transformers copy of a model with random LoRA factors, and save the adapter."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=targets)
    adapted = get_peft_model(to_reference(model), config).eval()
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return adapted


def test_each_request_equals_the_unmerged_peft_model_of_its_adapter(tmp_path: Path) -> None:
    model = random_model(tiny_config(tie_word_embeddings=False))
    references = {
        name: save_peft_adapter(model, tmp_path / name, TARGETS[name]) for name in TARGETS
    }
    llm = LLM(model, tiny_processor(), adapters={name: tmp_path / name for name in TARGETS})
    pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    text = {"type": "text", "text": "What is this?"}
    conversation = [{"role": "user", "content": [{"type": "image", "image": pixels}, text]}]
    sampling_params = [
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, adapter=name)
        for name in TARGETS
    ]
    completions = llm.chat([conversation, conversation], sampling_params)
    model_input = llm.processor(conversation)
    assert model_input.patches_NP is not None
    pixels_NP = normalize_pixels(model_input.patches_NP, model.config.vision)
    items = [image(model_input.grids[0].h, model_input.grids[0].w)]
    for completion, reference in zip(completions, references.values(), strict=True):
        ids = list(model_input.input_ids)
        for token in completion.token_ids:
            with torch.no_grad():
                logits_TV = compute_reference_logits(
                    reference, Prompt(ids, items), pixels_NP, model.config
                )
            assert token == int(logits_TV[-1].argmax())
            ids.append(token)
    assert completions[0].token_ids != completions[1].token_ids
