"""A source is opened once while its bytes stay the same, and never longer than they do."""

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
from qwen2vl.processor import processor as room
from qwen2vl.processor.item_cache import KeptItems
from qwen2vl.processor.media.source import MediaLimits
from tests.processor.test_processor import clip, picture, user
from tests.tiny import tiny_processor


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the names of what is opened."""
    names: list[str] = []
    for maker in ("image_item", "video_item"):
        real = getattr(room, maker)

        def watched(*given: Any, real: Any = real, **options: Any) -> Any:
            names.append(options["name"])
            return real(*given, **options)

        monkeypatch.setattr(room, maker, watched)
    return names


def png(seed: int = 0) -> bytes:
    file = BytesIO()
    Image.fromarray(picture(seed=seed)).save(file, "PNG")
    return file.getvalue()


def test_a_second_turn_opens_nothing(opened: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    url = "data:image/png;base64," + b64encode(png(1)).decode()
    first = user(
        {"image": str(path)}, {"image": url}, {"image": png(2)}, {"image": picture(seed=3)},
        {"video": clip()},
    )  # fmt: skip
    talk = [
        *first,
        {"role": "assistant", "content": "Yes."},
        *user({"image": path}, {"text": "Why?"}),
    ]
    keeping = tiny_processor().keeping(10**7)
    once, again, plain = keeping(first), keeping(talk), tiny_processor()(talk)
    assert opened[:5] == ["a.png", "image 2", "image 3", "image 4", "video 1"]
    assert len(opened) == 5 + 6  # what the plain one opened
    for kept, item, wanted in zip(again.items, once.items, plain.items, strict=False):
        assert kept is item
        assert kept.digest == wanted.digest and torch.equal(kept.patches_NP, wanted.patches_NP)
    assert again.items[5] is once.items[0]


def test_a_file_that_changed_is_opened_again(opened: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    Image.fromarray(picture()).save(path)
    stat = path.stat()
    keeping = tiny_processor().keeping(10**7)
    one = keeping(user({"image": path}))
    Image.fromarray(picture(seed=1)).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    other = keeping(user({"image": path}))
    assert one.items[0].digest != other.items[0].digest and len(opened) == 2
    path.unlink()
    with pytest.raises(InputError, match=r"a\.bmp"):
        keeping(user({"image": path}))


def test_other_wishes_make_another_item(opened: list[str]) -> None:
    keeping = tiny_processor().keeping(10**7)
    parts = [{"image": png()}, {"image": png(), "max_pixels": 4 * 28 * 28}, {"video": png()}]
    items = [keeping(user(part)).items[0] for part in parts]
    assert len(opened) == 3 and len({(one.kind, one.digest) for one in items}) == 3


def test_what_is_not_kept_works_as_before(opened: list[str]) -> None:
    keeping = tiny_processor().keeping(10**7)
    drawn = Image.fromarray(picture())
    for _ in range(2):
        keeping(user({"image": drawn}, {"video": [picture(), picture(seed=1)]}))
    assert len(opened) == 4


def test_files_that_are_not_allowed_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    keeping = tiny_processor(limits=MediaLimits(allow_files=False)).keeping(10**7)
    with pytest.raises(InputError, match="not allowed"):
        keeping(user({"image": path}))


def test_bytes_are_bounded_and_the_unused_go_first() -> None:
    processor = tiny_processor()
    items = [processor(user({"image": picture(seed=seed)})).items[0] for seed in range(4)]
    each = items[0].patches_NP.nbytes
    kept = KeptItems(3 * each)
    for number in (0, 1, 2, 2):
        kept.put((number,), items[number])
    assert kept.num_bytes == 3 * each
    assert kept.get((0,)) is items[0]
    kept.put((3,), items[3])
    assert [kept.get((n,)) is not None for n in range(4)] == [True, False, True, True]
    assert kept.num_bytes == 3 * each
    large = processor(user({"video": np.concatenate([clip()] * 3)})).items[0]
    assert large.patches_NP.nbytes > 3 * each
    kept.put((4,), large)
    assert kept.get((4,)) is None and kept.num_bytes == 3 * each
