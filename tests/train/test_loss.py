"""Chunked cross-entropy: value and gradients of the plain form, with a fraction of its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.tensor_memory import track_tensor_memory
from qwen2vl.data.preprocess import TrainingExample
from qwen2vl.train import loss
from qwen2vl.train.loader.batch import Batch, pack_batch
from qwen2vl.train.loss import LossOutput, token_loss
from tests.tiny import tiny_processor

T, D, V = 40, 16, 97


def plain_loss(hidden_TD: Tensor, head_VD: Tensor, batch: Batch, divisor: float) -> LossOutput:
    """Compute all logits at once: the reference."""
    rows_RD = hidden_TD.index_select(0, batch.target_index_R)
    logits_RV = F.linear(rows_RD, head_VD)
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    losses_R = F.cross_entropy(logits_RV, batch.targets_R, reduction="none")
    loss = (losses_R * batch.weights_R).sum() / divisor
    return LossOutput(loss, losses_R.detach(), logits_RV.argmax(1) == batch.targets_R)


def batch_with(num_targets: int, *, tokens: int = T, vocab_size: int = V) -> Batch:
    """Return a packed batch with random targets."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
    batch = pack_batch([TrainingExample(tiny_processor()(turns, for_training=True), "a")], pad_id=0)
    generator = torch.Generator().manual_seed(num_targets)
    return replace(
        batch,
        target_index_R=torch.randperm(tokens, generator=generator)[:num_targets].sort().values,
        targets_R=torch.randint(0, vocab_size, (num_targets,), generator=generator),
        weights_R=torch.rand(num_targets, generator=generator),
        example_index_R=torch.zeros(num_targets, dtype=torch.int64),
    )


def operands(dtype: torch.dtype, *, tokens: int = T) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = 3 * torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    head_VD = torch.randn(V, D, generator=generator, dtype=torch.float64)
    return (hidden_TD.to(dtype).requires_grad_(), head_VD.to(dtype).requires_grad_())


@contextmanager
def chunks_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(loss, "MAX_CHUNK_LOGITS", rows * V)
        yield


Loss = Callable[[Tensor, Tensor, Batch, float], LossOutput]


def output_and_gradients(
    loss: Loss, dtype: torch.dtype, batch: Batch, *, autocast: bool = False
) -> tuple[LossOutput, Tensor, Tensor]:
    hidden_TD, head_VD = operands(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = loss(hidden_TD * 1.0, head_VD, batch, 7.0)
    (3 * output.loss).backward()
    assert hidden_TD.grad is not None and head_VD.grad is not None
    return output, hidden_TD.grad, head_VD.grad


@pytest.mark.parametrize("rows", [1, 7, 13, 30, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_value_and_gradients_equal_the_plain_form(
    rows: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_with(30)
    expected = output_and_gradients(plain_loss, dtype, batch)
    with chunks_of(rows, monkeypatch):
        actual = output_and_gradients(token_loss, dtype, batch)
    assert torch.equal(actual[0].is_correct_R, expected[0].is_correct_R)
    torch.testing.assert_close(
        actual[0].losses_R, expected[0].losses_R, rtol=tolerance, atol=tolerance
    )
    for actual_tensor, expected_tensor in zip(
        (actual[0].loss, *actual[1:]), (expected[0].loss, *expected[1:]), strict=True
    ):
        assert actual_tensor.dtype == expected_tensor.dtype
        assert (
            actual_tensor - expected_tensor
        ).abs().max() <= tolerance * expected_tensor.abs().max()


@pytest.mark.parametrize("rows", [7, 1000])
def test_under_autocast_gradients_are_as_accurate_as_the_plain_form(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_with(30)
    exact = output_and_gradients(plain_loss, torch.float64, batch)
    plain = output_and_gradients(plain_loss, torch.float32, batch, autocast=True)
    with chunks_of(rows, monkeypatch):
        actual = output_and_gradients(token_loss, torch.float32, batch, autocast=True)
    torch.testing.assert_close(actual[0].losses_R, plain[0].losses_R, rtol=1e-5, atol=1e-5)
    for actual_tensor, expected_tensor, exact_tensor in zip(
        actual[1:], plain[1:], exact[1:], strict=True
    ):
        assert actual_tensor.dtype == torch.float32
        assert (actual_tensor - exact_tensor).norm() <= 1.1 * (
            expected_tensor - exact_tensor
        ).norm()


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_operand_gets_no_gradient_and_the_other_the_same(frozen: str) -> None:
    batch = batch_with(30)
    _, d_hidden_TD, d_head_VD = output_and_gradients(token_loss, torch.float64, batch)
    hidden_TD, head_VD = operands(torch.float64)
    {"hidden": hidden_TD, "head": head_VD}[frozen].requires_grad_(False)
    (3 * token_loss(hidden_TD, head_VD, batch, 7.0).loss).backward()
    for name, tensor, expected in (
        ("hidden", hidden_TD, d_hidden_TD),
        ("head", head_VD, d_head_VD),
    ):
        if name == frozen:
            assert tensor.grad is None
        else:
            assert tensor.grad is not None and torch.equal(tensor.grad, expected)


def test_the_divisor_may_be_a_tensor() -> None:
    batch = batch_with(30)
    hidden_TD, head_VD = operands(torch.float64)
    one = token_loss(hidden_TD, head_VD, batch, 7.0).loss
    two = token_loss(hidden_TD, head_VD, batch, torch.tensor(7.0)).loss
    assert one.item() == two.item()


def test_without_targets_loss_and_gradients_are_zero() -> None:
    output, d_hidden_TD, d_head_VD = output_and_gradients(token_loss, torch.float32, batch_with(0))
    assert output.loss.item() == 0
    assert d_hidden_TD.shape == (T, D) and not d_hidden_TD.any()
    assert d_head_VD.shape == (V, D) and not d_head_VD.any()


def test_without_grad_mode_no_gradients_are_computed() -> None:
    hidden_TD, head_VD = operands(torch.float32)
    with torch.no_grad(), track_tensor_memory(min_bytes=V * D * 4) as watch:
        output = token_loss(hidden_TD, head_VD, batch_with(3), 1.0)
    assert not output.loss.requires_grad
    assert watch.peak_bytes == 0  # three rows of logits are smaller than a gradient of the head


def test_a_second_backward_is_refused() -> None:
    hidden_TD, head_VD = operands(torch.float32)
    loss = token_loss(hidden_TD, head_VD, batch_with(3), 1.0).loss
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_take_at_most_a_twentieth_of_the_plain_memory(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = 1600
    batch = batch_with(tokens, tokens=tokens)
    peaks: list[int] = []
    # A 37th of the rows per chunk, as for 16,384 tokens with the official vocabulary.
    with chunks_of(tokens // 37, monkeypatch):
        for loss in (plain_loss, token_loss):
            hidden_TD, head_VD = operands(torch.float32, tokens=tokens)
            with track_tensor_memory(last_axis=V) as watch:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    output = loss(hidden_TD, head_VD, batch, 1.0)
                output.loss.backward()
            peaks.append(watch.peak_bytes)
    plain, chunked = peaks
    assert plain >= 2 * 4 * tokens * V  # the measurement includes the full logits
    assert 0 < chunked <= 0.05 * plain
