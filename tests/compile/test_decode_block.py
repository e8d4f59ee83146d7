"""Compiled decode blocks equal the eager decoder for one token, KV cache included.

The fast tests run the traced graph without compiling it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl.compile.decode_block import CompiledDecodeBlocks
from qwen2vl.geometry import AttnMeta
from qwen2vl.linear import aot, prepacked
from qwen2vl.linear.gemv import use_gemv
from qwen2vl.linear.prepacked import can_prepack, prepack_layers
from qwen2vl.model import KVCache, Qwen2VL, SequenceKVCaches
from qwen2vl.model.rope import mrope_cos_sin
from qwen2vl.quantization.scheme import LayerScheme, quantize, quantize_layers
from tests.parity.reference import random_model
from tests.tiny import tiny_config

MODEL_KINDS = ["float32", "bfloat16", "prepacked", "int8", "int4", "mixed"]


def build(kind: str, monkeypatch: pytest.MonkeyPatch) -> Qwen2VL:
    """Build a tiny model with random weights, biases and norms included."""
    model = random_model(tiny_config(tie_word_embeddings=False))
    if kind == "prepacked":
        if not can_prepack():
            pytest.skip("no AVX-512, so nothing is prepacked")
        monkeypatch.setattr(prepacked, "MIN_PREPACK_NUMEL", 1)
        prepack_layers(model.bfloat16())
    if kind in ("bfloat16", "prepacked"):
        use_gemv(model.bfloat16())
    if kind in ("int8", "int4"):
        quantize(model, "int4" if kind == "int4" else "int8")
    if kind == "mixed":  # blocks of different structure
        quantize_layers(model, ["model.layers.1.mlp.down_proj"], LayerScheme(8))
    return model


@torch.inference_mode()
def run_eagerly(model: Qwen2VL, cache: KVCache, x_1D: Tensor) -> Tensor:
    length = cache.length
    positions_31 = torch.full((3, 1), length + 2)
    meta = AttnMeta.build([1], [length + 1])
    return model.model(x_1D, positions_31, meta, SequenceKVCaches([cache], meta))


@torch.inference_mode()
def run_compiled(
    blocks: CompiledDecodeBlocks, model: Qwen2VL, cache: KVCache, x_1D: Tensor
) -> Tensor:
    config, stop = model.config.text, cache.length + 1
    cos, sin = mrope_cos_sin(
        torch.full((3, 1), cache.length + 2),
        config.head_dim,
        config.rope_theta,
        config.mrope_section,
    )
    keys, values = cache.k_LKZC[:, :, :stop], cache.v_LKZC[:, :, :stop]
    return model.model.norm(blocks(x_1D, cos, sin, keys, values))


def filled_cache(model: Qwen2VL, length: int, capacity: int) -> KVCache:
    cache = KVCache.allocate(model.config.text, capacity, model.dtype, "cpu")
    torch.manual_seed(length)
    cache.k_LKZC.normal_()
    cache.v_LKZC.normal_()
    cache.length = length
    return cache


def check(model: Qwen2VL, blocks: CompiledDecodeBlocks, length: int, capacity: int) -> None:
    cache = filled_cache(model, length, capacity)
    other = copy.deepcopy(cache)
    x_1D = torch.randn(1, model.config.text.hidden_size, dtype=model.dtype)
    want_1D, got_1D = run_eagerly(model, cache, x_1D), run_compiled(blocks, model, other, x_1D)
    # Fusion rounds to bfloat16 less often, and activations may be quantized to other integers.
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    assert (got_1D - want_1D).float().norm() <= tolerance * want_1D.float().norm()
    for got, want in ((other.k_LKZC, cache.k_LKZC), (other.v_LKZC, cache.v_LKZC)):
        assert torch.equal(
            got[:, :, :length], want[:, :, :length]
        )  # only the token's own slot is written
        assert torch.equal(got[:, :, length + 1 :], want[:, :, length + 1 :])
        token_kv = want[:, :, length].float()
        assert (got[:, :, length].float() - token_kv).norm() <= tolerance * token_kv.norm()


def skip_compilation(
    graph: Callable[..., Sequence[Tensor]], *_: Any
) -> Callable[..., Sequence[Tensor]]:
    return graph


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_traced_blocks_equal_the_decoder(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "_compile", skip_compilation)
    model = build(kind, monkeypatch)
    before = {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}
    blocks = CompiledDecodeBlocks(model)
    assert {n: (p.data_ptr(), p._version) for n, p in model.named_parameters()} == before
    assert len({id(function) for function, _ in blocks._blocks}) == (2 if kind == "mixed" else 1)

    @given(length=st.integers(1, 200), headroom=st.integers(1, 60))
    @settings(max_examples=15, deadline=None)
    def check_any_length(length: int, headroom: int) -> None:
        check(model, blocks, length, length + headroom)

    check_any_length()


def test_in_place_changes_are_used_and_replaced_weights_need_a_refresh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aot, "_compile", skip_compilation)
    model = build("float32", monkeypatch)
    blocks = CompiledDecodeBlocks(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)  # in place
    check(model, blocks, 9, 20)
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(-layer.weight.detach())
    with pytest.raises(AssertionError):
        check(model, blocks, 9, 20)
    blocks.refresh_weights()
    check(model, blocks, 9, 20)


@pytest.mark.parametrize("change", ["strides", "dtype", "kind"])
def test_refresh_compiles_new_block_structures(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot, "_compile", skip_compilation)
    model = build("float32", monkeypatch)
    blocks = CompiledDecodeBlocks(model)
    if change == "strides":
        layer = model.model.layers[1].mlp.gate_proj
        layer.weight = torch.nn.Parameter(layer.weight.detach().T.contiguous().T)
    elif change == "dtype":
        model.bfloat16()
    else:
        quantize(model, "int8")
    blocks.refresh_weights()
    assert len(blocks._functions) == 2
    check(model, blocks, 9, 20)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_compiled_blocks_equal_the_decoder(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind, monkeypatch)
    blocks = CompiledDecodeBlocks(model)
    for length, capacity in ((1, 2), (2, 200), (63, 64), (64, 90), (300, 1000), (999, 1000)):
        check(model, blocks, length, capacity)
