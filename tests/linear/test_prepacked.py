"""Prepacked layers compute with the matrix they were given; small layers are not replaced."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import nn

from qwen2vl.engine import LLM
from qwen2vl.geometry import AttnMeta
from qwen2vl.linear import prepacked
from qwen2vl.linear.cpu.library import VARIABLE, load_kernels
from qwen2vl.linear.fused import fusion_groups
from qwen2vl.linear.kernel_linear import use_kernels
from qwen2vl.linear.prepacked import PrepackedLinear, can_prepack, prepack_layers
from tests.tiny import tiny_config, tiny_model

pytestmark = pytest.mark.skipif(not can_prepack(), reason="no AVX-512, so nothing is prepacked")


def layer(outputs: int, inputs: int, *, bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)


@given(
    outputs=st.integers(1, 300),
    inputs=st.integers(1, 300),
    rows=st.sampled_from([1, 2, 3, 8, 33, 200]),
    bias=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_product_equals_that_of_the_plain_layer(
    outputs: int, inputs: int, rows: int, bias: bool
) -> None:
    plain = layer(outputs, inputs, bias=bias)
    prepacked_layer = PrepackedLinear(plain.weight, plain.bias)
    assert torch.equal(prepacked_layer.dense_weight(), plain.weight)
    x_TI = torch.randn(rows, inputs, dtype=torch.bfloat16)
    with torch.inference_mode():
        got, want = prepacked_layer(x_TI), plain.double()(x_TI.double())
    assert got.dtype == torch.bfloat16
    # One rounding to 8 bits of a sum in float32.
    assert (got.double() - want).abs().max() <= 2**-8 * want.abs().max() + 1e-6


def test_input_may_be_a_column_slice() -> None:
    plain = layer(64, 96, bias=True)
    prepacked_layer = PrepackedLinear(plain.weight, plain.bias)
    wide = torch.randn(5, 200, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(
            prepacked_layer(wide[:, 50:146]), prepacked_layer(wide[:, 50:146].contiguous())
        )


@pytest.mark.parametrize("tied", [True, False])
def test_which_layers_are_prepacked(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=tied)).bfloat16()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    limit = sorted(m.weight.numel() for m in layers.values())[len(layers) // 2]
    ids_T = torch.arange(5)
    meta = AttnMeta.build([5])
    hidden_TD = torch.randn(3, model.config.text.hidden_size, dtype=torch.bfloat16)
    with torch.inference_mode():
        want_TV = model.logits(hidden_TD)
        want_TD = model(ids_T, ids_T.expand(3, -1), meta)
    embedding = model.model.embed_tokens.weight
    monkeypatch.setattr(prepacked, "MIN_PREPACK_NUMEL", limit)
    prepack_layers(model)
    use_kernels(model)  # replaces the remaining nn.Linear layers
    replaced = {name for name, m in model.named_modules() if isinstance(m, PrepackedLinear)}
    want = set()
    for names, _ in fusion_groups(dict.fromkeys(layers, 0)):
        total = sum(layers[name].weight.numel() for name in names)
        if total >= limit and not names[0].endswith("down_proj"):
            want.add(names[0] + ".layer" * (len(names) > 1))
    assert any(name.endswith(".layer") for name in want)
    assert replaced == want | ({"lm_head"} if tied and embedding.numel() >= limit else set())
    assert {name.partition(".")[0] for name in replaced} >= {"visual", "model"}
    assert model.model.embed_tokens.weight is embedding
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(hidden_TD), want_TV)
        got_TD = model(ids_T, ids_T.expand(3, -1), meta)
    assert (got_TD.float() - want_TD.float()).norm() < 2e-2 * want_TD.float().norm()


@pytest.mark.parametrize("kernels", ["off", "avx512"])
def test_llm_with_prepacked_layers_answers(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    monkeypatch.setenv(VARIABLE, kernels)
    monkeypatch.setattr(prepacked, "MIN_PREPACK_NUMEL", 2**12)
    llm = LLM("nano", dtype="bfloat16")
    replaced = [n for n, m in llm.model.named_modules() if isinstance(m, PrepackedLinear)]
    assert any(name.startswith("visual.") for name in replaced)
    has_kernels = load_kernels() is not None
    assert any(name.startswith("model.") for name in replaced) != has_kernels
    image = Image.new("RGB", (84, 84), "white")
    ImageDraw.Draw(image).ellipse((22, 22, 62, 62), fill="red")
    content = [{"image": image}, {"text": "What color is the shape?"}]
    for _ in range(2):  # the second time from the encoder cache
        (answer,) = llm.chat([{"role": "user", "content": content}])
        assert answer.text == "red"
