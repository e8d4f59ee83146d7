"""What is computed again has the same bits, takes less memory, and keeps every name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.attention.varlen  # makes the packed kernel known to torch.ops
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from qwen2vl.model import Qwen2VL
from qwen2vl.parallel.activation_checkpointing import Mode, _choose, recompute
from qwen2vl.train.loss import token_loss
from tests.parallel.jobs import MIXED, packed
from tests.tiny import tiny_model


def gradients(dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Tensor]:
    model = tiny_model(0).requires_grad_(True)
    recompute(model, **options)
    batch = packed(MIXED)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden_TD = batch.run(model)
        outcome = token_loss(hidden_TD, model.head_weight, batch, 1.0)
    outcome.loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"visual": "block", "text": "none"},
        {"visual": "none", "text": "block"},
        {"visual": "selective", "text": "selective"},
        {"visual": "block", "text": "block", "every": 2},
    ],
    ids=str,
)
def test_gradients_keep_their_bits(options: dict[str, Any], dtype: torch.dtype) -> None:
    plain = gradients(dtype, visual="none", text="none")
    again = gradients(dtype, **options)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name


def kept_bytes(visual: Mode, text: Mode, every: int = 1) -> int:
    """Count what a forward leaves behind for its backward, each memory once."""
    model = tiny_model(0).requires_grad_(True)
    recompute(model, visual=visual, text=text, every=every)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        packed(MIXED).run(model)
    return sum(size for place, size in held.items() if place not in own)


def test_the_more_is_computed_again_the_less_is_kept() -> None:
    none, half = kept_bytes("none", "none"), kept_bytes("block", "block", every=2)
    block = kept_bytes("block", "block")
    assert block < half < none
    assert block < 0.3 * none


def test_names_stay() -> None:
    plain, wrapped = tiny_model(0), tiny_model(0)
    recompute(wrapped, visual="block", text="selective")
    assert list(plain.state_dict()) == list(wrapped.state_dict())


def count_calls(model: Qwen2VL, text: Mode) -> dict[str, int]:
    """Count the kernels of one language block's forward and backward."""
    counts: dict[str, int] = {}

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = str(func).split(".")[1]
            counts[name] = counts.get(name, 0) + 1
            return func(*args, **(kwargs or {}))

    recompute(model, visual="none", text=text)
    with Counter():
        packed((0,)).run(model).sum().backward()
    return counts


def test_a_selective_block_does_not_repeat_attention_nor_narrow_products() -> None:
    layers = len(tiny_model(0).model.layers)
    counts = {
        mode: count_calls(tiny_model(0).requires_grad_(True), mode)
        for mode in ("none", "selective", "block")
    }
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert counts["selective"][attention] == counts["none"][attention]
    assert counts["block"][attention] == counts["none"][attention] + layers
    products = {mode: own["mm"] + own["addmm"] for mode, own in counts.items()}
    # gate and up are wider than their input, so these alone are computed again.
    assert products["selective"] == products["none"] + 2 * layers
    # The last product of a block need not be repeated: nothing before it asks for its output.
    assert products["block"] > products["selective"]


def test_a_selective_block_does_not_repeat_the_packed_attention_of_gpus() -> None:
    operator = torch.ops.torch_attn._varlen_attn.default
    assert _choose(None, operator) is CheckpointPolicy.MUST_SAVE
