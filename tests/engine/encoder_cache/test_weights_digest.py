"""Weights digest: any difference in the vision tower changes it; equal weights share it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from qwen2vl.engine.encoder_cache.weights_digest import VisionWeightsDigest, hash_vision_tower
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.scheme import CpuQuantizationMode, quantize
from tests.tiny import tiny_model


def weights_digest(
    model: Qwen2VL, *, persistent: bool = True, description: str = ""
) -> VisionWeightsDigest:
    return VisionWeightsDigest(model, persistent=persistent, description=description)


def test_equal_weights_have_equal_digests() -> None:
    digests = {weights_digest(tiny_model()).digest() for _ in range(2)}
    assert len(digests) == 1
    assert {len(digest) for digest in digests} == {32}


def test_the_digest_is_the_same_in_another_process() -> None:
    code = (
        "from qwen2vl.engine.encoder_cache.weights_digest import hash_vision_tower; "
        "from tests.tiny import tiny_model; "
        "print(hash_vision_tower(tiny_model().visual).hex())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hash_vision_tower(tiny_model().visual).hex()


def test_digests_that_are_not_persistent_are_random() -> None:
    model = tiny_model()
    one, two = weights_digest(model, persistent=False), weights_digest(model, persistent=False)
    assert one.digest() == one.digest() != two.digest()
    assert len(one.digest()) == 32


def _change_one_number(model: Qwen2VL) -> None:
    with torch.no_grad():
        model.visual.blocks[1].mlp.fc2.weight[-1, -1] += 1e-7


def _optimizer_step(model: Qwen2VL) -> None:
    model.visual.merger.mlp[2].weight.grad = torch.ones_like(model.visual.merger.mlp[2].weight)
    torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True).step()


def _load_weights(model: Qwen2VL) -> None:
    model.load_state_dict(tiny_model(seed=1).state_dict())


def _assign_weights(model: Qwen2VL) -> None:
    model.load_state_dict(tiny_model(seed=1).state_dict(), assign=True)


def _change_dtype(model: Qwen2VL) -> None:
    model.bfloat16()


def _replace_data(model: Qwen2VL) -> None:
    weight = model.visual.blocks[0].attn.qkv.weight
    weight.data = weight.data * 2


def _replace_module(model: Qwen2VL) -> None:
    class Halved(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) / 2

    old = model.visual.blocks[0].mlp.fc1
    new = Halved(old.in_features, old.out_features)
    new.weight, new.bias = old.weight, old.bias
    model.visual.blocks[0].mlp.fc1 = new
    model.visual.register_buffer("scale", torch.ones(1))


CHANGES = [
    _change_one_number,
    _optimizer_step,
    _load_weights,
    _assign_weights,
    _change_dtype,
    _replace_data,
    _replace_module,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("persistent", [True, False])
def test_every_change_is_detected(change: Callable[[Qwen2VL], None], persistent: bool) -> None:
    model = tiny_model()
    weights = weights_digest(model, persistent=persistent)
    before = weights.digest()
    assert weights.digest() == before
    change(model)
    assert weights.digest() != before
    assert weights.digest() == weights.digest()


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_depends_on_content_not_on_history(change: Callable[[Qwen2VL], None]) -> None:
    """Two models with the same changes share a digest, although their tensors are not identical."""
    one, two = tiny_model(), tiny_model()
    weights = weights_digest(two)
    weights.digest()
    change(one)
    change(two)
    assert weights_digest(one).digest() == weights.digest() != weights_digest(tiny_model()).digest()


def test_restored_weights_have_their_previous_digest() -> None:
    model = tiny_model()
    weights = weights_digest(model)
    before = weights.digest()
    _change_one_number(model)
    weights.digest()
    model.load_state_dict(tiny_model().state_dict())
    assert weights.digest() == before


def test_the_decoder_does_not_affect_the_digest() -> None:
    model = tiny_model()
    weights = weights_digest(model)
    before = weights.digest()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert weights.digest() == before


def test_the_description_affects_the_digest() -> None:
    model = tiny_model()
    digests = {
        weights_digest(model, description=text).digest() for text in ("", "int8, rows", "int4")
    }
    assert len(digests) == 3


def test_config_values_affect_the_digest() -> None:
    from dataclasses import replace

    model, other = tiny_model(), tiny_model()
    config = other.config.vision
    other.visual.config = replace(config, num_heads=4)
    assert hash_vision_tower(other.visual) != hash_vision_tower(model.visual)


def test_inference_mode_and_prepacked_weights_can_be_hashed() -> None:
    with torch.inference_mode():
        inference_model = tiny_model()
    assert weights_digest(inference_model).digest() == weights_digest(tiny_model()).digest()
    packed = tiny_model()
    packed.visual.register_buffer("packed", torch.ones(4, 4).to_mkldnn())
    digests = [weights_digest(packed).digest()]
    packed.visual.packed = torch.full((4, 4), 2.0).to_mkldnn()
    digests.append(weights_digest(packed).digest())
    assert digests[0] != digests[1]


def test_start_hashing_runs_in_the_background() -> None:
    weights = weights_digest(tiny_model())
    pending = weights.start_hashing()
    assert weights.start_hashing() is pending
    assert pending.result() == weights.digest()


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_towers_have_their_own_digests(mode: CpuQuantizationMode) -> None:
    """Prepacked weights are hashed by content, not only by class."""

    def digest(sign: int = 1, *, quantized: bool = True) -> bytes:
        model = tiny_model().to(torch.bfloat16)
        with torch.no_grad():
            model.visual.blocks[0].mlp.fc1.weight[3] *= sign
        if quantized:
            quantize(model, mode)
        return weights_digest(model).digest()

    assert digest() == digest()
    assert len({digest(), digest(-1), digest(quantized=False)}) == 3
