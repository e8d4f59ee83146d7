"""What a batch costs in arithmetic, exactly: both towers, who is frozen, what is computed twice.

A product of (rows, inputs) with (inputs, outputs) is 2 * rows * inputs * outputs operations; its
backward is as much again for the inputs, if anything before them learns, and as much again for the
weight, if it learns. Attention is counted for each pair of tokens that may see each other: in the
tower those of one frame pair, in the decoder the causal half. Nothing else is counted, as is usual
(norms, activations and rotations are bound by memory). `costs` walks through a model once a stage;
a batch is then priced by six integers of the host. torch.utils.flop_counter agrees to the last
operation where it sees the same squares (tests). (MFU, HFU: PaLM, arXiv 2204.02311, App. B.)
Next room: metrics.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from qwen2vl.lora.layers import LoraLinear
from qwen2vl.model import Qwen2VL
from qwen2vl.train.config import RecomputeConfig
from qwen2vl.train.loader.batch import Batch

__all__ = ["PEAKS", "Costs", "Flops", "Price", "Work", "costs", "peak_of"]

# Published dense bfloat16 TFLOP/s of one device, by a part of its name; the first match wins.
PEAKS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("A100", 312.0),
)

NOTHING_AGAIN = RecomputeConfig()


class Price(NamedTuple):
    """Operations for one unit of something."""

    forward: int = 0
    backward: int = 0
    again: int = 0  # a second forward, for the backward (activation checkpointing)

    def __add__(self, other: tuple[object, ...]) -> Price:
        """Add up part by part."""
        assert isinstance(other, Price)
        return Price(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: int) -> Price:
        """Multiply every part."""
        return Price(*(count * part for part in self))

    def where_again(self, recomputed: bool) -> Price:
        """Keep or drop the second forward."""
        return self if recomputed else self._replace(again=0)


class Work(NamedTuple):
    """A batch, as far as arithmetic sees it."""

    patches: int
    patch_pairs: int  # squares of the frame pairs' patches
    tokens: int  # with the up to seven by which each conversation is rounded up
    token_pairs: int  # squares of the conversations' lengths
    future_pairs: int  # of those, what causality forbids: the triangle above the diagonal
    targets: int

    @classmethod
    def of(cls, batch: Batch) -> Work:
        """Read the sizes of a batch; all of them are on the host."""
        frames, lengths = batch.vision_meta.frames.lengths_q, batch.meta.lengths_q
        return cls(
            patches=sum(frames),
            patch_pairs=sum(n * n for n in frames),
            tokens=sum(lengths),
            token_pairs=sum(n * n for n in lengths),
            future_pairs=sum(n * (n - 1) // 2 for n in lengths),
            targets=len(batch.targets_R),
        )


class Flops(NamedTuple):
    """Operations of one forward and backward."""

    model: int  # what the mathematics asks for: MFU counts these
    again: int  # what is computed twice to save memory: HFU counts these too


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Prices of a model in its present freezing."""

    patch: Price
    patch_pair: Price
    token: Price
    token_pair: Price
    target: Price

    def of_batch(self, batch: Batch) -> Flops:
        """Price a batch as the mathematics asks for it."""
        return self.of(Work.of(batch))

    def of(self, work: Work, *, causal: bool = True) -> Flops:
        """Price a batch; with causal=False as kernels do that compute whole squares."""
        pairs = work.token_pairs - (work.future_pairs if causal else 0)
        total = (
            self.patch.times(work.patches)
            + self.patch_pair.times(work.patch_pairs)
            + self.token.times(work.tokens)
            + self.token_pair.times(pairs)
            + self.target.times(work.targets)
        )
        return Flops(total.forward + total.backward, total.again)


def costs(model: Qwen2VL, recompute: RecomputeConfig = NOTHING_AGAIN) -> Costs:
    """Walk through `model` as its forward does, and see where gradients flow.

    Args:
        model: its parameters' requires_grad says who learns.
        recompute: as given to parallel.recompute.
    """
    patch, patch_pair, live = _tower(model, recompute)
    live = live or model.model.embed_tokens.weight.requires_grad
    token, token_pair, live = _decoder(model, recompute, live)
    head = model.head_weight
    return Costs(
        patch=patch,
        patch_pair=patch_pair,
        token=token,
        token_pair=token_pair,
        target=_product(head.numel(), live, head.requires_grad).where_again(False),
    )


def peak_of(device: torch.device, tflops: float = 0.0) -> float | None:
    """Give the operations a second that `device` is sold for: `tflops`, or the table's, or None."""
    if tflops:
        return tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAKS if part in name), None)


def _tower(model: Qwen2VL, recompute: RecomputeConfig) -> tuple[Price, Price, bool]:
    """Price a patch and a pair of patches, and say whether vision tokens carry a gradient."""
    tower = model.visual
    proj = tower.patch_embed.proj.weight
    live = proj.requires_grad
    patch, pair = _product(proj.numel(), False, live).where_again(False), Price()
    for index, block in enumerate(tower.blocks):
        mode = recompute.visual if index % recompute.every == 0 else "none"
        row, square, live = _vision_block(block, live, mode)
        patch, pair = patch + row, pair + square
    one, live = _linear(cast("nn.Linear", tower.merger.mlp[0]), _norm(tower.merger.ln_q, live))
    two, live = _linear(cast("nn.Linear", tower.merger.mlp[2]), live)
    merged, side = (one + two).where_again(False), tower.config.spatial_merge_size
    return patch + Price(*(part // side**2 for part in merged)), pair, live


def _decoder(model: Qwen2VL, recompute: RecomputeConfig, live: bool) -> tuple[Price, Price, bool]:
    """Price a token and a pair of tokens, and say whether hidden states carry a gradient."""
    token, pair = Price(), Price()
    for index, block in enumerate(model.model.layers):
        mode = recompute.text if index % recompute.every == 0 else "none"
        row, square, live = _text_block(block, live, mode)
        token, pair = token + row, pair + square
    return token, pair, _norm(model.model.norm, live)


def _vision_block(block: Any, live: bool, mode: str) -> tuple[Price, Price, bool]:
    qkv, qkv_live = _linear(block.attn.qkv, _norm(block.norm1, live))
    attention = _attention(block.attn.proj.in_features, qkv_live, qkv_live, qkv_live)
    out, out_live = _linear(block.attn.proj, qkv_live)
    live = live or out_live
    fc1, up_live = _linear(block.mlp.fc1, _norm(block.norm2, live))
    fc2, down_live = _linear(block.mlp.fc2, up_live, last=True)
    return *_price_block(mode, (qkv, fc1), (out, fc2), attention), live or down_live


def _text_block(block: Any, live: bool, mode: str) -> tuple[Price, Price, bool]:
    attn, mlp = block.self_attn, block.mlp
    normed = _norm(block.input_layernorm, live)
    (q, q_live), (k, k_live), (v, v_live) = (
        _linear(layer, normed) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    attention = _attention(attn.o_proj.in_features, q_live, k_live, v_live)
    out, out_live = _linear(attn.o_proj, q_live or k_live or v_live)
    live = live or out_live
    normed = _norm(block.post_attention_layernorm, live)
    (gate, gate_live), (up, up_live) = (_linear(x, normed) for x in (mlp.gate_proj, mlp.up_proj))
    down, down_live = _linear(mlp.down_proj, gate_live or up_live, last=True)
    return *_price_block(mode, (gate, up), (q, k, v, out, down), attention), live or down_live


def _price_block(
    mode: str, wide: Iterable[Price], narrow: Iterable[Price], attention: Price
) -> tuple[Price, Price]:
    """Add a block up: selective keeps attention, and products no wider than their input."""
    whole = mode == "block"
    row = sum(wide, Price()).where_again(mode != "none")
    row += sum(narrow, Price()).where_again(whole)
    if not row.backward:
        row, attention = row.where_again(False), attention.where_again(False)
    return row, attention.where_again(whole)


def _linear(layer: nn.Linear, live: bool, *, last: bool = False) -> tuple[Price, bool]:
    """Price one row, and say whether the output carries a gradient.

    `last`: of a block. Computing again stops as soon as the backward has all it needs, and the
    result of the last product is not among it.
    """
    size = layer.in_features * layer.out_features
    learns = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    weight = cast("nn.Parameter | None", layer.weight)  # None where it is stored in 4 bits
    price = _product(size, live, weight is not None and weight.requires_grad)
    if not isinstance(layer, LoraLinear):
        return price.where_again(False) if last else price, live or learns
    a_RX, b_YR = layer.lora_A, layer.lora_B
    first = _product(a_RX.numel(), live, a_RX.requires_grad)
    second = _product(b_YR.numel(), live or a_RX.requires_grad, b_YR.requires_grad)
    return price + first + (second.where_again(False) if last else second), live or learns


def _product(size: int, live: bool, learns: bool) -> Price:
    """Price one row against a matrix of `size` numbers."""
    return Price(2 * size, 2 * size * (live + learns), 2 * size)


def _attention(width: int, q_live: bool, k_live: bool, v_live: bool) -> Price:
    """Price one pair over all heads: scores and sums, and what the backward needs of them."""
    products = q_live + k_live + v_live + (q_live or k_live)
    return Price(4 * width, 2 * width * products, 4 * width)


def _norm(norm: nn.Module, live: bool) -> bool:
    return live or any(parameter.requires_grad for parameter in norm.parameters())
