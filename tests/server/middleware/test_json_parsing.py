"""Strict JSON: what other parsers accept in different ways is refused, in bounded time."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl.server.errors import APIError
from qwen2vl.server.middleware.json_parsing import is_costly, parse_json

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=40)
@given(JSON)
def test_json_is_parsed_as_by_the_standard_library(value: Any) -> None:
    for ascii_only in (True, False):
        try:
            body = json.dumps(value, ensure_ascii=ascii_only, allow_nan=False).encode()
        except (ValueError, UnicodeEncodeError):  # infinity, a lone surrogate
            continue
        assert parse_json(body, max_depth=64) == value


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(body: bytes) -> None:
    with suppress(APIError):  # any other exception fails the test
        parse_json(body, max_depth=64)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "is not JSON"),
        (b"{", "line 1, column 2"),
        (b'{"a": 1,}', "is not JSON"),
        (b"{'a': 1}", "is not JSON"),
        (b'{"a": 1} x', "is not JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        (b'{"x": [{"a": 1, "a": 1}]}', "the key 'a' twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "the number '1e999'"),
        (b'{"a": ' + b"9" * 5000 + b"}", "the number"),
        (b'{"a": 1.' + b"9" * 5000 + b"}", "the number"),
        (b'{"a": "\\ud800"}', "lone surrogate"),
        (b'{"\\udc00": 1}', "lone surrogate"),
        (b'{"a": "\xff"}', "is not UTF-8: byte 7"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        ('{"a": 1}'.encode("utf-16-be"), "is not JSON"),
        (b'{"a": "\n"}', "is not JSON"),
    ],
)
def test_what_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(APIError) as caught:
        parse_json(body, max_depth=64)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert parse_json(b'"\\ud83d\\ude00"', max_depth=4) == "\U0001f600"


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_the_depth_is_limited(opening: str) -> None:
    closing = "]" if opening == "[" else "}"

    def nested(depth: int) -> bytes:
        return (opening * depth + "1" + closing * depth).encode()

    parse_json(nested(64), max_depth=64)
    for depth in (65, 500, 5000, 200_000):
        with pytest.raises(APIError, match="more than 64 deep"):
            parse_json(nested(depth), max_depth=64)


def test_many_small_values_are_refused_before_they_take_memory() -> None:
    began = time.process_time()
    with pytest.raises(APIError, match="more than 500,000 values"):
        parse_json(b"[" + b"[]," * 10_000_000 + b"[]]", max_depth=64)
    assert time.process_time() - began < 2


def test_a_long_string_is_no_burden() -> None:
    body = b'{"image": "' + b"A" * 20_000_000 + b'"}'
    began = time.process_time()
    assert len(parse_json(body, max_depth=64)["image"]) == 20_000_000
    assert time.process_time() - began < 2


def test_an_object_of_many_keys_is_refused() -> None:
    def body(count: int) -> bytes:
        return json.dumps({str(i): i for i in range(count)}).encode()

    assert len(parse_json(body(10_000), max_depth=4)) == 10_000
    with pytest.raises(APIError, match="object of 10,001 keys, the limit is 10,000"):
        parse_json(body(10_001), max_depth=4)


def test_costly_bodies_are_told_from_images() -> None:
    image = json.dumps({"url": "data:image/png;base64," + "A" * 1_000_000}).encode()
    assert not is_costly(image)
    assert not is_costly(b'{"messages": []}')
    assert is_costly(json.dumps([0] * 10_000).encode())
    assert is_costly(b" " * 5_000_000)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "line 7 is not JSON: error at column 2"),
        (b'{"a": "the request body" error at line 1, column 1}', "line 7 is not JSON: error at"),
        (b'{"a": 1, "a": 2}', "line 7 gives the key 'a' twice in one object; give it once"),
        (b"[[[1]]]", "line 7 nests lists and objects more than 2 deep; make it flatter"),
        (b'"\\ud800"', "line 7 holds a lone surrogate"),
        (b"\xff", "line 7 is not UTF-8: byte 0 is invalid"),
    ],
)
def test_errors_name_the_line_of_a_file(body: bytes, message: str) -> None:
    with pytest.raises(APIError) as caught:
        parse_json(body, max_depth=2, where="line 7")
    assert caught.value.message.startswith(message)
