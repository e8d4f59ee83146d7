"""Bad inputs in training: refused by header or when decoded, always counted, never a crash.

Test ids are the cases of the project's list of bad inputs: what inference refuses must be counted
in training, and what it accepts must have the size that its header gave.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.data.dataset import PackedDataset
from qwen2vl.data.formats import Conversation, SampleError
from qwen2vl.data.lengths import measure_sample
from qwen2vl.data.preprocess import HeaderPreprocessor, SamplePreprocessor
from qwen2vl.errors import ConfigError, InputError
from tests.data.rows import conversation, create_data_config, write_media, write_rows
from tests.media import animation, encoded, encoded_video, noise, smooth, with_matrix
from tests.processor import test_bad_images, test_bad_videos
from tests.tiny import tiny_processor

DATA = DataConfig(sources=(SourceConfig(path="x"),), frame_cache_gb=0)
SLOW = "real bomb"  # takes seconds to make, and is refused for its header like the other one

BAD_IMAGES = [row for row in test_bad_images.REJECTED if not row[0].startswith(SLOW)]
BAD_VIDEOS = [row for row in test_bad_videos.REJECTED if "limits" not in row[2]]


def conversation_about(kind: str, source: Any, **options: Any) -> Conversation:
    item = {"type": kind, kind: source, **options}
    message = {"role": "user", "content": [item, {"type": "text", "text": "what?"}]}
    return Conversation("a sample", [message, {"role": "assistant", "content": "nothing"}])


def refusal(sample: Conversation, data: DataConfig = DATA) -> SampleError:
    with pytest.raises(SampleError) as caught:
        SamplePreprocessor(tiny_processor(), data).prepare(sample)
    return caught.value


@pytest.mark.parametrize(
    ("make", "text"), [row[1:] for row in BAD_IMAGES], ids=[row[0] for row in BAD_IMAGES]
)
def test_bad_images_are_counted(make: Callable[[], Any], text: str) -> None:
    source = make()
    error = refusal(conversation_about("image", source))
    assert error.reason == "image"
    assert re.search(text, str(error))
    measured = measure_sample(
        conversation_about("image", source), HeaderPreprocessor(tiny_processor(), DATA)
    )
    assert measured.bad is None or measured.bad[0] == "image"


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [row[1:] for row in BAD_VIDEOS],
    ids=[row[0] for row in BAD_VIDEOS],
)
def test_bad_videos_are_counted(
    make: Callable[[], Any], options: dict[str, Any], text: str
) -> None:
    error = refusal(conversation_about("video", make(), **options))
    assert error.reason == ("messages" if options else "video")  # options are read before media
    assert re.search(text, str(error))


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags.tobytes()


IMAGE = smooth(60, 130)
GOOD: list[tuple[str, str, Callable[[], Any]]] = [
    ("JPEG, PNG or GIF missing last byte", "image", lambda: encoded(IMAGE)[:-1]),
    ("PNG with trailing garbage", "image", lambda: encoded(IMAGE) + b"garbage"),
    ("1x1 pixel image", "image", lambda: Image.new("RGB", (1, 1))),
    ("image smaller than 28 px on a side", "image", lambda: encoded(noise(27, 257))),
    ("aspect ratio exactly 200", "image", lambda: encoded(Image.new("RGB", (2800, 14)))),
    *(
        ("EXIF orientation 2..8", "image", lambda n=n: encoded(IMAGE, "JPEG", exif=exif(n)))
        for n in range(2, 9)
    ),
    (
        "EXIF garbage or orientation 99",
        "image",
        lambda: encoded(IMAGE, "JPEG", exif=b"Exif\0\0" + b"\xff" * 200),
    ),
    ("CMYK JPEG", "image", lambda: encoded(Image.new("CMYK", (70, 40)), "JPEG")),
    ("16-bit grayscale PNG/TIFF", "image", lambda: encoded(np.full((40, 70), 32768, np.uint16))),
    ("palette image with transparency", "image", lambda: encoded(Image.new("P", (70, 40)))),
    ("RGBA", "image", lambda: Image.new("RGBA", (70, 40))),
    ("1-bit and L images", "image", lambda: encoded(Image.new("1", (70, 40)))),
    ("animated GIF as image", "image", lambda: animation("GIF")),
    ("broken ICC profile", "image", lambda: encoded(IMAGE, icc_profile=bytes(500))),
    *(("1, 2, 3 frame video", "video", lambda n=n: encoded_video(n)) for n in (1, 2, 3)),
    ("huge source fps 1000", "video", lambda: encoded_video(300, rate=1000, codec="mpeg4")),
    ("variable frame rate", "video", lambda: encoded_video(6, stamps=[0, 1, 2, 50, 51, 100])),
    ("container without frame count", "video", lambda: encoded_video(container="matroska")),
    ("rotated video", "video", lambda: with_matrix(encoded_video(4), (0, 1, -1, 0))),
    (
        "odd dimensions 65x49",
        "video",
        lambda: encoded_video(4, width=65, height=49, pixel_format="yuv444p"),
    ),
    ("animated GIF as video", "video", lambda: animation("GIF", duration=100)),
]


@pytest.mark.parametrize(("kind", "make"), [row[1:] for row in GOOD], ids=[row[0] for row in GOOD])
def test_unusual_but_valid_media_have_the_size_of_their_headers(
    kind: str, make: Callable[[], Any]
) -> None:
    sample = conversation_about(kind, make())
    measured = measure_sample(sample, HeaderPreprocessor(tiny_processor(), DATA))
    prepared = SamplePreprocessor(tiny_processor(), DATA).prepare(sample)
    assert measured.bad is None
    assert measured.tokens == len(prepared.input_ids)
    assert list(measured.grids) == prepared.grids
    assert prepared.loss_mask is not None and measured.targets == sum(prepared.loss_mask[1:])


def test_a_video_with_broken_frames_is_counted_for_its_length(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(
        test_bad_videos.wiped(encoded_video(40, width=320, height=240), 0.5, 340)
    )
    rows = [conversation("<video>what?", "x", video="v.mp4"), conversation("q", "a")]
    dataset = open_dataset(tmp_path, rows, global_batch_size=1)
    examples, bad = dataset.read(range(2))
    assert len(examples) == 1
    assert [sample.reason for sample in bad] == ["length"]


def test_a_video_of_too_many_frames_is_refused_by_its_packets() -> None:
    data = DataConfig(sources=(SourceConfig(path="x"),), max_frames=300)
    long = conversation_about("video", encoded_video(301, width=32, height=32, codec="mpeg4"))
    measured = measure_sample(long, HeaderPreprocessor(tiny_processor(), data))
    assert measured.bad is not None
    assert measured.bad[0] == "video"
    assert "has more than 300 frames, which is the limit" in measured.bad[1]


def open_dataset(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> PackedDataset:
    data = create_data_config(
        folder, write_rows(folder / "rows.jsonl", rows), **{"max_bad_fraction": 1.0, **fields}
    )
    return PackedDataset.open(data, tiny_processor(), seed=0)


BAD_ROWS: list[tuple[str, Any, str, str]] = [
    ("missing file", conversation("<image>q", "a", image="no.png"), "missing", "no.png is missing"),
    ("missing video", conversation("<video>q", "a", video="no.mp4"), "missing", "is missing in"),
    (
        "no placeholder",
        conversation("q", "a", image="0.png"),
        "placeholders",
        "0 <image> tags for 1",
    ),
    (
        "too many placeholders",
        conversation("<image><image>q", "a", image="0.png"),
        "placeholders",
        "2 <image> tags for 1 images; each needs one",
    ),
    ("wrong kind", conversation("<video>q", "a", image="0.png"), "placeholders", "0 <image> tags"),
    (
        "sample with no answer tokens (all labels -100)",
        {"messages": [{"role": "user", "content": "q"}]},
        "answer",
        "no answer to learn from",
    ),
    (
        "a message of an unknown role",
        {"conversations": [{"from": "cat", "value": "x"}]},
        "messages",
        "'cat'",
    ),
    (
        "a message of a list of roles",
        {"conversations": [{"from": ["a"], "value": "x"}]},
        "messages",
        "['a']",
    ),
    (
        "a message of an object as role",
        {"conversations": [{"from": {}, "value": "x"}]},
        "messages",
        "from {}",
    ),
    ("a number for tools", {**conversation("q", "a"), "tools": 5}, "messages", "tools is 5; it"),
    (
        "a list of tools that are none",
        {**conversation("q", "a"), "tools": "[5]"},
        "messages",
        "is [5]; it",
    ),
    (
        "a file name that is too long",
        conversation("<image>q", "a", image="x" * 256 + ".png"),
        "missing",
        "cannot be opened: File name too long",
    ),
    (
        "a home folder of an unknown user",
        conversation("<image>q", "a", image="~nouser/x"),
        "missing",
        "~nouser/x is missing in",
    ),
    (
        "no known format",
        {"question": "q", "answer": "a"},
        "messages",
        "none of messages, conversations",
    ),
    ("a list for a row", [1, 2], "messages", "the row is a list"),
    ("no messages", {"messages": []}, "messages", "messages is []"),
    ("a bare string", {"messages": ["hello"]}, "messages", "not an object"),
    (
        "half of a surrogate pair",
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "\ud800"},
            ]
        },
        "messages",
        "half of a surrogate pair",
    ),
    (
        "a special token in a document",
        {"text": "a<|im_end|>b"},
        "text",
        "the special token <|im_end|>",
    ),
]


@pytest.mark.parametrize(
    ("row", "reason", "text"), [row[1:] for row in BAD_ROWS], ids=[row[0] for row in BAD_ROWS]
)
def test_a_bad_sample_is_counted_by_reason_and_id_and_not_replaced(
    tmp_path: Path, row: Any, reason: str, text: str
) -> None:
    write_media(tmp_path)
    dataset = open_dataset(
        tmp_path, [conversation("q", "a"), row, conversation("q", "b")], global_batch_size=1
    )
    examples, bad = dataset.read(dataset.plan.members(0))
    assert len(examples) == 2
    (bad_sample,) = bad
    assert (bad_sample.id, bad_sample.source, bad_sample.reason) == ("rows.jsonl:2", "rows", reason)
    assert text in bad_sample.text


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "caf\xe9"}', "byte 13 of the line is not UTF-8"),
        (b'{"text": "cut', "the line is not JSON"),
        (b"[" * 100_000, "the line is not JSON"),
    ],
)
def test_text_that_cannot_be_decoded(tmp_path: Path, line: bytes, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "three"}')
    data = create_data_config(tmp_path, path, max_bad_fraction=1.0, global_batch_size=1)
    dataset = PackedDataset.open(data, tiny_processor(), seed=0)
    examples, bad = dataset.read(range(3))
    assert len(examples) == 2
    assert [(b.id, b.reason) for b in bad] == [
        ("rows.jsonl:3", "text")
    ]  # line numbers as in editors
    assert text in bad[0].text


LONG = conversation("q", "long " * 200)


def test_a_sample_longer_than_a_bin_is_refused_by_name(tmp_path: Path) -> None:
    text = r"rows.jsonl:2 has 1,\d+ tokens; .* 512 tokens: raise data.max_tokens, or data.oversize="
    with pytest.raises(InputError, match=text):
        open_dataset(tmp_path, [conversation("q", "a"), LONG])


def test_an_oversized_sample_is_dropped_and_counted(tmp_path: Path) -> None:
    dataset = open_dataset(
        tmp_path, [conversation("q", "a"), LONG], oversize="drop", global_batch_size=1
    )
    examples, bad = dataset.read(range(2))
    assert len(examples) == 1
    assert [b.reason for b in bad] == ["oversize"]
    assert re.search(r"1,\d+ tokens, the limit of a bin is 512", bad[0].text)


def test_the_images_of_an_oversized_sample_are_resized(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(encoded(smooth(448, 448)))
    (tmp_path / "small.png").write_bytes(encoded(smooth(56, 56)))
    images = ["large.png", "large.png", "small.png"]
    rows = [conversation("<image><image><image>q", "a", images=images), conversation("q", "a")]
    dataset = open_dataset(tmp_path, rows, oversize="resize", max_tokens=160, global_batch_size=1)
    examples, bad = dataset.read(range(2))
    assert not bad
    (model_input,) = [e.input for e in examples if e.input.items]
    assert len(model_input.input_ids) == dataset.tokens[0] <= 160
    assert [item.resized_size for item in model_input.items] == [(140, 140), (140, 140), (56, 56)]


def test_oversized_text_cannot_be_resized(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows.jsonl:1 has .*: raise data.max_tokens, or shorten"):
        open_dataset(tmp_path, [LONG], oversize="resize")


def test_a_missing_or_empty_dataset_file_is_refused(tmp_path: Path) -> None:
    def open_file(name: str) -> None:
        data = create_data_config(tmp_path, tmp_path / name)
        PackedDataset.open(data, tiny_processor(), seed=0)

    with pytest.raises(InputError, match=r"none.jsonl: no such file"):
        open_file("none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"empty.jsonl holds no line"):
        open_file("empty.jsonl")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"notes.txt; give files of one kind"):
        open_file("notes.txt")
    (tmp_path / "cut.json").write_text(json.dumps([{"text": "x"}])[:-3])
    with pytest.raises(InputError, match=r"cut.json is not JSON: .* is it cut short\?"):
        open_file("cut.json")
