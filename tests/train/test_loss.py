"""The loss: equal to the plain form in value and gradients, and a small part of its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.live import live_bytes
from qwen2vl.data.preprocess import Example
from qwen2vl.train import loss
from qwen2vl.train.loader.batch import Batch, pack
from qwen2vl.train.loss import Outcome, token_loss
from tests.tiny import tiny_processor

T, D, V = 40, 16, 97


def plain_loss(hidden_TD: Tensor, head_VD: Tensor, batch: Batch, divisor: float) -> Outcome:
    """Compute all logits at once: the oracle."""
    rows_RD = hidden_TD.index_select(0, batch.target_index_R)
    logits_RV = F.linear(rows_RD, head_VD)
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    losses_R = F.cross_entropy(logits_RV, batch.targets_R, reduction="none")
    loss = (losses_R * batch.weights_R).sum() / divisor
    return Outcome(loss, losses_R.detach(), logits_RV.argmax(1) == batch.targets_R)


def batch_with(num_targets: int, *, tokens: int = T, words: int = V) -> Batch:
    """Take a real batch, and put targets of our own into it."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
    batch = pack([Example(tiny_processor()(turns, for_training=True), "a")], pad_id=0)
    draw = torch.Generator().manual_seed(num_targets)
    return replace(
        batch,
        target_index_R=torch.randperm(tokens, generator=draw)[:num_targets].sort().values,
        targets_R=torch.randint(0, words, (num_targets,), generator=draw),
        weights_R=torch.rand(num_targets, generator=draw),
        owner_R=torch.zeros(num_targets, dtype=torch.int64),
    )


def operands(dtype: torch.dtype, *, tokens: int = T) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden_TD = 3 * torch.randn(tokens, D, generator=draw, dtype=torch.float64)
    head_VD = torch.randn(V, D, generator=draw, dtype=torch.float64)
    return (hidden_TD.to(dtype).requires_grad_(), head_VD.to(dtype).requires_grad_())


@contextmanager
def chunks_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(loss, "CHUNK_NUMBERS", rows * V)
        yield


Loss = Callable[[Tensor, Tensor, Batch, float], Outcome]


def outcome_and_gradients(
    loss: Loss, dtype: torch.dtype, batch: Batch, *, autocast: bool = False
) -> tuple[Outcome, Tensor, Tensor]:
    hidden_TD, head_VD = operands(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outcome = loss(hidden_TD * 1.0, head_VD, batch, 7.0)
    (3 * outcome.loss).backward()
    assert hidden_TD.grad is not None and head_VD.grad is not None
    return outcome, hidden_TD.grad, head_VD.grad


@pytest.mark.parametrize("rows", [1, 7, 13, 30, 1000])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_value_and_gradients_equal_the_plain_form(
    rows: int, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_with(30)
    wanted = outcome_and_gradients(plain_loss, dtype, batch)
    with chunks_of(rows, monkeypatch):
        got = outcome_and_gradients(token_loss, dtype, batch)
    assert torch.equal(got[0].right_R, wanted[0].right_R)
    torch.testing.assert_close(got[0].losses_R, wanted[0].losses_R, rtol=bound, atol=bound)
    for mine, theirs in zip((got[0].loss, *got[1:]), (wanted[0].loss, *wanted[1:]), strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).abs().max() <= bound * theirs.abs().max()


@pytest.mark.parametrize("rows", [7, 1000])
def test_under_autocast_gradients_are_as_close_to_the_truth_as_the_plain_form(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_with(30)
    truth = outcome_and_gradients(plain_loss, torch.float64, batch)
    plain = outcome_and_gradients(plain_loss, torch.float32, batch, autocast=True)
    with chunks_of(rows, monkeypatch):
        got = outcome_and_gradients(token_loss, torch.float32, batch, autocast=True)
    torch.testing.assert_close(got[0].losses_R, plain[0].losses_R, rtol=1e-5, atol=1e-5)
    for mine, theirs, exact in zip(got[1:], plain[1:], truth[1:], strict=True):
        assert mine.dtype == torch.float32
        assert (mine - exact).norm() <= 1.1 * (theirs - exact).norm()


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(frozen: str) -> None:
    batch = batch_with(30)
    _, d_hidden_TD, d_head_VD = outcome_and_gradients(token_loss, torch.float64, batch)
    hidden_TD, head_VD = operands(torch.float64)
    {"hidden": hidden_TD, "head": head_VD}[frozen].requires_grad_(False)
    (3 * token_loss(hidden_TD, head_VD, batch, 7.0).loss).backward()
    for name, tensor, wanted in (
        ("hidden", hidden_TD, d_hidden_TD),
        ("head", head_VD, d_head_VD),
    ):
        if name == frozen:
            assert tensor.grad is None
        else:
            assert tensor.grad is not None and torch.equal(tensor.grad, wanted)


def test_a_divisor_may_stay_on_the_device() -> None:
    batch = batch_with(30)
    hidden_TD, head_VD = operands(torch.float64)
    one = token_loss(hidden_TD, head_VD, batch, 7.0).loss
    two = token_loss(hidden_TD, head_VD, batch, torch.tensor(7.0)).loss
    assert one.item() == two.item()


def test_without_targets_the_loss_is_zero_and_so_is_every_gradient() -> None:
    outcome, d_hidden_TD, d_head_VD = outcome_and_gradients(
        token_loss, torch.float32, batch_with(0)
    )
    assert outcome.loss.item() == 0
    assert d_hidden_TD.shape == (T, D) and not d_hidden_TD.any()
    assert d_head_VD.shape == (V, D) and not d_head_VD.any()


def test_without_gradients_none_are_computed() -> None:
    hidden_TD, head_VD = operands(torch.float32)
    with torch.no_grad(), live_bytes(at_least=V * D * 4) as watch:
        outcome = token_loss(hidden_TD, head_VD, batch_with(3), 1.0)
    assert not outcome.loss.requires_grad
    assert watch.peak == 0  # three rows of logits are smaller than a gradient of the head


def test_a_second_backward_is_refused() -> None:
    hidden_TD, head_VD = operands(torch.float32)
    loss = token_loss(hidden_TD, head_VD, batch_with(3), 1.0).loss
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_take_a_twentieth_of_the_plain_memory_at_most(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = 1600
    batch = batch_with(tokens, tokens=tokens)
    peaks: list[int] = []
    # A 37th of the rows at a time, as 16,384 tokens of the official vocabulary would have it.
    with chunks_of(tokens // 37, monkeypatch):
        for loss in (plain_loss, token_loss):
            hidden_TD, head_VD = operands(torch.float32, tokens=tokens)
            with live_bytes(last_axis=V) as watch:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    outcome = loss(hidden_TD, head_VD, batch, 1.0)
                outcome.loss.backward()
            peaks.append(watch.peak)
    plain, chunked = peaks
    assert plain >= 2 * 4 * tokens * V  # the measure sees what it is to compare with
    assert 0 < chunked <= 0.05 * plain
