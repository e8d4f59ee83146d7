"""The backward for bfloat16 on a CPU equals float32 SDPA's, for segments of any length."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.geometry import AttnMeta
from qwen2vl.model import flash_attention_cpu as module
from qwen2vl.model.attention import attention
from qwen2vl.model.flash_attention_cpu import flash_attention_cpu, supports_flash_attention_cpu


@pytest.fixture(autouse=True)
def eager_score_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enable it without a compiler; the slow test compiles."""
    monkeypatch.setattr(module, "_score_gradients", module._compute_score_gradients)


def random_inputs(*shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).bfloat16() for _ in range(4)]


def gradients(output: Tensor, inputs: list[Tensor], d_out: Tensor) -> Iterator[Tensor]:
    return (gradient.float() for gradient in torch.autograd.grad(output, inputs, d_out))


def assert_same_gradients(shape: tuple[int, ...], *, seed: int) -> None:
    *qkv, d_out = random_inputs(*shape, seed=seed)
    exact = [tensor.float().requires_grad_() for tensor in qkv]
    fast = [tensor.clone().requires_grad_() for tensor in qkv]
    expected = F.scaled_dot_product_attention(exact[0], exact[1], exact[2])
    out = flash_attention_cpu(fast[0], fast[1], fast[2])
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)
    pairs = zip(gradients(out, fast, d_out), gradients(expected, exact, d_out.float()), strict=True)
    for got, wanted in pairs:
        # Of bfloat16's rounding: 0.5 % in norm.
        assert (got - wanted).norm() < 0.012 * wanted.norm() + 1e-3


@pytest.mark.parametrize("max_scores", [1 << 21, 1500, 100, 1])
@pytest.mark.parametrize(
    "shape", [(3, 2, 36, 16), (1, 1, 2, 64), (2, 5, 3, 8), (1, 2, 90, 80), (7, 1, 4, 128)]
)
def test_gradients_equal_float32_whatever_the_blocks(
    shape: tuple[int, ...], max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BLOCK_SCORES", max_scores)
    assert_same_gradients(shape, seed=max_scores)


def test_packed_segments_equal_the_float32_path(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = AttnMeta.build([4, 4, 16, 8, 8, 8, 1])
    *qkv, d_out = random_inputs(sum(meta.lengths_q), 2, 32)
    fast = [tensor.clone().requires_grad_() for tensor in qkv]
    slow = [tensor.clone().requires_grad_() for tensor in qkv]
    out = attention(fast[0], fast[1], fast[2], meta, causal=False)
    fast_gradients = list(gradients(out, fast, d_out))
    monkeypatch.setattr(module, "_score_gradients", None)
    expected = attention(slow[0], slow[1], slow[2], meta, causal=False)
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)
    for got, wanted in zip(fast_gradients, gradients(expected, slow, d_out), strict=True):
        assert (got - wanted).norm() < 0.012 * wanted.norm()


def test_it_is_for_training_in_bfloat16_only(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(2, 3, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    assert supports_flash_attention_cpu(q, q, causal=False)
    assert not supports_flash_attention_cpu(q, q, causal=True)
    assert not supports_flash_attention_cpu(q, q[:, :1], causal=False)  # GQA
    assert not supports_flash_attention_cpu(q.float(), q.float(), causal=False)
    assert not supports_flash_attention_cpu(q.detach(), q.detach(), causal=False)
    monkeypatch.setattr(module, "_score_gradients", None)
    assert not supports_flash_attention_cpu(q, q, causal=False)


def test_it_stays_disabled_without_the_forward_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_score_gradients", None)
    monkeypatch.setattr(module, "FORWARD_KERNEL", "_no_such_kernel")
    module.enable_flash_attention_cpu()
    assert module._score_gradients is None


@pytest.mark.slow
def test_compiled_gradients_equal_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    module.enable_flash_attention_cpu()
    for length in (40, 41, 1100, 1700, 64):
        assert_same_gradients((2, 2, length, 64), seed=length)
