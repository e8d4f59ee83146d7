"""One token through the traced blocks is one token through the decoder, its cache included.

What the tracer wrote down is run as it is, without a compiler, in the fast tests.
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

from qwen2vl.compile.decode_block import TokenBlocks
from qwen2vl.geometry import AttnMeta
from qwen2vl.linear import aot, prepacked
from qwen2vl.linear.gemv import multiply_single_rows
from qwen2vl.linear.prepacked import can_pack, pack_layers
from qwen2vl.model import KVCache, Qwen2VL
from qwen2vl.model.rope import text_rotation
from qwen2vl.quantization import int8
from qwen2vl.quantization.scheme import Kind, quantize, quantize_layers
from tests.parity.oracle import random_model
from tests.tiny import tiny_config

KINDS = ["float32", "bfloat16", "packed", "int8", "wide int8", "int4", "mixed"]


def build(kind: str, monkeypatch: pytest.MonkeyPatch) -> Qwen2VL:
    """Make a tiny model of random numbers, biases and norms included."""
    model = random_model(tiny_config(tie_word_embeddings=False))
    if kind == "packed":
        if not can_pack():
            pytest.skip("no AVX-512, so nothing is packed")
        monkeypatch.setattr(prepacked, "LARGE", 1)
        pack_layers(model.bfloat16())
    if kind in ("bfloat16", "packed"):
        multiply_single_rows(model.bfloat16())
    if kind == "wide int8":
        monkeypatch.setattr(int8, "has_integer_products", lambda: False)
    if kind in ("int8", "wide int8", "int4"):
        quantize(model, "int4" if kind == "int4" else "int8")
    if kind == "mixed":  # blocks that differ
        quantize_layers(model, ["model.layers.1.mlp.down_proj"], Kind(8))
    return model


@torch.inference_mode()
def ordinary(model: Qwen2VL, cache: KVCache, x_1D: Tensor) -> Tensor:
    length = cache.length
    positions_31 = torch.full((3, 1), length + 2)
    return model.model(x_1D, positions_31, AttnMeta.build([1], [length + 1]), [cache])


@torch.inference_mode()
def quick(blocks: TokenBlocks, model: Qwen2VL, cache: KVCache, x_1D: Tensor) -> Tensor:
    config, stop = model.config.text, cache.length + 1
    cos, sin = text_rotation(
        torch.full((3, 1), cache.length + 2),
        config.head_dim,
        config.rope_theta,
        config.mrope_section,
    )
    keys, values = cache.k_LKZC[:, :, :stop], cache.v_LKZC[:, :, :stop]
    return model.model.norm(blocks(x_1D, cos, sin, keys, values))


def filled(model: Qwen2VL, length: int, capacity: int) -> KVCache:
    cache = KVCache.allocate(model.config.text, capacity, model.dtype, "cpu")
    torch.manual_seed(length)
    cache.k_LKZC.normal_()
    cache.v_LKZC.normal_()
    cache.length = length
    return cache


def check(model: Qwen2VL, blocks: TokenBlocks, length: int, capacity: int) -> None:
    cache = filled(model, length, capacity)
    other = copy.deepcopy(cache)
    x_1D = torch.randn(1, model.config.text.hidden_size, dtype=model.dtype)
    want_1D, got_1D = ordinary(model, cache, x_1D), quick(blocks, model, other, x_1D)
    # Fused, bfloat16 is rounded less often; and a number may fall to another of 2**15 steps.
    limit = 1e-4 if model.dtype == torch.float32 else 2e-2
    assert (got_1D - want_1D).float().norm() <= limit * want_1D.float().norm()
    for got, want in ((other.k_LKZC, cache.k_LKZC), (other.v_LKZC, cache.v_LKZC)):
        assert torch.equal(got[:, :, :length], want[:, :, :length])  # nothing but its own place
        assert torch.equal(got[:, :, length + 1 :], want[:, :, length + 1 :])
        own = want[:, :, length].float()
        assert (got[:, :, length].float() - own).norm() <= limit * own.norm()


def as_traced(graph: Callable[..., Sequence[Tensor]], *_: Any) -> Callable[..., Sequence[Tensor]]:
    return graph


@pytest.mark.parametrize("kind", KINDS)
def test_traced_blocks_are_the_decoder(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "_compile", as_traced)
    model = build(kind, monkeypatch)
    before = {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}
    blocks = TokenBlocks(model)
    assert {n: (p.data_ptr(), p._version) for n, p in model.named_parameters()} == before
    assert len({id(function) for function, _ in blocks._blocks}) == (2 if kind == "mixed" else 1)

    @given(length=st.integers(1, 200), spare=st.integers(1, 60))
    @settings(max_examples=15, deadline=None)
    def hold(length: int, spare: int) -> None:
        check(model, blocks, length, length + spare)

    hold()


def test_exchanged_weights_are_gathered_and_changed_ones_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aot, "_compile", as_traced)
    model = build("float32", monkeypatch)
    blocks = TokenBlocks(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)  # in place
    check(model, blocks, 9, 20)
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(-layer.weight.detach())
    with pytest.raises(AssertionError):
        check(model, blocks, 9, 20)
    blocks.gather()
    check(model, blocks, 9, 20)


@pytest.mark.parametrize("change", ["strides", "dtype", "kind"])
def test_weights_of_another_kind_are_compiled_for(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot, "_compile", as_traced)
    model = build("float32", monkeypatch)
    blocks = TokenBlocks(model)
    if change == "strides":
        layer = model.model.layers[1].mlp.gate_proj
        layer.weight = torch.nn.Parameter(layer.weight.detach().T.contiguous().T)
    elif change == "dtype":
        model.bfloat16()
    else:
        quantize(model, "int8")
    blocks.gather()
    assert len(blocks._kinds) == 2
    check(model, blocks, 9, 20)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_are_the_decoder(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind, monkeypatch)
    blocks = TokenBlocks(model)
    for length, capacity in ((1, 2), (2, 200), (63, 64), (64, 90), (300, 1000), (999, 1000)):
        check(model, blocks, length, capacity)
