"""Bodies: content type, length, size while streaming, deadline, and memory of all requests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from starlette.requests import Request

from qwen2vl.server.errors import APIError
from qwen2vl.server.middleware import request_body
from qwen2vl.server.middleware.request_body import BodyReader
from qwen2vl.server.sse import ClientDisconnectedError

JSON = {"content-type": "application/json"}


def request_of(chunks: Iterable[bytes | float | None], headers: dict[str, str]) -> Request:
    """Build a request; None waits forever, a number so many seconds, the end is a disconnect."""
    iterator = iter(chunks)

    async def receive() -> dict[str, Any]:
        try:
            while isinstance(chunk := next(iterator), float):
                await asyncio.sleep(chunk)
        except StopIteration:
            return {"type": "http.disconnect"}
        if chunk is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": chunk, "more_body": chunk != b""}

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw}, receive)


def reader(**limits: Any) -> BodyReader:
    defaults: dict[str, Any] = {
        "max_bytes": 10,
        "timeout": 20,
        "max_total_bytes": 100,
        "free_bytes": 0,
    }
    return BodyReader(**(defaults | limits))


def read(body_reader: BodyReader, chunks: Iterable[bytes | float | None], **headers: str) -> bytes:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return asyncio.run(body_reader.read(request_of(chunks, JSON | named)))


def test_a_body_is_read_and_held_until_it_is_released() -> None:
    one = reader()
    assert read(one, [b"abc", b"def", b""]) == b"abcdef"
    assert one.held_bytes == 6
    one.release(6)
    assert one.held_bytes == 0


def test_the_size_is_limited_while_it_streams() -> None:
    one = reader()
    assert read(one, [b"0123456789", b""]) == b"0123456789"
    one.release(10)
    taken: list[int] = []

    def endless() -> Iterable[bytes]:
        while True:
            taken.append(1)
            yield b"012345"

    with pytest.raises(APIError) as caught:
        read(one, endless())
    assert (caught.value.status, caught.value.code) == (413, "body_too_large")
    assert len(taken) == 2
    assert one.held_bytes == 0


@pytest.mark.parametrize("length", ["11", "9" * 20])
def test_the_length_is_refused_before_anything_is_read(length: str) -> None:
    with pytest.raises(APIError) as caught:
        read(reader(), [None], content_length=length)
    assert caught.value.status == 413
    assert f"{int(length):,} bytes, the limit is 10" in str(caught.value)


def test_the_deadline_is_that_of_the_whole_body() -> None:
    one = reader(timeout=0.02)
    with pytest.raises(APIError) as caught:
        read(one, [b"a", b"b", None])
    assert (caught.value.status, caught.value.code) == (408, "request_timeout")
    assert one.held_bytes == 0


def test_a_body_that_comes_too_slowly_is_refused_before_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request_body, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(request_body, "MIN_BYTES_PER_SECOND", 1000)

    def chunks(size: int, number: int) -> Iterable[bytes | float]:
        for _ in range(number):
            yield from (0.01, b"x" * size)
        yield b""

    one = reader(max_bytes=10_000, max_total_bytes=10_000)
    assert len(read(one, chunks(100, 12))) == 1200  # 0.12 s, at ten times the least rate
    with pytest.raises(APIError) as caught:
        read(one, chunks(1, 30))
    assert caught.value.status == 408 and "after 0.0" in caught.value.message


def test_a_client_that_leaves_is_no_error() -> None:
    one = reader()
    with pytest.raises(ClientDisconnectedError):
        read(one, [b"a"])
    assert one.held_bytes == 0


def test_the_bytes_of_all_requests_are_limited() -> None:
    reasons: list[str] = []
    one = reader(max_total_bytes=15, on_reject=reasons.append)
    read(one, [b"0123456789", b""])
    with pytest.raises(APIError) as caught:
        read(one, [b"012345", b""])
    assert (caught.value.status, caught.value.retry_after) == (429, 1.0)
    assert one.held_bytes == 10
    assert reasons == ["body_memory"]


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "", "*"],
)
def test_other_content_types_are_refused(content_type: str) -> None:
    with pytest.raises(APIError) as caught:
        read(reader(), [None], content_type=content_type)
    assert caught.value.status == 415
    assert "must be application/json" in str(caught.value)


def test_a_missing_content_type_is_refused() -> None:
    with pytest.raises(APIError, match="Content-Type: got none"):
        asyncio.run(reader().read(request_of([None], {})))


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_is_accepted_in_any_spelling(content_type: str) -> None:
    assert read(reader(), [b"1", b""], content_type=content_type) == b"1"


def test_compressed_bodies_are_refused() -> None:
    with pytest.raises(APIError, match="Content-Encoding") as caught:
        read(reader(), [None], content_encoding="gzip")
    assert caught.value.status == 415


def test_a_small_body_is_read_when_others_fill_the_memory() -> None:
    one = reader(max_bytes=200_000, max_total_bytes=100, free_bytes=65_536)
    one.held_bytes = 1_000_000
    assert read(one, [b"abc", b""]) == b"abc"
    with pytest.raises(APIError) as caught:
        read(one, [b"a" * 70_000, b""])
    assert caught.value.status == 429
