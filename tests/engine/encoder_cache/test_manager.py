"""Encoder cache manager: chunked encoding equals encoding at once, and items are encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl.engine.encoder_cache.manager import EncoderCacheManager
from qwen2vl.engine.encoder_cache.memory_cache import EmbeddingCache
from qwen2vl.engine.encoder_cache.weights_digest import VisionWeightsDigest
from qwen2vl.engine.scheduler.output import EncoderChunk
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
        digest=f"{seed} {grid}".encode().ljust(32),
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


def whole_item(visual_item: Item) -> list[EncoderChunk]:
    return [EncoderChunk(visual_item, 0, visual_item.grid.t)]


def encode(manager: EncoderCacheManager, chunks: Sequence[EncoderChunk]) -> None:
    with torch.inference_mode():
        manager.encode(chunks)


def encoder_steps(
    items: Sequence[Item], budget: int, choose_next: Callable[[Sequence[int]], int]
) -> Iterator[list[EncoderChunk]]:
    """Yield the encoder chunks of steps of at most `budget` patches; `choose_next` picks items."""
    num_encoded = [0] * len(items)
    while remaining := [
        i for i, visual_item in enumerate(items) if num_encoded[i] < visual_item.grid.t
    ]:
        step: list[EncoderChunk] = []
        num_patches_left = budget
        while remaining:
            i = remaining.pop(choose_next(range(len(remaining))))
            patches_per_pair = items[i].grid.h * items[i].grid.w
            count = min(
                items[i].grid.t - num_encoded[i],
                max(num_patches_left // patches_per_pair, 0 if step else 1),
            )
            if count:
                step.append(EncoderChunk(items[i], num_encoded[i], num_encoded[i] + count))
                num_encoded[i] += count
                num_patches_left -= count * patches_per_pair
        yield step


grids = st.builds(
    lambda t, h, w: Grid(t, 2 * h, 2 * w), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)
)


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(), item_grids=st.lists(grids, min_size=1, max_size=4), budget=st.integers(1, 400)
)
def test_any_packing_into_chunks_is_exact(
    data: st.DataObject, item_grids: list[Grid], budget: int
) -> None:
    items = [item(grid, seed) for seed, grid in enumerate(item_grids)]
    manager = make_manager()
    for visual_item in items:
        manager.acquire(visual_item)
    schedule = encoder_steps(items, budget, lambda choices: data.draw(st.sampled_from(choices)))
    for step in schedule:
        num_patches = [(s.stop - s.start) * s.item.grid.h * s.item.grid.w for s in step]
        assert sum(num_patches) <= budget or sum(s.stop - s.start for s in step) == 1
        encode(manager, step)
    for visual_item in items:
        assert manager.num_encoded_frame_pairs(visual_item) == visual_item.grid.t
        torch.testing.assert_close(
            manager.embeddings(visual_item), encode_alone(visual_item), rtol=1e-6, atol=2e-6
        )
        cached = manager.cache.get(manager._keys[visual_item.digest])
        assert cached is not None
        assert torch.equal(cached, manager.embeddings(visual_item))


def test_embeddings_of_encoded_chunks_are_available_before_the_rest() -> None:
    video = item(Grid(4, 4, 6))
    manager = make_manager()
    manager.acquire(video)
    assert manager.num_encoded_frame_pairs(video) == 0
    for stop in (1, 3):
        encode(manager, [EncoderChunk(video, manager.num_encoded_frame_pairs(video), stop)])
        assert manager.num_encoded_frame_pairs(video) == stop
        torch.testing.assert_close(
            manager.embeddings(video)[: 6 * stop], encode_alone(video)[: 6 * stop]
        )


def test_a_long_video_is_encoded_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    num_encoded_patches: list[int] = []
    encode_method = Qwen2VL.encode

    def counting_encode(model: Qwen2VL, patches_NP: Tensor, meta: VisionMeta) -> Tensor:
        num_encoded_patches.append(len(patches_NP))
        return encode_method(model, patches_NP, meta)

    monkeypatch.setattr(Qwen2VL, "encode", counting_encode)
    video = item(Grid(40, 4, 4))
    manager = make_manager()
    manager.acquire(video)
    for step in encoder_steps([video], 100, lambda choices: choices[0]):
        encode(manager, step)
    assert num_encoded_patches == [96, 96, 96, 96, 96, 96, 64]


def test_a_shared_item_is_encoded_once_and_kept_until_both_requests_release_it() -> None:
    visual_item = item(Grid(1, 4, 4))
    manager = make_manager(max_bytes=0)
    manager.acquire(visual_item)
    manager.acquire(visual_item)
    encode(manager, whole_item(visual_item))
    manager.release(visual_item)
    assert manager.num_encoded_frame_pairs(visual_item) == 1
    assert (
        manager.cache.pinned_bytes
        == manager.embeddings(visual_item).nbytes
        == manager.cache.stats.num_bytes
    )
    manager.release(visual_item)
    assert manager.num_encoded_frame_pairs(visual_item) == manager.cache.stats.num_bytes == 0
    with pytest.raises(AssertionError, match="released more often than acquired"):
        manager.release(visual_item)


def test_a_cached_item_is_available_when_acquired() -> None:
    visual_item, video = item(Grid(1, 4, 4)), item(Grid(3, 2, 4))
    manager = make_manager()
    for acquired in (visual_item, video):
        manager.acquire(acquired)
        encode(manager, whole_item(acquired))
        vision_MD = manager.embeddings(acquired)
        manager.release(acquired)
        manager.acquire(acquired)
        assert manager.num_encoded_frame_pairs(acquired) == acquired.grid.t
        assert torch.equal(manager.embeddings(acquired), vision_MD)


def test_a_partly_encoded_video_is_discarded_on_release() -> None:
    video = item(Grid(4, 2, 4))
    manager = make_manager()
    manager.acquire(video)
    encode(manager, [EncoderChunk(video, 0, 2)])
    manager.release(video)
    encode(manager, [EncoderChunk(video, 2, 4)])  # scheduled before it was released
    manager.acquire(video)
    assert manager.num_encoded_frame_pairs(video) == 0
    encode(manager, whole_item(video))
    torch.testing.assert_close(manager.embeddings(video), encode_alone(video))


def test_embeddings_of_a_retrained_model_are_not_reused() -> None:
    model = random_model(tiny_config())
    visual_item = item(Grid(1, 4, 4))
    manager = make_manager(model)
    manager.acquire(visual_item)
    encode(manager, whole_item(visual_item))
    stale = manager.embeddings(visual_item)
    manager.release(visual_item)
    loss = model.encode(visual_item.patches_NP, VisionMeta.build([visual_item.grid])).square().sum()
    loss.backward()
    torch.optim.AdamW(model.visual.parameters(), lr=0.1, fused=True).step()
    manager.acquire(visual_item)
    assert manager.num_encoded_frame_pairs(visual_item) == 0
    encode(manager, whole_item(visual_item))
    torch.testing.assert_close(manager.embeddings(visual_item), encode_alone(visual_item, model))
    assert (manager.embeddings(visual_item) - stale).abs().max() > 0.1


def test_embeddings_of_weights_that_changed_during_encoding_are_not_cached() -> None:
    """Neither under the new digest nor under the old one, whose weights may be restored."""
    model = random_model(tiny_config())
    old = {name: value.clone() for name, value in model.state_dict().items()}
    video = item(Grid(2, 2, 4))
    weights = VisionWeightsDigest(model, persistent=True)
    manager = EncoderCacheManager(model, EmbeddingCache(), weights, LoraManager(model))
    manager.acquire(video)
    encode(manager, [EncoderChunk(video, 0, 1)])
    with torch.no_grad():
        model.visual.merger.ln_q.weight.mul_(2)
    encode(manager, [EncoderChunk(video, 1, 2)])
    manager.release(video)
    for _ in range(2):
        manager.acquire(video)
        assert manager.num_encoded_frame_pairs(video) == 0
        manager.release(video)
        model.load_state_dict(old)


def test_a_failed_step_leaves_items_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    video = item(Grid(3, 2, 4))
    manager = make_manager()
    manager.acquire(video)
    encode(manager, [EncoderChunk(video, 0, 1)])
    with monkeypatch.context() as patch:
        patch.setattr(Qwen2VL, "encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode(manager, [EncoderChunk(video, 1, 3)])
    assert manager.num_encoded_frame_pairs(video) == 1
    encode(manager, [EncoderChunk(video, 1, 3)])
    torch.testing.assert_close(manager.embeddings(video), encode_alone(video))
