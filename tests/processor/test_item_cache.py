"""Item cache: a source is opened once while its content is unchanged, and again when it changes."""

from __future__ import annotations

import os
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl.errors import InputError
from qwen2vl.processor import processor as processor_module
from qwen2vl.processor.item_cache import ItemCache
from qwen2vl.processor.media.source import MediaLimits
from tests.media import encoded
from tests.processor.test_processor import random_frames, random_image, user
from tests.tiny import tiny_processor


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects the names of the items that are preprocessed."""
    names: list[str] = []
    for function in ("preprocess_image", "preprocess_video"):
        original = getattr(processor_module, function)

        def recorded(*args: Any, original: Any = original, **options: Any) -> Any:
            names.append(options["name"])
            return original(*args, **options)

        monkeypatch.setattr(processor_module, function, recorded)
    return names


def png(seed: int = 0) -> bytes:
    file = BytesIO()
    Image.fromarray(random_image(seed=seed)).save(file, "PNG")
    return file.getvalue()


def test_second_turn_decodes_nothing(opened: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    url = "data:image/png;base64," + b64encode(png(1)).decode()
    first = user(
        {"image": str(path)}, {"image": url}, {"image": png(2)}, {"image": random_image(seed=3)},
        {"video": random_frames()},
    )  # fmt: skip
    conversation = [
        *first,
        {"role": "assistant", "content": "Yes."},
        *user({"image": path}, {"text": "Why?"}),
    ]
    cached = tiny_processor().with_item_cache(10**7)
    first_input, second_input, uncached = (
        cached(first),
        cached(conversation),
        tiny_processor()(conversation),
    )
    assert opened[:5] == ["a.png", "image 2", "image 3", "image 4", "video 1"]
    assert len(opened) == 5 + 6  # six by the processor without a cache
    groups = zip(second_input.items, first_input.items, uncached.items, strict=False)
    for hit, item, wanted in groups:
        assert hit is item
        assert hit.pair_digests == wanted.pair_digests and torch.equal(
            hit.patches_NP, wanted.patches_NP
        )
    assert second_input.items[5] is first_input.items[0]


def test_changed_file_is_decoded_again(opened: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    Image.fromarray(random_image()).save(path)
    stat = path.stat()
    cached = tiny_processor().with_item_cache(10**7)
    one = cached(user({"image": path}))
    Image.fromarray(random_image(seed=1)).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    other = cached(user({"image": path}))
    assert one.items[0].pair_digests != other.items[0].pair_digests and len(opened) == 2
    path.unlink()
    with pytest.raises(InputError, match=r"a\.bmp"):
        cached(user({"image": path}))


def test_other_options_give_another_item(opened: list[str]) -> None:
    cached = tiny_processor().with_item_cache(10**7)
    frames = [Image.fromarray(random_image(seed=seed)) for seed in range(2)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    parts = [{"image": data}, {"image": data, "max_pixels": 4 * 28 * 28}, {"video": data}]
    items = [cached(user(part)).items[0] for part in parts]
    assert len(opened) == 3 and len({(item.kind, item.pair_digests) for item in items}) == 3


def test_changed_buffers_are_decoded_again(opened: list[str]) -> None:
    """File objects, tensors and arrays are compared by content, wherever the file is."""
    cached, file = tiny_processor().with_item_cache(10**7), BytesIO(png())
    tensor = torch.from_numpy(random_image()).permute(2, 0, 1).contiguous()
    frames = torch.from_numpy(random_frames())
    for seed in (0, 0, 1, 1):
        file.seek(0)
        file.write(png(seed))
        file.truncate()
        tensor.copy_(torch.from_numpy(random_image(seed=seed)).permute(2, 0, 1))
        frames[0] = torch.from_numpy(random_image(56, 56, seed=seed))
        items = cached(user({"image": file}, {"image": tensor}, {"video": frames})).items
        wanted = tiny_processor()(user({"image": random_image(seed=seed)})).items[0]
        assert items[0].pair_digests == items[1].pair_digests == wanted.pair_digests
    assert opened.count("image 2") == opened.count("video 1") == 2
    assert len(opened) == 2 * 3 + 4  # the last four by the processor without a cache


def test_pipes_are_read_once(opened: list[str]) -> None:
    cached = tiny_processor().with_item_cache(10**7)
    read_end, write_end = os.pipe()
    with open(write_end, "wb") as file:
        file.write(png())
    with open(read_end, "rb") as file:
        item = cached(user({"image": file})).items[0]
    assert item is cached(user({"image": png()})).items[0] and len(opened) == 1


def test_sources_that_are_not_cached(opened: list[str]) -> None:
    cached = tiny_processor().with_item_cache(10**7)
    pil_image = Image.fromarray(random_image())
    for _ in range(2):
        cached(user({"image": pil_image}, {"video": [random_image(), random_image(seed=1)]}))
    assert len(opened) == 4


def test_disallowed_files_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    cached = tiny_processor(limits=MediaLimits(allow_files=False)).with_item_cache(10**7)
    with pytest.raises(InputError, match="not allowed"):
        cached(user({"image": path}))


def test_cache_is_bounded_and_evicts_the_least_recently_used() -> None:
    processor = tiny_processor()
    items = [processor(user({"image": random_image(seed=seed)})).items[0] for seed in range(4)]
    each = items[0].patches_NP.nbytes
    cache = ItemCache(3 * each)
    for number in (0, 1, 2, 2):
        cache.put((number,), items[number])
    assert cache.num_bytes == 3 * each
    assert cache.get((0,)) is items[0]
    cache.put((3,), items[3])
    assert [cache.get((n,)) is not None for n in range(4)] == [True, False, True, True]
    assert cache.num_bytes == 3 * each
    large = processor(user({"video": np.concatenate([random_frames()] * 3)})).items[0]
    assert large.patches_NP.nbytes > 3 * each
    cache.put((4,), large)
    assert cache.get((4,)) is None and cache.num_bytes == 3 * each
