"""Data URLs: decoded, or refused for what is wrong with them; base64 without a head."""

from __future__ import annotations

import base64
from pathlib import Path
from urllib.parse import quote

import pytest

from qwen2vl.errors import InputError
from qwen2vl.processor.media.data_url import decode_data_url, looks_like_base64
from qwen2vl.processor.media.source import DEFAULT_LIMITS, read_source
from tests.media import encoded, noise

HEAD = "data:image/png;base64,"
PNG = encoded(noise(40, 60))
CODED = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "payload",
    [
        CODED,
        " " + CODED,
        CODED + "\n",
        "\n".join(CODED[i : i + 76] for i in range(0, len(CODED), 76)),
        " ".join(CODED[i : i + 76] for i in range(0, len(CODED), 76)),  # of an unquoted variable
        quote(CODED, safe=""),
    ],
)
def test_whitespace_and_percent_encoding_are_removed(payload: str) -> None:
    assert decode_data_url(HEAD + payload, 10**6, "image 1") == (PNG, "image/png")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_a_plus_that_became_a_space_is_named(count: int) -> None:
    """With four of them the rest has the length of base64, and would be another file."""
    content = bytes(3) + bytes([0xFB] * 3 * count) + bytes(30)  # "+/v7" is 0xFB three times
    coded = base64.b64encode(content).decode()
    assert coded.count("+") == count
    with pytest.raises(InputError, match=r"image 1: the base64 of .* has spaces where it had '\+'"):
        decode_data_url(HEAD + coded.replace("+", " "), 10**6, "image 1")


@pytest.mark.parametrize("payload", ["@@@", "abc", "ab cd e", "\udc80"])
def test_invalid_base64(payload: str) -> None:
    with pytest.raises(InputError, match="image 1: the data URL is not valid base64; encode it"):
        decode_data_url(HEAD + payload, 10**6, "image 1")


def test_media_types() -> None:
    assert decode_data_url("data:,a%20b", 99, "x") == (b"a b", None)
    assert decode_data_url("DATA:Image/PNG ; base64,AAAA", 99, "x") == (bytes(3), "image/png")
    assert decode_data_url("data:<script>;base64,AAAA", 99, "x") == (bytes(3), None)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_base64_in_place_of_a_path_is_recognized(kind: str) -> None:
    """With slashes in it, it is not a name that is too long, but a file in missing folders."""
    coded = base64.b64encode(encoded(noise(40, 60), kind)).decode()
    parts = "/".join(coded[:400].replace("/", "A")[i : i + 100] for i in range(0, 400, 100))
    for source in (coded[:80], coded, parts):
        assert looks_like_base64(source)
        with pytest.raises(InputError, match="looks like base64, not a path; write data:image/png"):
            read_source(source, DEFAULT_LIMITS, "image 1")


@pytest.mark.parametrize("source", ["data/images/train2017/000000123", "/9j/a.jpg", "iVBORw0KGgo"])
def test_paths_are_no_base64(source: str) -> None:
    assert not looks_like_base64(source)
    with pytest.raises(InputError, match=f"file '{source}' not found; check the path"):
        read_source(Path(source), DEFAULT_LIMITS, "image 1")
