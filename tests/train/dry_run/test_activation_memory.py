"""A rehearsal on shapes against the bytes that a real forward and backward keep and take."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from qwen2vl.model import Qwen2VL, rope
from qwen2vl.parallel.activation_checkpointing import Mode, recompute
from qwen2vl.quantization import nf4
from qwen2vl.recipes import nano
from qwen2vl.train.dry_run.activation_memory import Alive, Shape, Timeline, rehearse
from qwen2vl.train.loader.batch import Batch, pack
from qwen2vl.train.loss import token_loss
from qwen2vl.train.optim.optimizers import apply_rules
from tests.tiny import tiny_config, tiny_model
from tests.train.loader.test_batch import conversations

CPU = torch.device("cpu")


@cache
def batch() -> Batch:
    return pack(conversations() * 4, pad_id=0)


@cache
def rehearsed(mode: Mode, dtype: str, rules: tuple[tuple[str, float], ...]) -> Timeline:
    with torch.device("meta"):
        model = Qwen2VL(tiny_config())
    apply_rules(model, rules)
    recompute(model, visual=mode, text=mode)
    return rehearse(model, Shape.of(batch()), device=CPU, casts=dtype == "bfloat16")


def real(mode: Mode, rules: tuple[tuple[str, float], ...]) -> Qwen2VL:
    model = tiny_model()
    apply_rules(model, rules)
    recompute(model, visual=mode, text=mode)
    return model


def step(model: Qwen2VL, dtype: str) -> Iterator[Tensor]:
    """Take a step as the loop does, and stop where the forward is done."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        hidden_TD = batch().run(model)
        yield hidden_TD
        loss = token_loss(hidden_TD, model.head_weight, batch(), 1.0).loss
    loss.backward()


def saved_bytes(model: Qwen2VL) -> int:
    """Add up what autograd saves, each storage once, and what the loss is given; no weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        taken = step(model, "float32")
        note(next(taken))
    return sum(seen.values())


def allocator_peak(model: Qwen2VL, dtype: str) -> int:
    """Ask torch's own allocator, which the counting of the module under test never sees."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        list(step(model, dtype))
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    found = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, change in found:
        now += change
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("mode", ["none", "block"])
def test_what_is_kept_is_what_autograd_saves(mode: Mode) -> None:
    kept = rehearsed(mode, "float32", nano.ALL).kept
    assert kept == pytest.approx(saved_bytes(real(mode, nano.ALL)), rel=0.1)


@pytest.mark.parametrize(
    ("mode", "dtype", "rules"),
    [
        ("none", "bfloat16", nano.SEE),
        ("block", "float32", nano.ALL),
        ("selective", "bfloat16", nano.ALL),
    ],
)
def test_the_peak_is_what_the_allocator_says(
    mode: Mode, dtype: str, rules: tuple[tuple[str, float], ...]
) -> None:
    peak = rehearsed(mode, dtype, rules).peak()
    assert peak == pytest.approx(allocator_peak(real(mode, rules), dtype), rel=0.1)


def test_gradients_of_an_earlier_batch_are_there_all_the_time() -> None:
    line = rehearsed("none", "float32", nano.ALL)
    before = sum(p.nbytes for p in tiny_model().parameters())
    assert line.peak() < line.peak(before=before) <= line.peak() + before
    # Of other ranks' parts only the head's are still there when the backward ends.
    assert line.peak(parts=4) <= line.peak()


def test_a_batch_without_pictures_has_the_null_item() -> None:
    alone = pack(conversations()[:1], pad_id=0)
    assert Shape.of(alone).frames == ()
    with torch.device("meta"):
        model = Qwen2VL(tiny_config())
    line = rehearse(model, Shape.of(alone), device=CPU, casts=False)
    assert len(line.visual) == 2 and 0 < line.visual[0].kept < line.text[0].kept


def test_only_what_is_new_is_counted_and_only_while_it_lives() -> None:
    outside = torch.ones(100)
    with Alive() as alive:
        view = outside.view(10, 10).t()
        assert alive.now == 0
        made = view * 2
        assert alive.now == 400
        del made
    assert (alive.now, alive.peak) == (0, 400)


def test_tables_without_numbers_are_not_left_behind() -> None:
    config = tiny_config()
    wanted = rope._frequencies(8, config.text.rope_theta, CPU).clone()
    rehearsed("none", "float32", nano.ALL)
    found = rope._frequencies(8, config.text.rope_theta, CPU)
    assert type(found) is Tensor and torch.equal(found, wanted)
    assert type(nf4._levels(CPU)) is Tensor
