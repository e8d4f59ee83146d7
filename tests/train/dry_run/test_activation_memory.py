"""Activation-memory estimator against the bytes of a real forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from qwen2vl.model import Qwen2VL, rope
from qwen2vl.parallel.activation_checkpointing import (
    CheckpointingMode,
    apply_activation_checkpointing,
)
from qwen2vl.quantization import nf4
from qwen2vl.recipes import nano
from qwen2vl.train.dry_run.activation_memory import (
    BatchShape,
    MemoryTimeline,
    MemoryTracker,
    estimate_activation_memory,
)
from qwen2vl.train.loader.batch import Batch, pack_batch
from qwen2vl.train.loss import token_loss
from qwen2vl.train.optim.optimizers import apply_lr_rules
from tests.tiny import tiny_config, tiny_model
from tests.train.loader.test_batch import conversations

CPU = torch.device("cpu")


@cache
def batch() -> Batch:
    return pack_batch(conversations() * 4, pad_id=0)


@cache
def estimate(
    mode: CheckpointingMode, dtype: str, rules: tuple[tuple[str, float], ...]
) -> MemoryTimeline:
    with torch.device("meta"):
        model = Qwen2VL(tiny_config())
    apply_lr_rules(model, rules)
    apply_activation_checkpointing(model, visual=mode, text=mode)
    return estimate_activation_memory(
        model, BatchShape.from_batch(batch()), device=CPU, use_autocast=dtype == "bfloat16"
    )


def real_model(mode: CheckpointingMode, rules: tuple[tuple[str, float], ...]) -> Qwen2VL:
    model = tiny_model()
    apply_lr_rules(model, rules)
    apply_activation_checkpointing(model, visual=mode, text=mode)
    return model


def training_step(model: Qwen2VL, dtype: str) -> Iterator[Tensor]:
    """Compute loss and gradients as the training loop does; yield after the model's forward."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        hidden_TD = batch().forward(model)
        yield hidden_TD
        loss = token_loss(hidden_TD, model.lm_head_weight, batch(), 1.0).loss
    loss.backward()


def saved_bytes(model: Qwen2VL) -> int:
    """Sum what autograd saves, each storage once, and the hidden states; without weights."""
    parameter_storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_storages:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(record, lambda tensor: tensor):
        step = training_step(model, "float32")
        record(next(step))
    return sum(storages.values())


def allocator_peak(model: Qwen2VL, dtype: str) -> int:
    """Return the peak of torch's allocator, measured by the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        list(training_step(model, dtype))
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    events_by_time = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    allocated = peak = 0
    for _, change in events_by_time:
        allocated += change
        peak = max(peak, allocated)
    return peak


@pytest.mark.parametrize("mode", ["none", "full"])
def test_saved_bytes_equal_those_of_autograd(mode: CheckpointingMode) -> None:
    saved = estimate(mode, "float32", nano.TRAIN_ALL).saved
    assert saved == pytest.approx(saved_bytes(real_model(mode, nano.TRAIN_ALL)), rel=0.1)


@pytest.mark.parametrize(
    ("mode", "dtype", "rules"),
    [
        ("none", "bfloat16", nano.TRAIN_VISION),
        ("full", "float32", nano.TRAIN_ALL),
        ("selective", "bfloat16", nano.TRAIN_ALL),
    ],
)
def test_the_peak_equals_that_of_the_allocator(
    mode: CheckpointingMode, dtype: str, rules: tuple[tuple[str, float], ...]
) -> None:
    peak = estimate(mode, dtype, rules).peak()
    assert peak == pytest.approx(allocator_peak(real_model(mode, rules), dtype), rel=0.1)


def test_existing_gradients_raise_the_peak() -> None:
    timeline = estimate("none", "float32", nano.TRAIN_ALL)
    existing_gradients = sum(p.nbytes for p in tiny_model().parameters())
    assert (
        timeline.peak()
        < timeline.peak(existing_gradients=existing_gradients)
        <= timeline.peak() + existing_gradients
    )
    # Of the other ranks' shards only the head's gradient remains at the end of the backward.
    assert timeline.peak(num_shards=4) <= timeline.peak()


def test_a_batch_without_images_has_the_dummy_image() -> None:
    text_only = pack_batch(conversations()[:1], pad_id=0)
    assert BatchShape.from_batch(text_only).frames == ()
    with torch.device("meta"):
        model = Qwen2VL(tiny_config())
    timeline = estimate_activation_memory(
        model, BatchShape.from_batch(text_only), device=CPU, use_autocast=False
    )
    assert len(timeline.visual) == 2 and 0 < timeline.visual[0].saved < timeline.text[0].saved


def test_only_new_storages_are_counted_until_they_are_freed() -> None:
    existing = torch.ones(100)
    with MemoryTracker() as tracker:
        view = existing.view(10, 10).t()
        assert tracker.allocated == 0
        result = view * 2
        assert tracker.allocated == 400
        del result
    assert (tracker.allocated, tracker.peak) == (0, 400)


def test_cached_tables_are_real_tensors_afterwards() -> None:
    config = tiny_config()
    expected = rope._inv_freq(8, config.text.rope_theta, CPU).clone()
    estimate("none", "float32", nano.TRAIN_ALL)
    inv_freq = rope._inv_freq(8, config.text.rope_theta, CPU)
    assert type(inv_freq) is Tensor and torch.equal(inv_freq, expected)
    assert type(nf4._levels(CPU)) is Tensor
