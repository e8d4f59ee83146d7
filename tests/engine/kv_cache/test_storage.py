"""Caches that grow keep their content; flattening and unflattening of tensors, CPU copies."""

from __future__ import annotations

import pytest
import torch

from qwen2vl.engine.kv_cache.storage import (
    SeparateStorage,
    copy_to_device,
    flatten_tensors,
    unflatten_tensors,
)
from qwen2vl.geometry import AttnMeta
from qwen2vl.model import Int8KVCache, KVCache
from tests.tiny import tiny_config

CONFIG = tiny_config().text
DEVICE = torch.device("cpu")


@pytest.mark.parametrize("kv_cache", [KVCache, Int8KVCache])
def test_a_cache_that_grows_keeps_its_content(kv_cache: type[KVCache]) -> None:
    storage = SeparateStorage(CONFIG, torch.float32, DEVICE, kv_cache)
    cache = storage.reserve(None, 8, [])
    assert type(cache) is kv_cache
    torch.manual_seed(0)
    k_TKC, v_TKC = torch.randn(2, 8, CONFIG.num_key_value_heads, CONFIG.head_dim)
    q_THC = torch.randn(1, CONFIG.num_attention_heads, CONFIG.head_dim)
    for slots in cache.layers(7):
        slots.append(k_TKC[:7], v_TKC[:7])
    cache.length = 7
    grown = storage.reserve(cache, 64, [cache])
    assert (grown.length, grown.capacity) == (7, 64)
    assert type(grown) is kv_cache
    outs = [
        storage.batch([one], AttnMeta.build([1], [8])).layer(1).attend(q_THC, k_TKC[7:], v_TKC[7:])
        for one in (cache, grown)
    ]
    assert torch.equal(*outs)


def test_unflatten_restores_shapes_and_values() -> None:
    tensors = [
        torch.arange(4),
        torch.arange(6).view(2, 3) + 10,
        torch.empty(0, dtype=torch.int64),
        torch.arange(3).expand(3, -1),
    ]
    flat = flatten_tensors(tensors)
    assert flat.shape == (4 + 6 + 0 + 9,)
    for got, want in zip(unflatten_tensors(flat, tensors), tensors, strict=True):
        assert torch.equal(got, want)


def test_on_the_cpu_tensors_are_not_copied() -> None:
    tensor = torch.arange(3)
    assert copy_to_device(DEVICE, tensor)[0] is tensor
