"""Activation checkpointing: same bits, less memory, unchanged parameter names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.attention.varlen  # registers the varlen kernel in torch.ops
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from qwen2vl.model import Qwen2VL
from qwen2vl.parallel.activation_checkpointing import (
    CheckpointingMode,
    _selective_policy,
    apply_activation_checkpointing,
)
from qwen2vl.train.loss import token_loss
from tests.parallel.training_jobs import MIXED, pack_conversations
from tests.tiny import tiny_model


def gradients(dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Tensor]:
    model = tiny_model(0).requires_grad_(True)
    apply_activation_checkpointing(model, **options)
    batch = pack_conversations(MIXED)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden_TD = batch.forward(model)
        output = token_loss(hidden_TD, model.lm_head_weight, batch, 1.0)
    output.loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"visual": "full", "text": "none"},
        {"visual": "none", "text": "full"},
        {"visual": "selective", "text": "selective"},
        {"visual": "full", "text": "full", "every_n_blocks": 2},
    ],
    ids=str,
)
def test_gradients_are_bit_identical(options: dict[str, Any], dtype: torch.dtype) -> None:
    plain = gradients(dtype, visual="none", text="none")
    recomputed = gradients(dtype, **options)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name


def saved_bytes(visual: CheckpointingMode, text: CheckpointingMode, every_n_blocks: int = 1) -> int:
    """Sum the bytes that a forward saves for its backward, each storage once."""
    model = tiny_model(0).requires_grad_(True)
    apply_activation_checkpointing(model, visual=visual, text=text, every_n_blocks=every_n_blocks)
    parameter_storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        keep_alive.append(tensor)
        return tensor

    keep_alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        pack_conversations(MIXED).forward(model)
    return sum(size for address, size in storages.items() if address not in parameter_storages)


def test_more_checkpointing_saves_fewer_bytes() -> None:
    no_checkpointing, every_second = (
        saved_bytes("none", "none"),
        saved_bytes("full", "full", every_n_blocks=2),
    )
    full = saved_bytes("full", "full")
    assert full < every_second < no_checkpointing
    assert full < 0.3 * no_checkpointing


def test_parameter_names_do_not_change() -> None:
    plain, wrapped = tiny_model(0), tiny_model(0)
    apply_activation_checkpointing(wrapped, visual="full", text="selective")
    assert list(plain.state_dict()) == list(wrapped.state_dict())


def count_calls(model: Qwen2VL, text: CheckpointingMode) -> dict[str, int]:
    """Count the operators of a forward and backward, by name."""
    counts: dict[str, int] = {}

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = str(func).split(".")[1]
            counts[name] = counts.get(name, 0) + 1
            return func(*args, **(kwargs or {}))

    apply_activation_checkpointing(model, visual="none", text=text)
    with Counter():
        pack_conversations((0,)).forward(model).sum().backward()
    return counts


def test_selective_checkpointing_does_not_recompute_attention_or_narrow_matmuls() -> None:
    layers = len(tiny_model(0).model.layers)
    counts = {
        mode: count_calls(tiny_model(0).requires_grad_(True), mode)
        for mode in ("none", "selective", "full")
    }
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert counts["selective"][attention] == counts["none"][attention]
    assert counts["full"][attention] == counts["none"][attention] + layers
    products = {
        mode: mode_counts["mm"] + mode_counts["addmm"] for mode, mode_counts in counts.items()
    }
    # gate and up are wider than their input, so only these are recomputed.
    assert products["selective"] == products["none"] + 2 * layers
    # The last matmul of a block is not recomputed: its output is not saved for the backward.
    assert products["full"] > products["selective"]


def test_selective_checkpointing_does_not_recompute_varlen_attention() -> None:
    operator = torch.ops.torch_attn._varlen_attn.default
    assert _selective_policy(None, operator) is CheckpointPolicy.MUST_SAVE
