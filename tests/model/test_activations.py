"""qwen2vl.model.activations: the in-place forms equal the expressions, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from qwen2vl.model.activations import ROWS, quick_gelu, swiglu


@given(
    rows=st.sampled_from([0, 1, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 3]),
    width=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_in_place_equals_the_expression_bit_for_bit(
    rows: int, width: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows + width)
    fused = torch.randn(rows, 2 * width, generator=generator).mul_(4).to(dtype)
    gate, x = fused[:, :width], fused[:, width:]  # slices, as of a fused layer (linear/fused.py)
    expected = x * torch.sigmoid(1.702 * x), F.silu(gate) * x
    saved = x.clone()
    with torch.inference_mode():
        got_swiglu = swiglu(gate, x)
        assert torch.equal(x, saved)
        got_gelu = quick_gelu(x)
    assert torch.equal(got_gelu, expected[0]) and got_gelu is x
    assert torch.equal(got_swiglu, expected[1]) and got_swiglu is gate


def test_training_keeps_the_inputs() -> None:
    x, gate = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    saved = x.detach().clone(), gate.clone()
    quick_gelu(x)
    swiglu(gate, x)
    assert torch.equal(x, saved[0]) and torch.equal(gate, saved[1])


@torch.inference_mode()
def test_compiled_and_gpu_forms_have_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gate = torch.randn(5, 4), torch.randn(5, 4)
    expected = quick_gelu(x.clone()), swiglu(gate.clone(), x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(quick_gelu(x), expected[0]) and torch.equal(swiglu(gate, x), expected[1])


def test_gradients_are_those_of_the_expressions() -> None:
    x, gate = (torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(quick_gelu, x)
    assert torch.autograd.gradcheck(swiglu, (gate, x))
