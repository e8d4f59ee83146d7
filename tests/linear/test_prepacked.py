"""Packed layers multiply by the very matrix they were given; small layers and names stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import nn

from qwen2vl.engine import LLM
from qwen2vl.geometry import AttnMeta
from qwen2vl.linear import prepacked as room
from qwen2vl.linear.fused import siblings
from qwen2vl.linear.gemv import multiply_single_rows
from qwen2vl.linear.prepacked import PackedLinear, can_pack, pack_layers
from tests.tiny import tiny_config, tiny_model

pytestmark = pytest.mark.skipif(not can_pack(), reason="no AVX-512, so nothing is packed")


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
def test_products_are_those_of_the_plain_layer(
    outputs: int, inputs: int, rows: int, bias: bool
) -> None:
    plain = layer(outputs, inputs, bias=bias)
    packed = PackedLinear(plain.weight, plain.bias)
    assert torch.equal(packed.unpacked(), plain.weight)
    x_TI = torch.randn(rows, inputs, dtype=torch.bfloat16)
    with torch.inference_mode():
        got, want = packed(x_TI), plain.double()(x_TI.double())
    assert got.dtype == torch.bfloat16
    # One rounding to 8 bits of a sum in float32.
    assert (got.double() - want).abs().max() <= 2**-8 * want.abs().max() + 1e-6


def test_rows_may_be_columns_of_something_wider() -> None:
    plain = layer(64, 96, bias=True)
    packed = PackedLinear(plain.weight, plain.bias)
    wide = torch.randn(5, 200, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(packed(wide[:, 50:146]), packed(wide[:, 50:146].contiguous()))


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_packed(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=tied)).bfloat16()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    limit = sorted(m.weight.numel() for m in layers.values())[len(layers) // 2]
    read_T = torch.arange(5)
    meta = AttnMeta.build([5])
    hidden_TD = torch.randn(3, model.config.text.hidden_size, dtype=torch.bfloat16)
    with torch.inference_mode():
        want_TV = model.logits(hidden_TD)
        want_TD = model(read_T, read_T.expand(3, -1), meta)
    embedding = model.model.embed_tokens.weight
    monkeypatch.setattr(room, "LARGE", limit)
    pack_layers(model)
    multiply_single_rows(model)  # takes what is left
    changed = {name for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    want = set()
    for names, _ in siblings(dict.fromkeys(layers, 0)):
        total = sum(layers[name].weight.numel() for name in names)
        if total >= limit and not names[0].endswith("down_proj"):
            want.add(names[0] + ".layer" * (len(names) > 1))
    assert any(name.endswith(".layer") for name in want)
    assert changed == want | ({"lm_head"} if tied and embedding.numel() >= limit else set())
    assert {name.partition(".")[0] for name in changed} >= {"visual", "model"}
    assert model.model.embed_tokens.weight is embedding
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(hidden_TD), want_TV)
        got_TD = model(read_T, read_T.expand(3, -1), meta)
    assert (got_TD.float() - want_TD.float()).norm() < 2e-2 * want_TD.float().norm()


def test_an_llm_over_packed_layers_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LARGE", 2**12)
    llm = LLM("nano", dtype="bfloat16")
    assert sum(isinstance(m, PackedLinear) for m in llm.model.modules()) > 20
    picture = Image.new("RGB", (84, 84), "white")
    ImageDraw.Draw(picture).ellipse((22, 22, 62, 62), fill="red")
    content = [{"image": picture}, {"text": "What color is the shape?"}]
    for _ in range(2):  # the second time from the cache
        (answer,) = llm.chat([{"role": "user", "content": content}])
        assert answer.text == "red"
