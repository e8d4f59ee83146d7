"""Bad inputs in training: refused by header or by pixels, always counted, never a crash.

Test ids are the cases of the project's list of bad inputs; what the library refuses for an answer,
the trainer must count, and what it accepts must be as large as its header said.
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

from qwen2vl.data.config import DataConfig, Source
from qwen2vl.data.dataset import Corpus
from qwen2vl.data.formats import Conversation, SampleError
from qwen2vl.data.lengths import size_of
from qwen2vl.data.preprocess import Measurer, Preparer
from qwen2vl.errors import ConfigError, InputError
from tests.data.rows import conversation, data_of, write_media, write_rows
from tests.media import animation, clip, encoded, noise, smooth, with_matrix
from tests.processor import test_bad_images, test_bad_videos
from tests.tiny import tiny_processor

DATA = DataConfig(sources=(Source(path="x"),), cache_gb=0)
SLOW = "real bomb"  # seconds to make, and refused for its header like the other one

BAD_PICTURES = [row for row in test_bad_images.REFUSED if not row[0].startswith(SLOW)]
BAD_VIDEOS = [row for row in test_bad_videos.REFUSED if "limits" not in row[2]]


def about(kind: str, source: Any, **options: Any) -> Conversation:
    item = {"type": kind, kind: source, **options}
    asked = {"role": "user", "content": [item, {"type": "text", "text": "what?"}]}
    return Conversation("a sample", [asked, {"role": "assistant", "content": "nothing"}])


def refusal(sample: Conversation, data: DataConfig = DATA) -> SampleError:
    with pytest.raises(SampleError) as caught:
        Preparer(tiny_processor(), data).prepare(sample)
    return caught.value


@pytest.mark.parametrize(
    ("make", "text"), [row[1:] for row in BAD_PICTURES], ids=[row[0] for row in BAD_PICTURES]
)
def test_bad_pictures_are_counted(make: Callable[[], Any], text: str) -> None:
    source = make()
    error = refusal(about("image", source))
    assert error.reason == "picture"
    assert re.search(text, str(error))
    measured = size_of(about("image", source), Measurer(tiny_processor(), DATA))
    assert measured.bad is None or measured.bad[0] == "picture"


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [row[1:] for row in BAD_VIDEOS],
    ids=[row[0] for row in BAD_VIDEOS],
)
def test_bad_videos_are_counted(
    make: Callable[[], Any], options: dict[str, Any], text: str
) -> None:
    error = refusal(about("video", make(), **options))
    assert error.reason == ("messages" if options else "video")  # options are read before media
    assert re.search(text, str(error))


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags.tobytes()


PICTURE = smooth(60, 130)
GOOD: list[tuple[str, str, Callable[[], Any]]] = [
    ("PNG or GIF missing last byte", "image", lambda: encoded(PICTURE)[:-1]),
    ("PNG with trailing garbage", "image", lambda: encoded(PICTURE) + b"garbage"),
    ("1x1 pixel image", "image", lambda: Image.new("RGB", (1, 1))),
    ("image smaller than 28 px on a side", "image", lambda: encoded(noise(27, 257))),
    ("aspect ratio exactly 200", "image", lambda: encoded(Image.new("RGB", (2800, 14)))),
    *(
        ("EXIF orientation 2..8", "image", lambda n=n: encoded(PICTURE, "JPEG", exif=exif(n)))
        for n in range(2, 9)
    ),
    (
        "EXIF garbage or orientation 99",
        "image",
        lambda: encoded(PICTURE, "JPEG", exif=b"Exif\0\0" + b"\xff" * 200),
    ),
    ("CMYK JPEG", "image", lambda: encoded(Image.new("CMYK", (70, 40)), "JPEG")),
    ("16-bit grayscale PNG/TIFF", "image", lambda: encoded(np.full((40, 70), 32768, np.uint16))),
    ("palette image with transparency", "image", lambda: encoded(Image.new("P", (70, 40)))),
    ("RGBA", "image", lambda: Image.new("RGBA", (70, 40))),
    ("1-bit and L images", "image", lambda: encoded(Image.new("1", (70, 40)))),
    ("animated GIF as image", "image", lambda: animation("GIF")),
    ("broken ICC profile", "image", lambda: encoded(PICTURE, icc_profile=bytes(500))),
    ("PNG sent as video", "video", lambda: encoded(PICTURE)),
    *(("1, 2, 3 frame video", "video", lambda n=n: clip(n)) for n in (1, 2, 3)),
    ("huge source fps 1000", "video", lambda: clip(300, rate=1000, codec="mpeg4")),
    ("variable frame rate", "video", lambda: clip(6, stamps=[0, 1, 2, 50, 51, 100])),
    ("container without frame count", "video", lambda: clip(container="matroska")),
    ("rotated video", "video", lambda: with_matrix(clip(4), (0, 1, -1, 0))),
    ("odd dimensions 65x49", "video", lambda: clip(4, width=65, height=49, pixel_format="yuv444p")),
    ("animated GIF as video", "video", lambda: animation("GIF", duration=100)),
]


@pytest.mark.parametrize(("kind", "make"), [row[1:] for row in GOOD], ids=[row[0] for row in GOOD])
def test_odd_but_good_ones_are_as_large_as_their_headers_say(
    kind: str, make: Callable[[], Any]
) -> None:
    sample = about(kind, make())
    measured = size_of(sample, Measurer(tiny_processor(), DATA))
    made = Preparer(tiny_processor(), DATA).prepare(sample)
    assert measured.bad is None
    assert measured.tokens == len(made.input_ids)
    assert list(measured.grids) == made.grids
    assert made.loss_mask is not None and measured.targets == sum(made.loss_mask[1:])


def test_broken_frames_in_the_middle_are_counted_for_their_length(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(
        test_bad_videos.wiped(clip(40, width=320, height=240), 0.5, 340)
    )
    rows = [conversation("<video>what?", "x", video="v.mp4"), conversation("q", "a")]
    corpus = opened(tmp_path, rows, bins=1)
    examples, bad = corpus.read(range(2))
    assert len(examples) == 1
    assert [sample.reason for sample in bad] == ["length"]


def test_a_video_of_too_many_frames_is_refused_by_its_packets() -> None:
    data = DataConfig(sources=(Source(path="x"),), max_frames=300)
    long = about("video", clip(301, width=32, height=32, codec="mpeg4"))
    measured = size_of(long, Measurer(tiny_processor(), data))
    assert measured.bad is not None
    assert measured.bad[0] == "video"
    assert "has more than 300 frames, which is the limit" in measured.bad[1]


def opened(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> Corpus:
    data = data_of(folder, write_rows(folder / "rows.jsonl", rows), **{"max_bad": 1.0, **fields})
    return Corpus.open(data, tiny_processor(), seed=0)


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
        "2 <image> tags for 1 pictures; each needs one",
    ),
    ("wrong kind", conversation("<video>q", "a", image="0.png"), "placeholders", "0 <image> tags"),
    (
        "sample with no answer tokens (all labels -100)",
        {"messages": [{"role": "user", "content": "q"}]},
        "answer",
        "no answer to learn from",
    ),
    ("a turn of nobody", {"conversations": [{"from": "cat", "value": "x"}]}, "messages", "'cat'"),
    ("a turn of many", {"conversations": [{"from": ["a"], "value": "x"}]}, "messages", "['a']"),
    ("a turn of an object", {"conversations": [{"from": {}, "value": "x"}]}, "messages", "from {}"),
    ("a number for tools", {**conversation("q", "a"), "tools": 5}, "messages", "tools is 5; it"),
    ("a list of no tools", {**conversation("q", "a"), "tools": "[5]"}, "messages", "is [5]; it"),
    (
        "a name longer than a file's can be",
        conversation("<image>q", "a", image="x" * 256 + ".png"),
        "missing",
        "cannot be looked for: File name too long",
    ),
    (
        "a user that is not there",
        conversation("<image>q", "a", image="~nouser/x"),
        "missing",
        "~nouser/x is missing in",
    ),
    ("no dialect", {"question": "q", "answer": "a"}, "messages", "none of messages, conversations"),
    ("a list for a row", [1, 2], "messages", "the row is a list"),
    ("no turns", {"messages": []}, "messages", "messages is []"),
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
    ("structure in a page", {"text": "a<|im_end|>b"}, "text", "the special token <|im_end|>"),
]


@pytest.mark.parametrize(
    ("row", "reason", "text"), [row[1:] for row in BAD_ROWS], ids=[row[0] for row in BAD_ROWS]
)
def test_one_bad_sample_is_counted_by_reason_and_id_and_nothing_takes_its_place(
    tmp_path: Path, row: Any, reason: str, text: str
) -> None:
    write_media(tmp_path)
    corpus = opened(tmp_path, [conversation("q", "a"), row, conversation("q", "b")], bins=1)
    examples, bad = corpus.read(corpus.plan.members(0))
    assert len(examples) == 2
    (told,) = bad
    assert (told.id, told.source, told.reason) == ("rows.jsonl:2", "rows", reason)
    assert text in told.text


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
    data = data_of(tmp_path, path, max_bad=1.0, bins=1)
    corpus = Corpus.open(data, tiny_processor(), seed=0)
    examples, bad = corpus.read(range(3))
    assert len(examples) == 2
    assert [(b.id, b.reason) for b in bad] == [("rows.jsonl:3", "text")]  # as editors count lines
    assert text in bad[0].text


LONG = conversation("q", "long " * 200)


def test_a_sample_longer_than_a_bin_is_refused_by_name(tmp_path: Path) -> None:
    text = r"rows.jsonl:2 has 1,\d+ tokens; .* 512 tokens: raise data.max_tokens, or data.oversize="
    with pytest.raises(InputError, match=text):
        opened(tmp_path, [conversation("q", "a"), LONG])


def test_or_dropped_and_counted(tmp_path: Path) -> None:
    corpus = opened(tmp_path, [conversation("q", "a"), LONG], oversize="drop", bins=1)
    examples, bad = corpus.read(range(2))
    assert len(examples) == 1
    assert [b.reason for b in bad] == ["oversize"]
    assert re.search(r"1,\d+ tokens, the limit of a bin is 512", bad[0].text)


def test_or_its_pictures_are_made_smaller(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(encoded(smooth(448, 448)))
    (tmp_path / "small.png").write_bytes(encoded(smooth(56, 56)))
    images = ["large.png", "large.png", "small.png"]
    rows = [conversation("<image><image><image>q", "a", images=images), conversation("q", "a")]
    corpus = opened(tmp_path, rows, oversize="resize", max_tokens=160, bins=1)
    examples, bad = corpus.read(range(2))
    assert not bad
    (seen,) = [e.input for e in examples if e.input.items]
    assert len(seen.input_ids) == corpus.tokens[0] <= 160
    assert [item.size_seen for item in seen.items] == [(140, 140), (140, 140), (56, 56)]


def test_words_cannot_be_made_smaller(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows.jsonl:1 has .*: raise data.max_tokens, or shorten"):
        opened(tmp_path, [LONG], oversize="resize")


def test_dataset_file_missing_or_empty(tmp_path: Path) -> None:
    def open_file(name: str) -> None:
        data = data_of(tmp_path, tmp_path / name)
        Corpus.open(data, tiny_processor(), seed=0)

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
