"""torchao layers on a GPU: logits close to the original model, also with CUDA graphs."""

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
from qwen2vl.quantization.scheme import (
    GPU_MODES,
    QuantizationMode,
    describe_quantization,
    gpu_layer_schemes,
    quantize_layers,
)
from qwen2vl.quantization.torchao import MIN_COMPUTE_CAPABILITY, TorchaoLinear
from tests.engine.test_runner import CONVERSATIONS, GREEDY
from tests.gpu.device import GPU, needs_gpu
from tests.tiny import tiny_config, tiny_model, tiny_processor

pytestmark = needs_gpu

# Relative to the norm of all logits; int8 has 256 levels, int4 16, fp8 three mantissa bits.
MAX_DEVIATION = {"int8": 0.05, "int4": 0.35, "fp8": 0.15}


def wide_model() -> Qwen2VL:
    """Build a model whose decoder is wide enough for groups of 128 inputs."""
    tiny = tiny_config()
    text = replace(tiny.text, hidden_size=1024, intermediate_size=1024, num_attention_heads=16)
    text = replace(text, mrope_section=(8, 12, 12))
    vision = replace(tiny.vision, hidden_size=1024)
    return tiny_model(config=replace(tiny, text=text, vision=vision)).to(GPU, torch.bfloat16)


def quantized(model: Qwen2VL, mode: QuantizationMode) -> Qwen2VL:
    pytest.importorskip("torchao", reason="torchao is an extra, qwen2vl[gpu-quant]")
    if torch.cuda.get_device_capability(GPU) < MIN_COMPUTE_CAPABILITY[mode]:
        pytest.skip(f"this GPU is too old for {mode}")
    for name, scheme in gpu_layer_schemes(model, mode).items():
        quantize_layers(model, [name], scheme)
    return model


@torch.inference_mode()
def logits_of(model: Qwen2VL, tokens: int) -> Tensor:
    ids_T = torch.arange(tokens, device=GPU) % 200
    position_ids_3T = torch.arange(tokens, device=GPU).expand(3, -1)
    hidden_TD = model(ids_T, position_ids_3T, AttnMeta.build([tokens]).to(GPU))
    return model.logits(hidden_TD).float()


@pytest.mark.parametrize("mode", GPU_MODES)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_logits_of_a_quantized_model_are_close_to_the_original(
    mode: QuantizationMode, tokens: int
) -> None:
    model = wide_model()
    expected_TV = logits_of(model, tokens)
    got_TV = logits_of(quantized(deepcopy(model), mode), tokens)
    assert 0 < (got_TV - expected_TV).norm() / expected_TV.norm() < MAX_DEVIATION[mode]


@pytest.mark.parametrize("mode", GPU_MODES)
def test_cuda_graphs_of_a_quantized_model_equal_eager_steps(mode: QuantizationMode) -> None:
    model = quantized(wide_model(), mode)
    assert any(isinstance(module, TorchaoLinear) for module in model.modules())
    assert "by torchao" in describe_quantization(model)
    completions = [
        LLM(
            model,
            tiny_processor(),
            engine=EngineConfig(kv_cache_tokens=4096, cuda_graphs=cuda_graphs),
        ).chat(CONVERSATIONS[0], replace(GREEDY, max_tokens=4))[0]
        for cuda_graphs in (True, False)
    ]
    graphed, eager = (
        [entry.logprob for entry in completion.logprobs or ()] for completion in completions
    )
    assert graphed[0] == pytest.approx(eager[0], abs=0.05)
