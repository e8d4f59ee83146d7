"""torchao's layers on a GPU answer nearly as the whole model, also when steps are recorded."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qwen2vl.engine import LLM
from qwen2vl.engine.config import EngineConfig
from qwen2vl.geometry import AttnMeta
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.scheme import GPU_MODES, AnyMode, describe, gpu_recipe, quantize_layers
from qwen2vl.quantization.torchao import LEAST, NarrowLinear
from tests.engine.test_runner import CONVERSATIONS, GREEDY
from tests.gpu.device import GPU, needs_gpu
from tests.tiny import tiny_config, tiny_model, tiny_processor

pytestmark = needs_gpu

# Of 16 levels, of 256, and of three bits of fraction; of the norm of all logits.
FAR = {"int8": 0.05, "int4": 0.35, "fp8": 0.15}


def wide() -> Qwen2VL:
    """Build a model whose decoder is wide enough for groups of 128 inputs."""
    tiny = tiny_config()
    text = replace(tiny.text, hidden_size=1024, intermediate_size=1024, num_attention_heads=16)
    text = replace(text, mrope_section=(8, 12, 12))
    vision = replace(tiny.vision, hidden_size=1024)
    return tiny_model(config=replace(tiny, text=text, vision=vision)).to(GPU, torch.bfloat16)


def narrowed(model: Qwen2VL, mode: AnyMode) -> Qwen2VL:
    pytest.importorskip("torchao", reason="torchao is an extra, qwen2vl[gpu-quant]")
    if torch.cuda.get_device_capability(GPU) < LEAST[mode]:
        pytest.skip(f"this GPU is too old for {mode}")
    for name, kind in gpu_recipe(model, mode).items():
        quantize_layers(model, [name], kind)
    return model


@torch.inference_mode()
def logits_of(model: Qwen2VL, tokens: int) -> Tensor:
    ids_T = torch.arange(tokens, device=GPU) % 200
    places_3T = torch.arange(tokens, device=GPU).expand(3, -1)
    hidden_TD = model(ids_T, places_3T, AttnMeta.build([tokens]).to(GPU))
    return model.logits(hidden_TD).float()


@pytest.mark.parametrize("mode", GPU_MODES)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_narrowed_model_answers_nearly_as_the_whole_one(mode: AnyMode, tokens: int) -> None:
    model = wide()
    want_TV = logits_of(model, tokens)
    got_TV = logits_of(narrowed(deepcopy(model), mode), tokens)
    assert 0 < (got_TV - want_TV).norm() / want_TV.norm() < FAR[mode]


@pytest.mark.parametrize("mode", GPU_MODES)
def test_recorded_steps_of_a_narrowed_model_are_its_steps(mode: AnyMode) -> None:
    model = narrowed(wide(), mode)
    assert any(isinstance(module, NarrowLinear) for module in model.modules())
    assert "by torchao" in describe(model)
    answers = [
        LLM.of(model, tiny_processor(), engine=EngineConfig(cache_tokens=4096, graphs=graphs)).chat(
            CONVERSATIONS[0], replace(GREEDY, max_tokens=4)
        )[0]
        for graphs in (True, False)
    ]
    recorded, ordinary = ([entry.logprob for entry in one.logprobs or ()] for one in answers)
    assert recorded[0] == pytest.approx(ordinary[0], abs=0.05)
