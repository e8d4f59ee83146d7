"""The words: norm, blocks and decoder, each against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qwen2vl.geometry import AttnMeta
from qwen2vl.model import KVCache
from qwen2vl.model.text import RMSNorm, TextMLP, TextModel
from tests.tiny import tiny_config, tiny_model

CONFIG = tiny_config().text


def decoder() -> TextModel:
    return tiny_model().model


def embeddings(tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, CONFIG.hidden_size, generator=generator)


def run(embeds_TD: torch.Tensor, lengths: list[int] | None = None) -> torch.Tensor:
    lengths = lengths or [len(embeds_TD)]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return decoder()(embeds_TD, positions.expand(3, -1), AttnMeta.build(lengths), None)


def test_norm_scales_to_unit_mean_square() -> None:
    norm = RMSNorm(4, eps=0.5)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    got = norm(torch.tensor([[2.0, -2.0, 2.0, -2.0]]))
    want = torch.tensor([[2.0, -4.0, 6.0, -8.0]]) / 4.5**0.5
    torch.testing.assert_close(got, want)


def test_norm_rounds_before_the_weight() -> None:
    # The reference's order of rounding; rounding once at the end would differ in some places.
    norm = RMSNorm(512, eps=1e-6).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    norm.weight.data = torch.randn(512, generator=generator).bfloat16()
    x_TD = torch.randn(16, 512, generator=generator).bfloat16()
    unit = x_TD.float() / (x_TD.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    late = (unit * norm.weight.float()).bfloat16()
    assert torch.equal(norm(x_TD), unit.bfloat16() * norm.weight)
    assert not torch.equal(norm(x_TD), late)


@torch.inference_mode()
def test_mlp_is_swiglu_gated_by_gate() -> None:
    mlp = TextMLP(CONFIG)
    x_TD = embeddings(3)
    gate, up = x_TD @ mlp.gate_proj.weight.T, x_TD @ mlp.up_proj.weight.T
    want = (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x_TD), want, rtol=1e-4, atol=1e-6)


def test_biases_are_where_qwen2_has_them() -> None:
    names = {name for name, _ in decoder().layers[0].named_parameters() if name.endswith("bias")}
    assert names == {f"self_attn.{x}_proj.bias" for x in "qkv"}


@torch.inference_mode()
def test_a_token_never_sees_the_future() -> None:
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
def test_a_cache_changes_nothing(chunks: list[int]) -> None:
    embeds_TD = embeddings(9)
    model, positions = decoder(), torch.arange(9).expand(3, -1)
    cache = KVCache.allocate(CONFIG, 12, torch.float32, "cpu")
    outs: list[torch.Tensor] = []
    for chunk in chunks:
        here = slice(cache.length, cache.length + chunk)
        meta = AttnMeta.build([chunk], [here.stop])
        outs.append(model(embeds_TD[here], positions[:, here], meta, [cache]))
        assert cache.length == here.stop
    torch.testing.assert_close(torch.cat(outs), run(embeds_TD), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_each_axis_of_the_positions_matters() -> None:
    embeds_TD, meta = embeddings(4), AttnMeta.build([4])
    plain = torch.arange(4).expand(3, 4)
    before = decoder()(embeds_TD, plain, meta, None)
    for axis in range(3):
        moved = plain.clone()
        moved[axis, 2] += 3
        changed = (decoder()(embeds_TD, moved, meta, None) != before).any(dim=1)
        assert changed.tolist() == [False, False, True, True]


@torch.inference_mode()
def test_one_block_written_out() -> None:
    """A block of one token: attention of a single key is its value."""
    block: Any = decoder().layers[0]
    x_TD = embeddings(1)
    norm, attn = block.input_layernorm, block.self_attn
    values = F.linear(norm(x_TD), attn.v_proj.weight, attn.v_proj.bias).view(2, 16)
    shared = values.repeat_interleave(2, dim=0).flatten()[None]  # 2 query heads a key head
    middle = x_TD + shared @ attn.o_proj.weight.T
    want = middle + block.mlp(block.post_attention_layernorm(middle))
    rotation = (torch.ones(1, 8), torch.zeros(1, 8))
    torch.testing.assert_close(block(x_TD, rotation, AttnMeta.build([1]), None), want)
