"""FLOPs of vision tower and decoder, exactly: of training batches (MFU, HFU) and prompts (TTFT).

A matmul of (rows, inputs) with (inputs, outputs) is 2 * rows * inputs * outputs FLOPs; its backward
is as many for the gradient of the inputs, if anything before them is trainable, and as many for the
gradient of the weight, if that is trainable. Attention is counted per pair of tokens that attend to
each other: in the tower those of one frame pair, in the decoder the causal half. Nothing else is
counted, as is usual (norms, activations and rotary embeddings are memory-bound).
`build_flop_counter` traverses a model once, with its adapters and trainable parameters; a batch is
then counted from six integers on the host. torch.utils.flop_counter agrees exactly where it counts
the same pairs (tests). (MFU, HFU: PaLM, arXiv 2204.02311, App. B.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.lora.layers import LoraLinear
from qwen2vl.model import Qwen2VL, meta_model
from qwen2vl.parallel.activation_checkpointing import CheckpointingMode

__all__ = [
    "PEAK_TFLOPS",
    "BatchCounts",
    "FlopCounter",
    "Flops",
    "UnitCost",
    "build_flop_counter",
    "inference_flop_counter",
    "peak_flops",
]

# Published dense bfloat16 TFLOP/s of one device, by a part of its name; the first match wins.
PEAK_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("A100", 312.0),
)


class UnitCost(NamedTuple):
    """FLOPs of one unit: a patch, a token, a pair of them, or a target."""

    forward: int = 0
    backward: int = 0
    recompute: int = 0  # the second forward of activation checkpointing

    def __add__(self, other: tuple[object, ...]) -> UnitCost:
        """Add elementwise."""
        assert isinstance(other, UnitCost)
        return UnitCost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: int) -> UnitCost:
        """Multiply elementwise by `count`."""
        return UnitCost(*(count * flops for flops in self))

    def with_recompute(self, enabled: bool) -> UnitCost:
        """Return itself if `enabled`, else without the second forward."""
        return self if enabled else self._replace(recompute=0)


class BatchCounts(NamedTuple):
    """The sizes of a batch, or of a prompt, that determine its FLOPs."""

    num_patches: int
    num_patch_pairs: int  # sum of squares of the patches of each frame pair
    num_tokens: int  # with up to seven of padding for each conversation
    num_token_pairs: int  # sum of squares of the conversations' lengths
    num_masked_pairs: int  # of those, above the diagonal: excluded by causality
    num_targets: int

    @classmethod
    def from_lengths(
        cls, frames: Sequence[int], lengths: Sequence[int], num_targets: int = 0
    ) -> BatchCounts:
        """Count from the patches of each frame pair and the tokens of each conversation."""
        return cls(
            num_patches=sum(frames),
            num_patch_pairs=sum(n * n for n in frames),
            num_tokens=sum(lengths),
            num_token_pairs=sum(n * n for n in lengths),
            num_masked_pairs=sum(n * (n - 1) // 2 for n in lengths),
            num_targets=num_targets,
        )


class Flops(NamedTuple):
    """FLOPs of one forward and backward."""

    model: int  # without recomputation: MFU counts these
    recompute: int  # of activation checkpointing: HFU counts these too


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopCounter:
    """FLOPs per unit of a model, for its current trainable parameters."""

    patch: UnitCost
    patch_pair: UnitCost
    token: UnitCost
    token_pair: UnitCost
    target: UnitCost

    def count(self, counts: BatchCounts, *, causal: bool = True) -> Flops:
        """Count FLOPs; `causal` False counts all pairs, as kernels without causal skipping do."""
        num_pairs = counts.num_token_pairs - (counts.num_masked_pairs if causal else 0)
        total = (
            self.patch.times(counts.num_patches)
            + self.patch_pair.times(counts.num_patch_pairs)
            + self.token.times(counts.num_tokens)
            + self.token_pair.times(num_pairs)
            + self.target.times(counts.num_targets)
        )
        return Flops(total.forward + total.backward, total.recompute)


def build_flop_counter(
    model: Qwen2VL,
    *,
    visual: CheckpointingMode = "none",
    text: CheckpointingMode = "none",
    every_n_blocks: int = 1,
) -> FlopCounter:
    """Traverse `model` in the order of its forward, tracking where gradients flow.

    Args:
        model: of nn.Linear and LoraLinear layers, with requires_grad set as in training.
        visual: activation checkpointing, as given to `apply_activation_checkpointing`.
        text: the same of the decoder.
        every_n_blocks: the same of both.
    """
    patch, patch_pair, has_grad = _vision_tower(model, visual, every_n_blocks)
    has_grad = has_grad or model.model.embed_tokens.weight.requires_grad
    token, token_pair, has_grad = _decoder(model, text, every_n_blocks, has_grad)
    head = model.lm_head_weight
    return FlopCounter(
        patch=patch,
        patch_pair=patch_pair,
        token=token,
        token_pair=token_pair,
        target=_matmul(head.numel(), has_grad, head.requires_grad).with_recompute(False),
    )


@lru_cache(maxsize=8)
def inference_flop_counter(config: Qwen2VLConfig) -> FlopCounter:
    """Build the counter of a model of this config without gradients."""
    model = meta_model(config)
    return build_flop_counter(model.requires_grad_(False))


def peak_flops(device: torch.device, tflops: float = 0.0) -> float | None:
    """Return the peak FLOP/s of `device`: `tflops` if given, else PEAK_TFLOPS, else None."""
    if tflops:
        return tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for name_part, peak in PEAK_TFLOPS if name_part in name), None)


def _vision_tower(
    model: Qwen2VL, checkpointing: CheckpointingMode, every_n_blocks: int
) -> tuple[UnitCost, UnitCost, bool]:
    """Return the cost of a patch and of a pair, and whether vision tokens require a gradient."""
    tower = model.visual
    proj = tower.patch_embed.proj.weight
    has_grad = proj.requires_grad
    patch, pair = _matmul(proj.numel(), False, has_grad).with_recompute(False), UnitCost()
    for index, block in enumerate(tower.blocks):
        mode = checkpointing if index % every_n_blocks == 0 else "none"
        token_cost, pair_cost, has_grad = _vision_block(block, has_grad, mode)
        patch, pair = patch + token_cost, pair + pair_cost
    fc1, has_grad = _linear(
        cast("nn.Linear", tower.merger.mlp[0]), _norm(tower.merger.ln_q, has_grad)
    )
    fc2, has_grad = _linear(cast("nn.Linear", tower.merger.mlp[2]), has_grad)
    merged, merge_size = (fc1 + fc2).with_recompute(False), tower.config.spatial_merge_size
    return patch + UnitCost(*(flops // merge_size**2 for flops in merged)), pair, has_grad


def _decoder(
    model: Qwen2VL, checkpointing: CheckpointingMode, every_n_blocks: int, has_grad: bool
) -> tuple[UnitCost, UnitCost, bool]:
    """Return the cost of a token and of a pair, and whether hidden states require a gradient."""
    token, pair = UnitCost(), UnitCost()
    for index, block in enumerate(model.model.layers):
        mode = checkpointing if index % every_n_blocks == 0 else "none"
        token_cost, pair_cost, has_grad = _text_block(block, has_grad, mode)
        token, pair = token + token_cost, pair + pair_cost
    return token, pair, _norm(model.model.norm, has_grad)


def _vision_block(block: Any, has_grad: bool, mode: str) -> tuple[UnitCost, UnitCost, bool]:
    qkv, qkv_has_grad = _linear(block.attn.qkv, _norm(block.norm1, has_grad))
    attention = _attention(block.attn.proj.in_features, qkv_has_grad, qkv_has_grad, qkv_has_grad)
    out, out_has_grad = _linear(block.attn.proj, qkv_has_grad)
    has_grad = has_grad or out_has_grad
    fc1, up_has_grad = _linear(block.mlp.fc1, _norm(block.norm2, has_grad))
    fc2, down_has_grad = _linear(block.mlp.fc2, up_has_grad, is_last=True)
    return *_block_cost(mode, (qkv, fc1), (out, fc2), attention), has_grad or down_has_grad


def _text_block(block: Any, has_grad: bool, mode: str) -> tuple[UnitCost, UnitCost, bool]:
    attn, mlp = block.self_attn, block.mlp
    input_has_grad = _norm(block.input_layernorm, has_grad)
    (q, q_has_grad), (k, k_has_grad), (v, v_has_grad) = (
        _linear(layer, input_has_grad) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    attention = _attention(attn.o_proj.in_features, q_has_grad, k_has_grad, v_has_grad)
    out, out_has_grad = _linear(attn.o_proj, q_has_grad or k_has_grad or v_has_grad)
    has_grad = has_grad or out_has_grad
    input_has_grad = _norm(block.post_attention_layernorm, has_grad)
    (gate, gate_has_grad), (up, up_has_grad) = (
        _linear(x, input_has_grad) for x in (mlp.gate_proj, mlp.up_proj)
    )
    down, down_has_grad = _linear(mlp.down_proj, gate_has_grad or up_has_grad, is_last=True)
    return *_block_cost(
        mode, (gate, up), (q, k, v, out, down), attention
    ), has_grad or down_has_grad


def _block_cost(
    mode: str,
    recomputed_products: Iterable[UnitCost],
    saved_products: Iterable[UnitCost],
    attention: UnitCost,
) -> tuple[UnitCost, UnitCost]:
    """Sum a block; selective checkpointing saves attention and the narrow matmuls."""
    is_full = mode == "full"
    token_cost = sum(recomputed_products, UnitCost()).with_recompute(mode != "none")
    token_cost += sum(saved_products, UnitCost()).with_recompute(is_full)
    if not token_cost.backward:
        token_cost, attention = token_cost.with_recompute(False), attention.with_recompute(False)
    return token_cost, attention.with_recompute(is_full)


def _linear(layer: nn.Linear, has_grad: bool, *, is_last: bool = False) -> tuple[UnitCost, bool]:
    """Return the cost of one row, and whether the output requires a gradient.

    `is_last`: the last matmul of a block is not recomputed, since recomputation stops as soon as
    the backward has all the tensors it needs, and the output of the block is none of them.
    """
    num_weights = layer.in_features * layer.out_features
    is_trainable = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    weight = cast("nn.Parameter | None", layer.weight)  # None: stored as NF4
    cost = _matmul(num_weights, has_grad, weight is not None and weight.requires_grad)
    if not isinstance(layer, LoraLinear):
        return cost.with_recompute(False) if is_last else cost, has_grad or is_trainable
    a_RX, b_YR = layer.lora_A, layer.lora_B
    a_cost = _matmul(a_RX.numel(), has_grad, a_RX.requires_grad)
    b_cost = _matmul(b_YR.numel(), has_grad or a_RX.requires_grad, b_YR.requires_grad)
    return cost + a_cost + (
        b_cost.with_recompute(False) if is_last else b_cost
    ), has_grad or is_trainable


def _matmul(num_weights: int, has_grad: bool, is_trainable: bool) -> UnitCost:
    """Return the cost of one row times a matrix of `num_weights`."""
    return UnitCost(2 * num_weights, 2 * num_weights * (has_grad + is_trainable), 2 * num_weights)


def _attention(width: int, q_has_grad: bool, k_has_grad: bool, v_has_grad: bool) -> UnitCost:
    """Return the cost of one pair over all heads: scores, weighted sum, and their backward."""
    num_products = q_has_grad + k_has_grad + v_has_grad + (q_has_grad or k_has_grad)
    return UnitCost(4 * width, 2 * width * num_products, 4 * width)


def _norm(norm: nn.Module, has_grad: bool) -> bool:
    return has_grad or any(parameter.requires_grad for parameter in norm.parameters())
