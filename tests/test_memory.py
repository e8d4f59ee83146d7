"""Memory estimates are tight upper bounds; available memory is read from the system."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen2vl import memory
from qwen2vl.config import PRESETS, Qwen2VLConfig, TextConfig, VisionConfig
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.linear import prepacked
from qwen2vl.linear.prepacked import can_prepack, prepack_layers
from qwen2vl.memory import available_memory, estimate_memory, matmul_dtype
from qwen2vl.model import Int8KVCache, Qwen2VL, activations
from qwen2vl.quantization.scheme import CPU_MODES, CpuQuantizationMode, layer_schemes, quantize
from tests.tiny import tiny_config, tiny_model


def test_weights_and_kv_cache_of_official_models() -> None:
    for size, weights, per_token, per_token_int8 in [
        ("2B", 4_417_971_200, 28_672, 14_784),
        ("7B", 16_582_751_232, 57_344, 29_568),
        ("72B", 146_811_120_640, 327_680, 168_960),
    ]:
        need = estimate_memory(PRESETS[size], torch.bfloat16, 32_768, 0)
        assert (need.weights, need.kv_cache) == (weights, 32_768 * per_token)
        assert need.total == need.weights + need.kv_cache + need.activation
        int8 = estimate_memory(PRESETS[size], torch.bfloat16, 32_768, 0, kv_cache=Int8KVCache)
        assert int8.kv_cache == 32_768 * per_token_int8
        assert (int8.weights, int8.activation) == (need.weights, need.activation)


class PeakAllocationMode(TorchDispatchMode):
    """Tracks the bytes of all tensors allocated under it, and their peak."""

    def __init__(self, model: Qwen2VL) -> None:
        super().__init__()
        # A view of a parameter allocates nothing.
        self.sizes = {p.untyped_storage()._cdata: 0 for p in model.parameters()}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, key, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("part", "width"), [("pixels", 64), ("tower", 512), ("decoder", 64), ("fused decoder", 64)]
)
def test_activation_estimate_is_a_tight_upper_bound(
    part: str, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Qwen2VLConfig(
        vision=VisionConfig(depth=2, embed_dim=width, num_heads=4, hidden_size=96),
        text=TextConfig(
            hidden_size=96,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            vocab_size=64,
            mrope_section=(2, 3, 3),
        ),
        image_token_id=1,
        video_token_id=2,
    )
    model = Qwen2VL(config).to(dtype)
    if is_fused := part == "fused decoder":
        if dtype != torch.bfloat16 or not can_prepack():
            pytest.skip("layers are prepacked and fused only in bfloat16 with AVX-512")
        monkeypatch.setattr(prepacked, "MIN_PREPACK_NUMEL", 1024)
        prepack_layers(model)
    is_decoder = part.endswith("decoder")
    length, grid = (512, Grid(1, 2, 2)) if is_decoder else (2, Grid(1, 40, 40))
    max_pixels = 0 if is_decoder else grid.h * grid.w * 196
    need = estimate_memory(config, dtype, length, max_pixels, prepack=is_fused)
    assert peak_allocation(model, length if is_decoder else 0, grid) <= need.activation
    # A GPU and torch.compile do not overwrite the inputs of activation functions.
    monkeypatch.setattr(activations, "_overwrites", lambda x_TI: False)
    peak = peak_allocation(model, length if is_decoder else 0, grid)
    assert 0.9 * need.activation <= peak <= need.activation


def peak_allocation(model: Qwen2VL, num_tokens: int, grid: Grid) -> int:
    """Return the peak of a prompt of tokens in the decoder, or of an image in the vision tower."""
    with torch.inference_mode(), PeakAllocationMode(model) as allocation:
        if num_tokens:
            ids = torch.zeros(num_tokens, dtype=torch.int64)
            model(ids, ids.expand(3, -1), AttnMeta.build([num_tokens]))
        else:
            patches_NP = torch.zeros(grid.h * grid.w, 1176, dtype=torch.uint8)
            model.encode(patches_NP, VisionMeta.build([grid]))
    return allocation.peak


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", CPU_MODES)
def test_weights_of_quantized_models(mode: CpuQuantizationMode, tied: bool) -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=tied)).to(torch.bfloat16)
    schemes = layer_schemes(model, mode)
    quantize(model, mode)
    tensors = [*model.parameters(), *model.buffers()]
    allocated = sum(t.numel() * t.itemsize for t in tensors)
    need = estimate_memory(model.config, torch.bfloat16, 16, 0, schemes).weights
    # Biases are float32 in quantized layers, which the estimate ignores.
    assert 0.97 * allocated <= need <= 1.02 * allocated


@pytest.mark.skipif(not prepacked.can_prepack(), reason="nothing is prepacked on this processor")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("min_numel", [1, 2**30])
def test_weights_of_prepacked_models(
    monkeypatch: pytest.MonkeyPatch, tied: bool, min_numel: int
) -> None:
    monkeypatch.setattr(prepacked, "MIN_PREPACK_NUMEL", min_numel)
    model = tiny_model(config=tiny_config(tie_word_embeddings=tied)).to(torch.bfloat16)
    prepacked.prepack_layers(model)
    allocated = sum(t.numel() * t.itemsize for t in (*model.parameters(), *model.buffers()))
    assert estimate_memory(model.config, torch.bfloat16, 16, 0, prepack=True).weights == allocated


def test_weights_of_quantized_official_models() -> None:
    need = {}
    for mode in CPU_MODES:
        with torch.device("meta"):
            schemes = layer_schemes(Qwen2VL(PRESETS["2B"]), mode)
        need[mode] = estimate_memory(PRESETS["2B"], torch.bfloat16, 16, 0, schemes).weights
    # Embedding 467 MB; head 235; tower 663; decoder 1,310 or 655 with scales.
    assert 2.66e9 < need["int8"] < 2.70e9
    assert 2.02e9 < need["int4"] < 2.08e9


def test_available_memory_of_this_machine() -> None:
    available = available_memory(torch.device("cpu"))
    assert available is None or 2**26 < available < 2**50


@pytest.mark.parametrize(
    ("limit", "want"), [("max\n", None), ("1000000\n", 1_000_000 - 700_000 + 200_000)]
)
def test_available_memory_of_a_container(tmp_path: Path, limit: str, want: int | None) -> None:
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\nfile 200000\n")
    assert memory._cgroup_available(tmp_path) == want
    assert memory._cgroup_available(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("name", "device", "native", "expected"),
    [
        ("auto", "cpu", True, torch.bfloat16),
        ("auto", "cpu", False, torch.float32),  # products of bfloat16 take ten times as long there
        ("auto", "cuda", False, torch.bfloat16),
        ("bfloat16", "cpu", False, torch.bfloat16),
        ("float32", "cuda", True, torch.float32),
    ],
)
def test_dtype_of_training(
    monkeypatch: pytest.MonkeyPatch, name: str, device: str, native: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(memory, "_has_native_bf16", lambda: native)
    assert matmul_dtype(name, torch.device(device)) == expected
