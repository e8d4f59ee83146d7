"""Preprocessing: resolution of media paths, concurrent fetches, sizes from headers.

Defects of samples, case by case, are tested in tests/train/test_bad_inputs.py.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.data.formats import Conversation, Document, SampleError, TextTokens
from qwen2vl.data.preprocess import HEADER_BYTES, HeaderPreprocessor, SamplePreprocessor
from qwen2vl.data.storage import Storage
from qwen2vl.errors import InputError
from tests.media import encoded, noise, smooth
from tests.tiny import tiny_processor

DATA = DataConfig(sources=(SourceConfig(path="x"),), frame_cache_gb=0)
BUCKET = "memory://bucket"


def conversation_with_images(*sources: Any) -> Conversation:
    images = [{"type": "image", "image": source} for source in sources]
    user_message = {"role": "user", "content": [*images, {"type": "text", "text": "what?"}]}
    return Conversation("a sample", [user_message, {"role": "assistant", "content": "nothing"}])


class RecordingStorage:
    """A storage that records which objects are read, and how."""

    def __init__(self, patch: pytest.MonkeyPatch, objects: dict[str, bytes]) -> None:
        self.batched_reads: list[list[str]] = []
        self.single_reads: list[str] = []
        self.objects = objects

        def read_many(
            _: Storage, addresses: Iterable[str], num_bytes: int | None = None
        ) -> dict[str, bytes | InputError]:
            self.batched_reads.append(list(addresses))
            missing = InputError("gone")
            return {
                a: objects[a][:num_bytes] if a in objects else missing
                for a in self.batched_reads[-1]
            }

        def read(_: Storage, address: str, num_bytes: int | None = None) -> bytes:
            self.single_reads.append(address)
            return objects[address][:num_bytes]

        patch.setattr(Storage, "read_many", read_many)
        patch.setattr(Storage, "read", read)


def test_media_of_a_bin_are_fetched_together_and_then_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects = {f"{BUCKET}/{i}.png": encoded(smooth(56, 84, i)) for i in range(3)}
    storage = RecordingStorage(monkeypatch, objects)
    preprocessor = SamplePreprocessor(tiny_processor(), DATA, media_root=BUCKET)
    samples = [
        conversation_with_images("0.png", "1.png"),
        conversation_with_images("2.png"),
        TextTokens("w", np.arange(5)),
    ]
    preprocessor.prefetch(samples)
    assert storage.batched_reads == [sorted(objects)]
    sizes = [[i.resized_size for i in preprocessor.prepare(s).items] for s in samples]
    assert sizes == [[(56, 84)] * 2, [(56, 84)], []]
    assert storage.single_reads == []
    preprocessor.prefetch([conversation_with_images("2.png")])
    preprocessor.prepare(conversation_with_images("0.png"))  # no longer prefetched
    assert storage.single_reads == [f"{BUCKET}/0.png"]


def test_a_failed_fetch_affects_only_its_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    RecordingStorage(monkeypatch, {f"{BUCKET}/0.png": encoded(smooth(56, 84))})
    preprocessor = SamplePreprocessor(tiny_processor(), DATA, media_root=BUCKET)
    good, bad = conversation_with_images("0.png"), conversation_with_images("1.png")
    preprocessor.prefetch([good, bad])
    assert preprocessor.prepare(good).items
    with pytest.raises(SampleError, match="gone") as caught:
        preprocessor.prepare(bad)
    assert caught.value.reason == "image"


def test_headers_are_fetched_and_the_whole_file_if_they_lack_the_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = encoded(noise(200, 200))
    size_at_end = encoded(noise(150, 150), "TIFF", compression="tiff_lzw")
    assert len(large) > HEADER_BYTES and len(size_at_end) > HEADER_BYTES
    storage = RecordingStorage(
        monkeypatch, {f"{BUCKET}/a.png": large, f"{BUCKET}/b.tiff": size_at_end}
    )
    preprocessor = HeaderPreprocessor(tiny_processor(), DATA, media_root=BUCKET)
    sample = conversation_with_images("a.png", "b.tiff")
    preprocessor.prefetch([sample])
    measured = preprocessor.prepare(sample)
    assert storage.batched_reads == [[f"{BUCKET}/a.png", f"{BUCKET}/b.tiff"]]
    assert storage.single_reads == [f"{BUCKET}/b.tiff"]
    assert [len(item.patches_NP) for item in measured.items] == [0, 0]
    full = SamplePreprocessor(tiny_processor(), DATA, media_root=BUCKET).prepare(sample)
    assert measured.grids == full.grids and measured.input_ids == full.input_ids


def test_a_lower_max_pixels_is_never_below_min_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(smooth(224, 224)))
    sizes = {}
    for limit in (0, 112 * 112, 1):
        preprocessor = SamplePreprocessor(
            tiny_processor(), DATA, media_root=str(tmp_path), max_pixels=limit
        )
        (sizes[limit],) = [
            item.resized_size
            for item in preprocessor.prepare(conversation_with_images("a.png")).items
        ]
    assert sizes == {0: (224, 224), 112 * 112: (112, 112), 1: (56, 56)}


def test_all_text_of_documents_and_token_stores_is_supervised() -> None:
    preprocessor = SamplePreprocessor(tiny_processor(), DATA)
    image = {"type": "image", "image": smooth(56, 84)}
    document = preprocessor.prepare(Document("p", ("before ", image, " after")))
    assert document.loss_mask is not None
    pads = set(document.placeholder_index_M.tolist())
    assert not any(document.loss_mask[i] for i in pads)
    assert (
        preprocessor.tokenizer.decode(document.input_ids[-6:], keep_special="all")
        == "after<|endoftext|>"
    )
    text_tokens = preprocessor.prepare(TextTokens("w", np.array([5, 6, 7])))
    assert (text_tokens.input_ids, text_tokens.loss_mask) == ([5, 6, 7], [True] * 3)
    assert text_tokens.position_ids_3T.tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("<|box_start|>(412,2166),(621,2195)<|box_end|>", "messages[1] has 2166 in <|box_start|>"),
        ([{"type": "box", "box": [0.1, 0.2, 0.6, 0.8]}], "content[0].box is [0.1, 0.2, 0.6, 0.8]"),
        (
            [{"type": "box", "box": [10, 20, 600, 800]}],
            "an image of 84 x 56 (width x height): more",
        ),
    ],
)
def test_boxes_that_do_not_fit_their_image_are_bad_samples(answer: Any, error: str) -> None:
    """Measured, too, so that a run names them before its first step."""
    sample = conversation_with_images(smooth(56, 84))
    sample = replace(
        sample, messages=[sample.messages[0], {"role": "assistant", "content": answer}]
    )
    for preprocessor in (SamplePreprocessor, HeaderPreprocessor):
        with pytest.raises(SampleError, match=re.escape(error)) as caught:
            preprocessor(tiny_processor(), DATA).prepare(sample)
        assert caught.value.reason == "box"
    with pytest.raises(SampleError, match="the text has 2166 in") as caught:
        SamplePreprocessor(tiny_processor(), DATA).prepare(
            Document("d", ("<|box_start|>(412,2166),(621,2195)<|box_end|>",))
        )
    assert caught.value.reason == "box"


@pytest.mark.parametrize("side", [14, 280])  # the longer text is no file name of any system
def test_base64_in_place_of_a_path_is_named_as_such(side: int) -> None:
    text = base64.b64encode(encoded(noise(side, side))).decode()
    preprocessor = SamplePreprocessor(tiny_processor(), DATA)
    with pytest.raises(SampleError, match="looks like base64, not a path") as caught:
        preprocessor.prepare(conversation_with_images(text))
    assert caught.value.reason == "image"
    assert len(str(caught.value)) < 300
