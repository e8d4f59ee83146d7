"""Rows of items in work: any packing and any cut gives those of the item alone, each made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl.engine.encoder_cache.manager import VisionShelf
from qwen2vl.engine.encoder_cache.memory_cache import VisionCache
from qwen2vl.engine.encoder_cache.weights_digest import VisionWeights
from qwen2vl.engine.scheduler.output import Slices
from qwen2vl.geometry import Grid, VisionMeta
from qwen2vl.lora.multi import AdapterSwitch
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import Item
from tests.parity.oracle import random_model
from tests.tiny import tiny_config

MODEL = random_model(tiny_config())


def item(grid: Grid, seed: int = 0) -> Item:
    generator = torch.Generator().manual_seed(seed)
    size = (grid.t * grid.h * grid.w, 1176)
    return Item(
        kind="video" if grid.t > 1 else "image",
        patches_NP=torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
        grid=grid,
        digest=f"{seed} {grid}".encode().ljust(32),
        name="item",
        size_given=(14 * grid.h, 14 * grid.w),
        size_seen=(14 * grid.h, 14 * grid.w),
    )


def shelf(model: Qwen2VL = MODEL, *, max_bytes: int = 10**6) -> VisionShelf:
    cache = VisionCache(max_bytes=max_bytes)
    weights = VisionWeights(model, lasting=False)
    return VisionShelf(model, cache, weights, AdapterSwitch(model))


@torch.inference_mode()
def alone(one: Item, model: Qwen2VL = MODEL) -> Tensor:
    return model.encode(one.patches_NP, VisionMeta.build([one.grid]))


def whole(one: Item) -> list[Slices]:
    return [Slices(one, 0, one.grid.t)]


def encode(held: VisionShelf, slices: Sequence[Slices]) -> None:
    with torch.inference_mode():
        held.encode(slices)


def steps(
    items: Sequence[Item], budget: int, choose: Callable[[Sequence[int]], int]
) -> Iterator[list[Slices]]:
    """Encode items in steps of at most `budget` patches; `choose` says whose turn it is."""
    done = [0] * len(items)
    while left := [i for i, one in enumerate(items) if done[i] < one.grid.t]:
        step: list[Slices] = []
        room = budget
        while left:
            i = left.pop(choose(range(len(left))))
            area = items[i].grid.h * items[i].grid.w
            count = min(items[i].grid.t - done[i], max(room // area, 0 if step else 1))
            if count:
                step.append(Slices(items[i], done[i], done[i] + count))
                done[i] += count
                room -= count * area
        yield step


grids = st.builds(
    lambda t, h, w: Grid(t, 2 * h, 2 * w), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)
)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), shapes=st.lists(grids, min_size=1, max_size=4), budget=st.integers(1, 400))
def test_any_packing_and_any_cut_is_exact(
    data: st.DataObject, shapes: list[Grid], budget: int
) -> None:
    items = [item(grid, seed) for seed, grid in enumerate(shapes)]
    held = shelf()
    for one in items:
        held.hold(one)
    turns = steps(items, budget, lambda choices: data.draw(st.sampled_from(choices)))
    for step in turns:
        areas = [(s.stop - s.start) * s.item.grid.h * s.item.grid.w for s in step]
        assert sum(areas) <= budget or sum(s.stop - s.start for s in step) == 1
        encode(held, step)
    for one in items:
        assert held.ready(one) == one.grid.t
        torch.testing.assert_close(held.rows(one), alone(one), rtol=1e-6, atol=2e-6)
        cached = held.cache.get(held._keys[one.digest])
        assert cached is not None
        assert torch.equal(cached, held.rows(one))


def test_rows_of_finished_slices_stand_while_others_are_missing() -> None:
    clip = item(Grid(4, 4, 6))
    held = shelf()
    held.hold(clip)
    assert held.ready(clip) == 0
    for stop in (1, 3):
        encode(held, [Slices(clip, held.ready(clip), stop)])
        assert held.ready(clip) == stop
        torch.testing.assert_close(held.rows(clip)[: 6 * stop], alone(clip)[: 6 * stop])


def test_a_long_clip_is_never_in_the_tower_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    tower = Qwen2VL.encode

    def watched(model: Qwen2VL, patches_NP: Tensor, meta: VisionMeta) -> Tensor:
        seen.append(len(patches_NP))
        return tower(model, patches_NP, meta)

    monkeypatch.setattr(Qwen2VL, "encode", watched)
    clip = item(Grid(40, 4, 4))
    held = shelf()
    held.hold(clip)
    for step in steps([clip], 100, lambda choices: choices[0]):
        encode(held, step)
    assert seen == [96, 96, 96, 96, 96, 96, 64]


def test_what_two_requests_show_is_encoded_once_and_stays_until_both_let_go() -> None:
    one = item(Grid(1, 4, 4))
    held = shelf(max_bytes=0)
    held.hold(one)
    held.hold(one)
    encode(held, whole(one))
    held.release(one)
    assert held.ready(one) == 1
    assert held.cache.pinned_bytes == held.rows(one).nbytes == held.cache.stats.num_bytes
    held.release(one)
    assert held.ready(one) == held.cache.stats.num_bytes == 0
    with pytest.raises(AssertionError, match="released more often than held"):
        held.release(one)


def test_a_known_item_is_ready_when_it_is_held() -> None:
    one, clip = item(Grid(1, 4, 4)), item(Grid(3, 2, 4))
    held = shelf()
    for which in (one, clip):
        held.hold(which)
        encode(held, whole(which))
        rows_MD = held.rows(which)
        held.release(which)
        held.hold(which)
        assert held.ready(which) == which.grid.t
        assert torch.equal(held.rows(which), rows_MD)


def test_half_a_clip_given_up_is_begun_again() -> None:
    clip = item(Grid(4, 2, 4))
    held = shelf()
    held.hold(clip)
    encode(held, [Slices(clip, 0, 2)])
    held.release(clip)
    encode(held, [Slices(clip, 2, 4)])  # planned before it was given up
    held.hold(clip)
    assert held.ready(clip) == 0
    encode(held, whole(clip))
    torch.testing.assert_close(held.rows(clip), alone(clip))


def test_a_retrained_model_is_not_served_stale_rows() -> None:
    model = random_model(tiny_config())
    one = item(Grid(1, 4, 4))
    held = shelf(model)
    held.hold(one)
    encode(held, whole(one))
    stale = held.rows(one)
    held.release(one)
    loss = model.encode(one.patches_NP, VisionMeta.build([one.grid])).square().sum()
    loss.backward()
    torch.optim.AdamW(model.visual.parameters(), lr=0.1, fused=True).step()
    held.hold(one)
    assert held.ready(one) == 0
    encode(held, whole(one))
    torch.testing.assert_close(held.rows(one), alone(one, model))
    assert (held.rows(one) - stale).abs().max() > 0.1


def test_rows_of_weights_that_changed_on_the_way_are_not_kept() -> None:
    """Not under the new name, and not under the old one, which may come back."""
    model = random_model(tiny_config())
    old = {name: value.clone() for name, value in model.state_dict().items()}
    clip = item(Grid(2, 2, 4))
    weights = VisionWeights(model, lasting=True)
    held = VisionShelf(model, VisionCache(), weights, AdapterSwitch(model))
    held.hold(clip)
    encode(held, [Slices(clip, 0, 1)])
    with torch.no_grad():
        model.visual.merger.ln_q.weight.mul_(2)
    encode(held, [Slices(clip, 1, 2)])
    held.release(clip)
    for _ in range(2):
        held.hold(clip)
        assert held.ready(clip) == 0
        held.release(clip)
        model.load_state_dict(old)


def test_a_failed_step_leaves_items_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = item(Grid(3, 2, 4))
    held = shelf()
    held.hold(clip)
    encode(held, [Slices(clip, 0, 1)])
    with monkeypatch.context() as patch:
        patch.setattr(Qwen2VL, "encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode(held, [Slices(clip, 1, 3)])
    assert held.ready(clip) == 1
    encode(held, [Slices(clip, 1, 3)])
    torch.testing.assert_close(held.rows(clip), alone(clip))
