"""Media sources: resolved, or rejected with a one-line error and its remedy."""

from __future__ import annotations

import base64
import gzip
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl.errors import ConfigError, InputError
from qwen2vl.processor.media.source import DEFAULT_LIMITS, MediaLimits, read_head, read_source
from qwen2vl.processor.media_options import MediaOptions
from tests.media import encoded, smooth

PNG = encoded(smooth(20, 30))


def content(source: Any, **limits: Any) -> Any:
    return read_source(source, MediaLimits(**limits), "image 1").content


@pytest.mark.parametrize(
    "file_name",
    ["plain.png", "with space.png", "\u00fcber \u56fe.png", "-dash.png", "a#b?c%41.png"],
)
def test_paths_and_file_urls(tmp_path: Path, file_name: str) -> None:
    path = tmp_path / file_name
    path.write_bytes(PNG)
    for source in (path, str(path), path.as_uri()):
        found = content(source)
        assert found.read_bytes() == PNG


def test_home_and_relative_paths_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert content("~/a.png").read_bytes() == PNG
    assert content("a.png").read_bytes() == PNG


def test_bytes_and_pixels_are_returned_unchanged() -> None:
    array, image = smooth(5, 4), Image.new("RGB", (3, 3))
    assert content(PNG) == PNG
    assert content(bytearray(PNG)) == content(memoryview(PNG)) == PNG
    assert content(array) is array
    assert content(image) is image


def test_channels_are_last_in_every_array() -> None:
    array = smooth(5, 7)
    for source in (array.transpose(2, 0, 1), torch.from_numpy(array), torch.tensor(array).mT.mT):
        np.testing.assert_array_equal(content(source), array)


class Unseekable(io.RawIOBase):
    """A binary file that gives its bytes once, in small pieces, like a socket."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(min(size, 7))


def test_file_objects_are_read_from_the_beginning_and_left_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    with (tmp_path / "a.png").open("rb") as opened, gzip.open(tmp_path / "a.gz", "w+b") as zipped:
        for file in (opened, io.BytesIO(PNG)):
            for position in (0, 5, len(PNG)):
                file.seek(position)
                assert content(file) == PNG
                assert file.tell() == position and not file.closed
        zipped.write(PNG)
    with gzip.open(tmp_path / "a.gz") as file:
        assert content(file) == content(file) == PNG
    assert content(Unseekable(PNG)) == PNG


def test_file_objects_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    text = r"TextIOWrapper returns str, not bytes; open it in mode 'rb'"
    with (tmp_path / "a.png").open() as text_file, pytest.raises(InputError, match=text):
        content(text_file)
    for closed in (text_file, io.BytesIO()):
        closed.close()
        with pytest.raises(InputError, match=r"image 1: the \w+ cannot be read; open it again in"):
            content(closed)
    text = r"BufferedWriter cannot be read; open it again in mode 'rb'"
    with (tmp_path / "b.png").open("wb") as write_only, pytest.raises(InputError, match=text):
        content(write_only)
    with pytest.raises(InputError, match="image 1 has more than 50 bytes, which is the limit"):
        content(io.BytesIO(PNG), max_bytes=50)
    with pytest.raises(InputError, match=r"image 1 is empty \(0 bytes\); save or download"):
        content(io.BytesIO())


def test_data_urls_in_both_encodings() -> None:
    coded = base64.b64encode(PNG).decode()
    media = read_source(f"data:image/png;base64,{coded}", DEFAULT_LIMITS, "image 1")
    assert media.content == PNG
    assert media.content_type == "image/png"
    assert content(f"DATA:;base64,{coded[:40]}\n{coded[40:]}") == PNG
    assert content("data:text/plain,a%20b") == b"a b"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("nowhere.png", "image 1: file 'nowhere.png' not found; check the path"),
        (".", "image 1: '.' is a folder; name a file in it"),
        ("a\0b", "cannot be a file name"),
        ("x!" * 2500, r"image 1: '[x!]{117}\.\.\.' cannot be a file name"),
        (
            "x" * 5000,
            r"image 1: 'x{117}\.\.\.' looks like base64, not a path; write data:",
        ),
        ("file://elsewhere/a.png", "names the host 'elsewhere'"),
        ("s3://bucket/a.png", "s3:// is not supported; use http, https, file or data"),
        ("data:image/png", "data URL without a comma"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png;base64,", r"image 1 is empty \(0 bytes\)"),
        (b"", r"image 1 is empty \(0 bytes\)"),
        ([PNG], "image 1: a list is not an image; give a list of frames as video"),
        (None, "image 1: cannot read a NoneType; give a path, bytes, a binary file object, a PIL"),
        (7, "cannot read a int"),
        (float("nan"), r"image 1: cannot read a missing value \(NaN\); give a path"),
    ],
)
def test_invalid_sources_are_rejected(source: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        content(source)


def test_pipes_and_empty_files_are_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a pipe or a device"):
        content(tmp_path / "pipe")
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputError, match=r"is empty \(0 bytes\)"):
        content(tmp_path / "empty.png")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "locked.png").write_bytes(PNG)
    (tmp_path / "locked.png").chmod(0)
    with pytest.raises(InputError, match="no permission to read"):
        content(tmp_path / "locked.png")


def test_limits_on_origin_and_size(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    for source in (path, path.as_uri()):
        with pytest.raises(InputError, match="local files are not allowed here"):
            content(source, allow_files=False)
    with pytest.raises(InputError, match="URLs are not allowed here"):
        content("https://example.com/a.png", allow_urls=False)
    coded = "data:;base64," + base64.b64encode(PNG).decode()
    for source in (path, PNG, coded):
        with pytest.raises(InputError, match="limit is 50"):
            content(source, max_bytes=50)
    with pytest.raises(ConfigError, match="max_image_pixels 1,000,000,000 exceeds"):
        MediaLimits(max_image_pixels=10**9)


def test_read_head_of_file_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    for source in (tmp_path / "a.png", PNG):
        assert read_head(read_source(source, DEFAULT_LIMITS, "image 1"), 8) == PNG[:8]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"min_pixels": 5000, "max_pixels": 4000},
            "min_pixels 5000 is greater than max_pixels 4000",
        ),
        ({"min_frames": 9, "max_frames": 3}, "min_frames 9 is greater than max_frames 3"),
        ({"video_start": 3.0, "video_end": 1.0}, "video_start 3.0 is greater than video_end 1.0"),
        ({"fps": 2.0, "nframes": 8}, "fps 2.0 and nframes 8 exclude each other; use either one"),
        ({"min_pixels": -1}, "min_pixels is -1, must lie between 1 and 1e"),
        ({"max_pixels": 10**12}, "max_pixels is 1000000000000, must lie between"),
        ({"nframes": 0}, "nframes is 0, must lie between 1 and"),
        ({"nframes": 2.5}, "nframes is 2.5, must be a whole number"),
        ({"nframes": True}, "nframes is True, must be a whole number"),
        ({"fps": float("nan")}, "fps is nan, must be a number"),
        ({"fps": "2"}, "fps is '2', must be a number"),
        ({"fps": 0}, "fps is 0, must lie between"),
        ({"nframes": 10**5000}, "nframes is <int>, must lie between"),
        ({"detail": "best"}, "detail is 'best', must be one of low, high, auto, original"),
        ({"detail": "low", "resized_height": 56, "resized_width": 56}, "resized_height 56 and det"),
        ({"resized_height": 56}, "resized_height and resized_width go together"),
        (
            {"resized_height": 56, "resized_width": 56, "max_pixels": 4000},
            "resized_height 56 and max_pixels 4000 exclude each other",
        ),
    ],
)
def test_options_are_validated_when_built(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        MediaOptions(**options)


def test_to_dict_returns_the_options_that_are_set() -> None:
    assert MediaOptions(fps=1, min_frames=2).to_dict() == {"fps": 1, "min_frames": 2}
    assert MediaOptions().to_dict() == {}
