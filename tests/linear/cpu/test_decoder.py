"""The decode kernel equals the model's forward, for every format of weights and instruction set."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from qwen2vl.geometry import AttnMeta
from qwen2vl.linear import prepacked
from qwen2vl.linear.cpu.decoder import DecoderKernel
from qwen2vl.linear.cpu.library import VARIABLE, load_kernels
from qwen2vl.linear.cpu.operators import MAX_PRECISE_ROWS
from qwen2vl.linear.kernel_linear import use_kernels
from qwen2vl.model import Int8KVCache, KVCache, Qwen2VL, SequenceKVCaches
from qwen2vl.model.int8_kv_cache import quantize_heads
from qwen2vl.model.rope import mrope_cos_sin
from qwen2vl.quantization.scheme import LayerScheme, quantize, quantize_layers
from tests.linear.cpu.test_operators import AVAILABLE
from tests.parity.reference import random_model
from tests.requirements import needs_kernels
from tests.tiny import tiny_config

FORMATS = ["float32", "bfloat16", "int8", "int4", "mixed"]
LENGTHS = [0, 1, 5, 37, 16, 2, 31, 130, 7]  # tokens before the new one

pytestmark = needs_kernels


def build(weight_format: str) -> Qwen2VL:
    """Build a tiny model with random weights, biases and norms included."""
    model = random_model(tiny_config(tie_word_embeddings=False))
    if weight_format == "bfloat16":
        use_kernels(model.bfloat16())
    elif weight_format in ("int8", "int4"):
        quantize(model, "int8" if weight_format == "int8" else "int4")
    elif weight_format == "mixed":  # blocks of different structure
        quantize_layers(model, ["model.layers.1.mlp.down_proj"], LayerScheme(8))
    return model


def make_caches(model: Qwen2VL, lengths: Sequence[int]) -> list[KVCache]:
    """Fill caches with random keys and values; their slots are more than the tokens."""
    caches: list[KVCache] = []
    for length in lengths:
        cache = KVCache.allocate(model.config.text, length + 3, model.dtype, "cpu")
        torch.nn.init.normal_(cache.k_LKZC)
        torch.nn.init.normal_(cache.v_LKZC)
        cache.length = length
        caches.append(cache)
    return caches


def make_int8_caches(model: Qwen2VL, lengths: Sequence[int]) -> list[Int8KVCache]:
    """Fill int8 caches with random keys and values."""
    caches: list[Int8KVCache] = []
    for plain in make_caches(model, lengths):
        k_LKZC, k_scale_LKZ = quantize_heads(plain.k_LKZC)
        v_LKZC, v_scale_LKZ = quantize_heads(plain.v_LKZC)
        scales = {"k_scale_LKZ": k_scale_LKZ, "v_scale_LKZ": v_scale_LKZ}
        caches.append(Int8KVCache(k_LKZC, v_LKZC, plain.length, **scales))
    return caches


@torch.inference_mode()
def run_forward(model: Qwen2VL, caches: Sequence[KVCache], embeds_SD: Tensor) -> Tensor:
    positions_S = torch.tensor([cache.length + 2 for cache in caches])
    meta = AttnMeta.build([1] * len(caches), [cache.length + 1 for cache in caches])
    storage = SequenceKVCaches(caches, meta)
    return model.model(embeds_SD, positions_S.expand(3, -1), meta, storage)


@torch.inference_mode()
def run_kernel(model: Qwen2VL, caches: Sequence[KVCache], embeds_SD: Tensor) -> Tensor:
    kernels = load_kernels()
    assert kernels is not None
    kernel = DecoderKernel.try_create(kernels, model)
    assert kernel is not None
    config = model.config.text
    positions_S = torch.tensor([cache.length + 2 for cache in caches])
    cos, sin = mrope_cos_sin(
        positions_S.expand(3, -1), config.head_dim, config.rope_theta, config.mrope_section
    )
    return kernel(embeds_SD.to(torch.float32, copy=True), cos, sin, caches)


@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("count", [1, 3, MAX_PRECISE_ROWS + 1])
def test_states_keys_and_values_equal_those_of_the_forward(
    monkeypatch: pytest.MonkeyPatch, instruction_set: str, weight_format: str, count: int
) -> None:
    monkeypatch.setenv(VARIABLE, instruction_set)
    torch.manual_seed(0)
    model = build(weight_format)
    lengths = LENGTHS[:count] if count > 1 else [37]
    expected, caches = (make_caches(model, lengths) for _ in range(2))
    for ours, theirs in zip(caches, expected, strict=True):
        ours.k_LKZC.copy_(theirs.k_LKZC)
        ours.v_LKZC.copy_(theirs.v_LKZC)
    embeds_SD = torch.randn(count, model.config.text.hidden_size).to(model.dtype)
    want_SD = run_forward(model, expected, embeds_SD).float()
    got_SD = run_kernel(model, caches, embeds_SD)
    # The forward rounds every state to bfloat16. Rounded activations (int8 for more than 8 rows)
    # may fall on the other side of a half.
    tolerance = 2e-5 if weight_format == "float32" else 2e-2
    assert (got_SD - want_SD).norm() < tolerance * want_SD.norm()
    for length, ours, theirs in zip(lengths, caches, expected, strict=True):
        assert ours.length == length  # the caller advances it
        for mine, other in ((ours.k_LKZC, theirs.k_LKZC), (ours.v_LKZC, theirs.v_LKZC)):
            new, want = mine[:, :, length].float(), other[:, :, length].float()
            assert (new - want).norm() < tolerance * want.norm()
            assert torch.equal(mine[:, :, :length], other[:, :, :length])
            assert torch.equal(mine[:, :, length + 1 :], other[:, :, length + 1 :])


@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize("weight_format", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("lengths", [[15], LENGTHS])
def test_int8_caches_give_the_states_keys_and_values_of_the_forward(
    monkeypatch: pytest.MonkeyPatch, instruction_set: str, weight_format: str, lengths: list[int]
) -> None:
    monkeypatch.setenv(VARIABLE, instruction_set)
    torch.manual_seed(0)
    model = build(weight_format)
    caches = make_int8_caches(model, lengths)
    expected = [deepcopy(cache) for cache in caches]
    embeds_SD = torch.randn(len(lengths), model.config.text.hidden_size).to(model.dtype)
    want_SD = run_forward(model, expected, embeds_SD).float()
    got_SD = run_kernel(model, caches, embeds_SD)
    # In float32 a number may be rounded to the other side of a half: to another integer.
    tolerance = 2e-4 if weight_format == "float32" else 2e-2
    assert (got_SD - want_SD).norm() < tolerance * want_SD.norm()
    for length, ours, theirs in zip(lengths, caches, expected, strict=True):
        assert ours.length == length
        for mine, other in zip(ours.slots, theirs.slots, strict=True):
            new, want = mine[:, :, length].float(), other[:, :, length].float()
            if mine.dtype == torch.int8:
                assert (new - want).abs().max() <= (1 if weight_format == "float32" else 4)
            else:
                torch.testing.assert_close(new, want, rtol=tolerance, atol=0)
            assert torch.equal(mine[:, :, :length], other[:, :, :length])
            assert torch.equal(mine[:, :, length + 1 :], other[:, :, length + 1 :])


@pytest.mark.parametrize("instruction_set", AVAILABLE)
def test_int8_keys_and_values_are_those_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, instruction_set: str
) -> None:
    """To the bit, from equal numbers: in the first layer the states are still the same."""
    monkeypatch.setenv(VARIABLE, instruction_set)
    torch.manual_seed(0)
    model = build("float32")
    lengths = [0, 3, 20]
    plain, int8 = make_caches(model, lengths), make_int8_caches(model, lengths)
    embeds_SD = torch.randn(len(lengths), model.config.text.hidden_size)
    embeds_SD[2] = torch.nan
    run_kernel(model, plain, embeds_SD)
    run_kernel(model, int8, embeds_SD)
    for index, length in enumerate(lengths):
        for x_LKZC, ints_LKZC, scale_LKZ in (
            (plain[index].k_LKZC, int8[index].k_LKZC, int8[index].k_scale_LKZ),
            (plain[index].v_LKZC, int8[index].v_LKZC, int8[index].v_scale_LKZ),
        ):
            ints_KC, scale_K = quantize_heads(x_LKZC[0, :, length])
            if index == 2:
                assert scale_LKZ[0, :, length].isnan().all()  # so that they are read as NaN
            else:
                assert torch.equal(ints_LKZC[0, :, length], ints_KC)
                assert torch.equal(scale_LKZ[0, :, length], scale_K)


@pytest.mark.parametrize("weight_format", ["bfloat16", "int8"])
def test_sequences_do_not_affect_each_other(weight_format: str) -> None:
    torch.manual_seed(0)
    model = build(weight_format)
    lengths = LENGTHS[:MAX_PRECISE_ROWS]
    caches = make_caches(model, lengths)
    embeds_SD = torch.randn(len(lengths), model.config.text.hidden_size).to(model.dtype)
    together_SD = run_kernel(model, caches, embeds_SD)
    for i, cache in enumerate(caches):
        alone_1D = run_kernel(model, [cache], embeds_SD[i : i + 1])
        torch.testing.assert_close(alone_1D[0], together_SD[i], rtol=1e-4, atol=1e-4)


def test_large_scores_do_not_overflow() -> None:
    torch.manual_seed(0)
    model = build("float32")
    caches, expected = (make_caches(model, [20]) for _ in range(2))
    caches[0].k_LKZC.mul_(1e4)
    expected[0].k_LKZC.copy_(caches[0].k_LKZC)
    expected[0].v_LKZC.copy_(caches[0].v_LKZC)
    embeds_SD = torch.randn(1, model.config.text.hidden_size)
    want_SD = run_forward(model, expected, embeds_SD)
    torch.testing.assert_close(run_kernel(model, caches, embeds_SD), want_SD, rtol=1e-3, atol=1e-3)


def test_layers_of_other_kinds_are_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load_kernels()
    assert kernels is not None
    model = build("float32")
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    assert DecoderKernel.try_create(kernels, model) is None
    assert DecoderKernel.try_create(kernels, build("float32").double()) is None
    if prepacked.can_prepack():
        monkeypatch.setattr(prepacked, "MIN_PREPACK_NUMEL", 1)
        model = build("float32").bfloat16()
        prepacked.prepack_layers(model)
        assert DecoderKernel.try_create(kernels, model) is None
