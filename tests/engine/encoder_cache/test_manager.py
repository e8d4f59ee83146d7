"""Encoder cache manager: any parts equal encoding at once, and frame pairs are encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl.engine.encoder_cache.manager import EncoderCacheManager
from qwen2vl.engine.encoder_cache.memory_cache import EmbeddingCache
from qwen2vl.engine.encoder_cache.weights_digest import VisionWeightsDigest
from qwen2vl.engine.scheduler.output import EncoderInput
from qwen2vl.geometry import Grid, VisionMeta
from qwen2vl.lora.multi import LoraManager
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import Item
from tests.parity.reference import random_model
from tests.tiny import tiny_config

MODEL = random_model(tiny_config())


def item(grid: Grid, seed: int = 0) -> Item:
    generator = torch.Generator().manual_seed(seed)
    size = (grid.t * grid.h * grid.w, 1176)
    return Item(
        kind="video" if grid.t > 1 else "image",
        patches_NP=torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
        grid=grid,
        pair_digests=tuple(f"{seed} {grid} {i}".encode().ljust(32) for i in range(grid.t)),
        name="item",
        original_size=(14 * grid.h, 14 * grid.w),
        resized_size=(14 * grid.h, 14 * grid.w),
    )


def make_manager(model: Qwen2VL = MODEL, *, max_bytes: int = 10**6) -> EncoderCacheManager:
    cache = EmbeddingCache(max_bytes=max_bytes)
    weights = VisionWeightsDigest(model, persistent=False)
    return EncoderCacheManager(model, cache, weights, LoraManager(model))


@torch.inference_mode()
def encode_alone(visual_item: Item, model: Qwen2VL = MODEL) -> Tensor:
    return model.encode(visual_item.patches_NP, VisionMeta.build([visual_item.grid]))


def inputs_of(visual_item: Item, *indices: int) -> list[EncoderInput]:
    """Return encoder inputs of frame pairs of an item, of all by default."""
    return [EncoderInput.load(visual_item, index) for index in indices or range(visual_item.grid.t)]


def encode(manager: EncoderCacheManager, inputs: Sequence[EncoderInput]) -> None:
    with torch.inference_mode():
        manager.encode(inputs)


def embeddings(manager: EncoderCacheManager, visual_item: Item) -> Tensor:
    return torch.cat([manager.embeddings(digest) for digest in visual_item.pair_digests])


def release(manager: EncoderCacheManager, visual_item: Item) -> None:
    for digest in visual_item.pair_digests:
        manager.release(digest)


def num_encoded(manager: EncoderCacheManager, visual_item: Item) -> int:
    return sum(map(manager.has_embeddings, visual_item.pair_digests))


grids = st.builds(
    lambda t, h, w: Grid(t, 2 * h, 2 * w), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)
)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), item_grids=st.lists(grids, min_size=1, max_size=4))
def test_any_order_and_packing_is_exact(data: st.DataObject, item_grids: list[Grid]) -> None:
    items = [item(grid, seed) for seed, grid in enumerate(item_grids)]
    manager = make_manager()
    for visual_item in items:
        manager.acquire(visual_item.pair_digests)
    inputs = [one for visual_item in items for one in inputs_of(visual_item)]
    inputs = data.draw(st.permutations(inputs))
    while inputs:
        count = data.draw(st.integers(1, len(inputs)))
        encode(manager, inputs[:count])
        inputs = inputs[count:]
    for visual_item in items:
        torch.testing.assert_close(
            embeddings(manager, visual_item), encode_alone(visual_item), rtol=1e-6, atol=2e-6
        )
        for digest in visual_item.pair_digests:
            cached = manager.cache.get(manager._keys[digest])
            assert cached is not None
            assert torch.equal(cached, manager.embeddings(digest))


def test_a_growing_video_is_encoded_where_it_is_new() -> None:
    """Also one that another video overlaps."""
    long = item(Grid(6, 4, 6))
    first, last = (
        replace(
            long,
            grid=Grid(4, 4, 6),
            patches_NP=long.patches_NP[24 * start : 24 * (start + 4)],
            pair_digests=long.pair_digests[start : start + 4],
        )
        for start in (0, 2)
    )
    manager = make_manager()
    for video, missing in ((first, [0, 1, 2, 3]), (last, [2, 3]), (long, [])):
        manager.acquire(video.pair_digests)
        has_embeddings = [manager.has_embeddings(digest) for digest in video.pair_digests]
        assert [i for i, has in enumerate(has_embeddings) if not has] == missing
        if missing:
            encode(manager, inputs_of(video, *missing))
        torch.testing.assert_close(embeddings(manager, video), encode_alone(video))
        release(manager, video)


def test_a_shared_item_is_kept_until_both_requests_release_it() -> None:
    visual_item = item(Grid(1, 4, 4))
    manager = make_manager(max_bytes=0)
    manager.acquire(visual_item.pair_digests)
    manager.acquire(visual_item.pair_digests)
    encode(manager, inputs_of(visual_item))
    release(manager, visual_item)
    assert num_encoded(manager, visual_item) == 1
    num_bytes = embeddings(manager, visual_item).nbytes
    assert manager.cache.pinned_bytes == manager.cache.stats.num_bytes == num_bytes
    release(manager, visual_item)
    assert num_encoded(manager, visual_item) == manager.cache.stats.num_bytes == 0
    with pytest.raises(AssertionError, match="released more often than acquired"):
        release(manager, visual_item)


def test_embeddings_of_a_step_are_freed_one_by_one() -> None:
    """A pair's embeddings are no view of those of all pairs of its step."""
    video = item(Grid(4, 4, 4))
    manager = make_manager(max_bytes=0)
    manager.acquire(video.pair_digests)
    encode(manager, inputs_of(video))
    kept = manager.embeddings(video.pair_digests[0])
    assert kept.untyped_storage().nbytes() == kept.nbytes


def test_a_cached_item_is_available_when_acquired() -> None:
    for acquired in (item(Grid(1, 4, 4)), item(Grid(3, 2, 4))):
        manager = make_manager()
        manager.acquire(acquired.pair_digests)
        encode(manager, inputs_of(acquired))
        vision_MD = embeddings(manager, acquired)
        release(manager, acquired)
        manager.acquire(acquired.pair_digests)
        assert num_encoded(manager, acquired) == acquired.grid.t
        assert torch.equal(embeddings(manager, acquired), vision_MD)


def test_what_was_released_before_it_was_encoded_is_not_kept() -> None:
    video = item(Grid(4, 2, 4))
    manager = make_manager()
    manager.acquire(video.pair_digests)
    release(manager, video)
    encode(manager, inputs_of(video, 2, 3))  # scheduled before it was released
    manager.acquire(video.pair_digests)
    assert num_encoded(manager, video) == 0
    encode(manager, inputs_of(video))
    torch.testing.assert_close(embeddings(manager, video), encode_alone(video))


def test_embeddings_of_a_retrained_model_are_not_reused() -> None:
    model = random_model(tiny_config())
    visual_item = item(Grid(1, 4, 4))
    manager = make_manager(model)
    manager.acquire(visual_item.pair_digests)
    encode(manager, inputs_of(visual_item))
    stale = embeddings(manager, visual_item)
    release(manager, visual_item)
    loss = model.encode(visual_item.patches_NP, VisionMeta.build([visual_item.grid])).square().sum()
    loss.backward()
    torch.optim.AdamW(model.visual.parameters(), lr=0.1, fused=True).step()
    manager.acquire(visual_item.pair_digests)
    assert num_encoded(manager, visual_item) == 0
    encode(manager, inputs_of(visual_item))
    torch.testing.assert_close(embeddings(manager, visual_item), encode_alone(visual_item, model))
    assert (embeddings(manager, visual_item) - stale).abs().max() > 0.1


def test_embeddings_of_weights_that_changed_after_acquisition_are_not_cached() -> None:
    """Neither under the new digest nor under the old one, whose weights may be restored."""
    model = random_model(tiny_config())
    old = {name: value.clone() for name, value in model.state_dict().items()}
    visual_item = item(Grid(1, 2, 4))
    weights = VisionWeightsDigest(model, persistent=True)
    manager = EncoderCacheManager(model, EmbeddingCache(), weights, LoraManager(model))
    manager.acquire(visual_item.pair_digests)
    with torch.no_grad():
        model.visual.merger.ln_q.weight.mul_(2)
    encode(manager, inputs_of(visual_item))
    release(manager, visual_item)
    for _ in range(2):
        manager.acquire(visual_item.pair_digests)
        assert num_encoded(manager, visual_item) == 0
        release(manager, visual_item)
        model.load_state_dict(old)


def test_a_failed_step_leaves_items_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    video = item(Grid(3, 2, 4))
    manager = make_manager()
    manager.acquire(video.pair_digests)
    encode(manager, inputs_of(video, 0))
    with monkeypatch.context() as patch:
        patch.setattr(Qwen2VL, "encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode(manager, inputs_of(video, 1, 2))
    assert num_encoded(manager, video) == 1
    encode(manager, inputs_of(video, 1, 2))
    torch.testing.assert_close(embeddings(manager, video), encode_alone(video))
