"""The decoder: norm, blocks and model equal their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qwen2vl.geometry import AttnMeta
from qwen2vl.model import KVCache, SequenceKVCaches
from qwen2vl.model.text import RMSNorm, TextMLP, TextModel
from tests.tiny import tiny_config, tiny_model

CONFIG = tiny_config().text


def text_model() -> TextModel:
    return tiny_model().model


def embeddings(tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, CONFIG.hidden_size, generator=generator)


def run(embeds_TD: torch.Tensor, lengths: list[int] | None = None) -> torch.Tensor:
    lengths = lengths or [len(embeds_TD)]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return text_model()(embeds_TD, positions.expand(3, -1), AttnMeta.build(lengths), None)


def test_rms_norm_scales_to_unit_mean_square() -> None:
    norm = RMSNorm(4, eps=0.5)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    got = norm(torch.tensor([[2.0, -2.0, 2.0, -2.0]]))
    expected = torch.tensor([[2.0, -4.0, 6.0, -8.0]]) / 4.5**0.5
    torch.testing.assert_close(got, expected)


def test_rms_norm_rounds_before_the_weight() -> None:
    # The reference's order of rounding; rounding once at the end differs in some elements.
    norm = RMSNorm(512, eps=1e-6).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    norm.weight.data = torch.randn(512, generator=generator).bfloat16()
    x_TD = torch.randn(16, 512, generator=generator).bfloat16()
    normed = x_TD.float() / (x_TD.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    rounded_at_the_end = (normed * norm.weight.float()).bfloat16()
    assert torch.equal(norm(x_TD), normed.bfloat16() * norm.weight)
    assert not torch.equal(norm(x_TD), rounded_at_the_end)


@torch.inference_mode()
def test_mlp_is_swiglu_gated_by_gate() -> None:
    mlp = TextMLP(CONFIG)
    x_TD = embeddings(3)
    gate, up = x_TD @ mlp.gate_proj.weight.T, x_TD @ mlp.up_proj.weight.T
    expected = (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x_TD), expected, rtol=1e-4, atol=1e-6)


def test_biases_are_where_qwen2_has_them() -> None:
    names = {name for name, _ in text_model().layers[0].named_parameters() if name.endswith("bias")}
    assert names == {f"self_attn.{x}_proj.bias" for x in "qkv"}


@torch.inference_mode()
def test_attention_is_causal() -> None:
    embeds_TD = embeddings(8)
    before = run(embeds_TD)
    embeds_TD[5] += 1.0
    changed = (run(embeds_TD) != before).any(dim=1)
    assert changed.tolist() == [False] * 5 + [True] * 3


@torch.inference_mode()
def test_packed_sequences_equal_each_alone() -> None:
    parts = [embeddings(n, seed=n) for n in (5, 1, 3, 3)]
    together = run(torch.cat(parts), [5, 1, 3, 3])
    torch.testing.assert_close(
        together, torch.cat([run(part) for part in parts]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("chunks", [[9], [4, 5], [1] * 9, [6, 1, 1, 1]])
@torch.inference_mode()
def test_the_kv_cache_does_not_change_the_output(chunks: list[int]) -> None:
    embeds_TD = embeddings(9)
    model, positions = text_model(), torch.arange(9).expand(3, -1)
    cache = KVCache.allocate(CONFIG, 12, torch.float32, "cpu")
    outs: list[torch.Tensor] = []
    for chunk in chunks:
        chunk_slice = slice(cache.length, cache.length + chunk)
        meta = AttnMeta.build([chunk], [chunk_slice.stop])
        outs.append(
            model(
                embeds_TD[chunk_slice],
                positions[:, chunk_slice],
                meta,
                SequenceKVCaches([cache], meta),
            )
        )
        assert cache.length == chunk_slice.stop
    torch.testing.assert_close(torch.cat(outs), run(embeds_TD), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_each_axis_of_the_positions_affects_the_output() -> None:
    embeds_TD, meta = embeddings(4), AttnMeta.build([4])
    position_ids = torch.arange(4).expand(3, 4)
    before = text_model()(embeds_TD, position_ids, meta, None)
    for axis in range(3):
        shifted_ids = position_ids.clone()
        shifted_ids[axis, 2] += 3
        changed = (text_model()(embeds_TD, shifted_ids, meta, None) != before).any(dim=1)
        assert changed.tolist() == [False, False, True, True]


@torch.inference_mode()
def test_one_block_equals_its_formula() -> None:
    """A block of one token: attention over a single key returns its value."""
    block: Any = text_model().layers[0]
    x_TD = embeddings(1)
    norm, attn = block.input_layernorm, block.self_attn
    values = F.linear(norm(x_TD), attn.v_proj.weight, attn.v_proj.bias).view(2, 16)
    repeated_values = values.repeat_interleave(2, dim=0).flatten()[
        None
    ]  # 2 query heads per key head
    after_attention = x_TD + repeated_values @ attn.o_proj.weight.T
    expected = after_attention + block.mlp(block.post_attention_layernorm(after_attention))
    cos_sin = (torch.ones(1, 8), torch.zeros(1, 8))
    torch.testing.assert_close(block(x_TD, cos_sin, AttnMeta.build([1]), None), expected)
