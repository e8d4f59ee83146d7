"""One sample prepared: media found where data lie, fetched together, measured by their heads.

What is wrong with samples, case by case, is in tests/train/test_bad_inputs.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2vl.data.config import DataConfig, Source
from qwen2vl.data.formats import Conversation, Page, SampleError, Words
from qwen2vl.data.preprocess import HEAD, Measurer, Preparer
from qwen2vl.data.storage import Storage
from qwen2vl.errors import InputError
from tests.media import encoded, noise, smooth
from tests.tiny import tiny_processor

DATA = DataConfig(sources=(Source(path="x"),), cache_gb=0)
BUCKET = "memory://bucket"


def showing(*sources: Any) -> Conversation:
    shown = [{"type": "image", "image": source} for source in sources]
    asked = {"role": "user", "content": [*shown, {"type": "text", "text": "what?"}]}
    return Conversation("a sample", [asked, {"role": "assistant", "content": "nothing"}])


class Asked:
    """Stands for a store: notes what is asked for, and how."""

    def __init__(self, patch: pytest.MonkeyPatch, objects: dict[str, bytes]) -> None:
        self.together: list[list[str]] = []
        self.alone: list[str] = []
        self.objects = objects

        def read_all(
            _: Storage, addresses: Iterable[str], first: int | None = None
        ) -> dict[str, bytes | InputError]:
            self.together.append(list(addresses))
            missing = InputError("gone")
            return {a: objects[a][:first] if a in objects else missing for a in self.together[-1]}

        def read(_: Storage, address: str, first: int | None = None) -> bytes:
            self.alone.append(address)
            return objects[address][:first]

        patch.setattr(Storage, "read_all", read_all)
        patch.setattr(Storage, "read", read)


def test_media_of_a_bin_are_fetched_at_a_time_and_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects = {f"{BUCKET}/{i}.png": encoded(smooth(56, 84, i)) for i in range(3)}
    asked = Asked(monkeypatch, objects)
    preparer = Preparer(tiny_processor(), DATA, base=BUCKET)
    samples = [showing("0.png", "1.png"), showing("2.png"), Words("w", np.arange(5))]
    preparer.fetch(samples)
    assert asked.together == [sorted(objects)]
    sizes = [[i.size_seen for i in preparer.prepare(s).items] for s in samples]
    assert sizes == [[(56, 84)] * 2, [(56, 84)], []]
    assert asked.alone == []
    preparer.fetch([showing("2.png")])
    preparer.prepare(showing("0.png"))  # no longer held
    assert asked.alone == [f"{BUCKET}/0.png"]


def test_what_could_not_be_fetched_fails_for_its_sample_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Asked(monkeypatch, {f"{BUCKET}/0.png": encoded(smooth(56, 84))})
    preparer = Preparer(tiny_processor(), DATA, base=BUCKET)
    good, bad = showing("0.png"), showing("1.png")
    preparer.fetch([good, bad])
    assert preparer.prepare(good).items
    with pytest.raises(SampleError, match="gone") as told:
        preparer.prepare(bad)
    assert told.value.reason == "picture"


def test_a_measurer_asks_for_heads_and_for_more_where_the_size_stands_behind_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = encoded(noise(200, 200))
    late = encoded(noise(150, 150), "TIFF", compression="tiff_lzw")  # sizes stand at its end
    assert len(large) > HEAD and len(late) > HEAD
    asked = Asked(monkeypatch, {f"{BUCKET}/a.png": large, f"{BUCKET}/b.tiff": late})
    measurer = Measurer(tiny_processor(), DATA, base=BUCKET)
    sample = showing("a.png", "b.tiff")
    measurer.fetch([sample])
    made = measurer.prepare(sample)
    assert asked.together == [[f"{BUCKET}/a.png", f"{BUCKET}/b.tiff"]]
    assert asked.alone == [f"{BUCKET}/b.tiff"]
    assert [len(item.patches_NP) for item in made.items] == [0, 0]
    whole = Preparer(tiny_processor(), DATA, base=BUCKET).prepare(sample)
    assert made.grids == whole.grids and made.input_ids == whole.input_ids


def test_a_lower_limit_of_pixels_is_never_below_the_smallest_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(smooth(224, 224)))
    sizes = {}
    for limit in (0, 112 * 112, 1):
        preparer = Preparer(tiny_processor(), DATA, base=str(tmp_path), max_pixels=limit)
        (sizes[limit],) = [item.size_seen for item in preparer.prepare(showing("a.png")).items]
    assert sizes == {0: (224, 224), 112 * 112: (112, 112), 1: (56, 56)}


def test_of_a_page_and_of_packed_words_all_is_learned() -> None:
    preparer = Preparer(tiny_processor(), DATA)
    picture = {"type": "image", "image": smooth(56, 84)}
    page = preparer.prepare(Page("p", ("before ", picture, " after")))
    assert page.loss_mask is not None
    pads = set(page.pad_index_M.tolist())
    assert not any(page.loss_mask[i] for i in pads)
    assert preparer.tokenizer.decode(page.input_ids[-6:], keep="all") == "after<|endoftext|>"
    words = preparer.prepare(Words("w", np.array([5, 6, 7])))
    assert (words.input_ids, words.loss_mask) == ([5, 6, 7], [True] * 3)
    assert words.position_ids_3T.tolist() == [[0, 1, 2]] * 3
