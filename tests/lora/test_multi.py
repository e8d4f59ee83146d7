"""Multi-LoRA: each token is computed with its own adapter, as by a merged model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.linear.kernel_linear import use_kernels
from qwen2vl.lora.layers import LoraFactors, merge_lora
from qwen2vl.lora.multi import LoraAdapter, LoraManager, LoraMapping
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.scheme import CpuQuantizationMode, quantize
from tests.adapters import TEXT, VISION, random_factors
from tests.parity.reference import random_model
from tests.tiny import tiny_config

MODEL = random_model(tiny_config(tie_word_embeddings=False))
FACTORS = [random_factors(MODEL, seed=1), random_factors(MODEL, ("q_proj", "fc1"), seed=2, rank=3)]
ADAPTERS = [LoraAdapter.from_factors(factors, MODEL) for factors in FACTORS]


def merged_model(factors: dict[str, LoraFactors] | None) -> Qwen2VL:
    model = copy.deepcopy(MODEL)
    merge_lora(model, factors or {})
    return model


MERGED = [merged_model(None), *map(merged_model, FACTORS)]


def adapter_of(index: int) -> LoraAdapter | None:
    return ADAPTERS[index - 1] if index else None


@torch.inference_mode()
def compute_logits(
    model: Qwen2VL, lengths: list[int], mapping: LoraMapping | None = None
) -> Tensor:
    """Compute the logits of some segments, (T, V)."""
    manager = LoraManager(model)
    ids = torch.cat([torch.arange(length) + 7 for length in lengths])
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(3, -1)
    mapping = mapping or [(None, len(ids))]
    with manager.activate("model", mapping):
        hidden_TD = model(ids, positions, AttnMeta.build(lengths))
    with manager.activate("lm_head", mapping):
        return model.logits(hidden_TD)


@torch.inference_mode()
def encode_images(
    model: Qwen2VL, grids: list[Grid], mapping: LoraMapping | None = None
) -> list[Tensor]:
    """Encode images that depend on their grids alone; return the embeddings of each."""
    patches = [torch.arange(g.h * g.w * 1176).view(-1, 1176) % 251 for g in grids]
    mapping = mapping or [(None, sum(map(len, patches)))]
    with LoraManager(model).activate("visual", mapping):
        vision_MD = model.encode(torch.cat(patches).to(torch.uint8), VisionMeta.build(grids))
    return list(vision_MD.split([len(p) // 4 for p in patches]))


segments = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), min_size=1, max_size=6)


@given(segments)
@settings(max_examples=15)
def test_logits_of_any_mix_equal_those_of_merged_models(spans: list[tuple[int, int]]) -> None:
    lengths = [length for _, length in spans]
    got = compute_logits(MODEL, lengths, [(adapter_of(index), length) for index, length in spans])
    for span_logits, (index, length) in zip(got.split(lengths), spans, strict=True):
        torch.testing.assert_close(
            span_logits, compute_logits(MERGED[index], [length]), rtol=1e-4, atol=1e-4
        )


@given(segments)
@settings(max_examples=15)
def test_vision_embeddings_of_any_mix_equal_those_of_merged_models(
    spans: list[tuple[int, int]],
) -> None:
    """The merger has four patches a row."""
    grids = [Grid(1, 2, 2 * length) for _, length in spans]
    mapping = [(adapter_of(index), g.h * g.w) for (index, _), g in zip(spans, grids, strict=True)]
    for got, grid, (index, _) in zip(
        encode_images(MODEL, grids, mapping), grids, spans, strict=True
    ):
        torch.testing.assert_close(
            got, encode_images(MERGED[index], [grid])[0], rtol=1e-4, atol=1e-4
        )


def test_adapters_differ() -> None:
    """A precondition of the other tests."""
    plain, first, second = (compute_logits(model, [4]) for model in MERGED)
    assert (plain - first).abs().max() > 0.1 and (plain - second).abs().max() > 0.1
    assert (first - second).abs().max() > 0.1


def test_modules_are_replaced_only_while_an_adapter_is_active() -> None:
    model = copy.deepcopy(MODEL)
    manager = LoraManager(model)
    before = dict(model.named_modules())
    layer = model.model.layers[0].self_attn
    for mapping in ([], [(None, 3)], [(ADAPTERS[0], 0), (None, 3)]):
        with manager.activate("model", mapping):
            assert dict(model.named_modules()) == before
    with manager.activate("model", [(ADAPTERS[0], 3)]):
        assert layer.q_proj is not before["model.layers.0.self_attn.q_proj"]
        assert model.visual.blocks[0].attn.qkv is before["visual.blocks.0.attn.qkv"]
    assert dict(model.named_modules()) == before
    with pytest.raises(ZeroDivisionError), manager.activate("model", [(ADAPTERS[0], 3)]):
        _ = 1 / 0
    assert dict(model.named_modules()) == before


def test_interrupted_restore_is_completed_by_the_next_activation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = copy.deepcopy(MODEL)
    manager, before = LoraManager(model), dict(model.named_modules())
    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
        manager.activate("model", [(ADAPTERS[0], 3)]),
    ):
        patch.setattr(manager, "_restore", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert model.model.layers[0].mlp.up_proj is not before["model.layers.0.mlp.up_proj"]
    with manager.activate("model", [(None, 3)]):
        assert dict(model.named_modules()) == before


class ReferenceLora(nn.Module):
    """The formula of LoRA, for all tokens."""

    def __init__(self, layer: nn.Module, factors: LoraFactors) -> None:
        super().__init__()
        self.layer, self.factors = layer, factors

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.factors.a_RX.to(x.dtype), self.factors.b_YR.to(x.dtype)
        return self.layer(x) + self.factors.scale * (x @ a.T @ b.T)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_adapters_on_quantized_and_fused_layers(mode: CpuQuantizationMode) -> None:
    model, reference = copy.deepcopy(MODEL), copy.deepcopy(MODEL)
    factors = random_factors(MODEL, seed=3)
    for each in (model, reference):
        quantize(each, mode)
    for name, found in factors.items():
        reference.set_submodule(name, ReferenceLora(reference.get_submodule(name), found))
    adapter = LoraAdapter.from_factors(factors, model)
    for length in (1, 12):
        want = compute_logits(reference, [length])
        got = compute_logits(model, [length, 12], [(adapter, length), (None, 12)])[:length]
        # In a larger batch activations may be quantized to other integers.
        tolerance = 1e-4 if length == 12 else 0.05
        assert (got - want).norm() < tolerance * want.norm()
        assert (compute_logits(model, [length]) - want).norm() > 0.3 * want.norm()
    grids = [Grid(1, 4, 4), Grid(1, 2, 6)]
    embeddings = encode_images(model, grids, [(None, 16), (adapter, 12)])
    torch.testing.assert_close(
        embeddings[1], encode_images(reference, grids)[1], rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(embeddings[0], encode_images(model, grids)[0])


def test_bfloat16_and_gemv_layers() -> None:
    model, want = copy.deepcopy(MODEL).bfloat16(), merged_model(FACTORS[0])
    use_kernels(model)
    adapter = LoraAdapter.from_factors(FACTORS[0], model)
    got = compute_logits(model, [1], [(adapter, 1)]).float()
    assert (got - compute_logits(want, [1])).norm() < 0.03 * got.norm()


@pytest.mark.parametrize("change", [{"seed": 5}, {"rank": 3}, {"targets": ("q_proj",)}])
def test_digests_depend_on_all_factors(change: dict[str, Any]) -> None:
    def make_adapter(**options: Any) -> LoraAdapter:
        return LoraAdapter.from_factors(random_factors(MODEL, **options), MODEL)

    assert make_adapter().digest == make_adapter().digest
    assert make_adapter().vision_digest == make_adapter().vision_digest != b""
    assert make_adapter(**change).digest != make_adapter().digest
    assert make_adapter(targets=TEXT).vision_digest == b""
    assert make_adapter(targets=VISION).digest == make_adapter(targets=VISION).vision_digest
    doubled = {
        name: LoraFactors(a_RX=f.a_RX, b_YR=f.b_YR, scale=2 * f.scale)
        for name, f in random_factors(MODEL).items()
    }
    assert LoraAdapter.from_factors(doubled, MODEL).digest != make_adapter().digest
