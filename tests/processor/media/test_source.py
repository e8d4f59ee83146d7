"""Media sources: resolved, or rejected with a one-line error and its remedy."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen2vl.errors import ConfigError, InputError
from qwen2vl.processor.media.source import (
    DEFAULT_LIMITS,
    MediaLimits,
    MediaOptions,
    read_head,
    read_source,
    sniff_type,
)
from tests.media import audio_only, encoded, encoded_video, smooth

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
    array, image = smooth(4, 5), Image.new("RGB", (3, 3))
    assert content(PNG) == PNG
    assert content(bytearray(PNG)) == PNG
    assert content(array) is array
    assert content(image) is image


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
        ("x" * 5000, r"image 1: 'x{117}\.\.\.' cannot be a file name"),
        ("file://elsewhere/a.png", "names the host 'elsewhere'"),
        ("s3://bucket/a.png", "s3:// is not supported; use http, https, file or data"),
        ("data:image/png", "data URL without a comma"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png;base64,", r"image 1 is empty \(0 bytes\)"),
        (b"", r"image 1 is empty \(0 bytes\)"),
        (None, "image 1: cannot read a NoneType; give a path, bytes, a PIL image"),
        (7, "cannot read a int"),
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


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (PNG, "image/png"),
        (encoded(smooth(9, 9), "WEBP"), "image/webp"),
        (encoded(smooth(9, 9), "TIFF"), "image/tiff"),
        (encoded_video(2), "video/mp4"),
        (audio_only(), "video/mp4"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "image/heic"),
        (b"%PDF-1.7\n", "application/pdf"),
        (b"\xef\xbb\xbf <!DOCTYPE html><p>", "text/html"),
        (b"<?xml version='1.0'?>\n<svg xmlns=''>", "image/svg+xml"),
        (b'  {"error": 404}', "application/json"),
        (b"hello there", "text/plain"),
        (b"\x01\x02\x03\x04", "application/octet-stream"),
        (b"", "application/octet-stream"),
    ],
)
def test_sniffed_media_types(head: bytes, kind: str) -> None:
    assert sniff_type(head[:64]) == kind


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
