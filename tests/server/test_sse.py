"""Event streams: their bytes, errors, deadlines, and cancellation when the client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from openai.types.responses import ResponseErrorEvent

from qwen2vl.errors import EngineError
from qwen2vl.server.errors import APIError
from qwen2vl.server.sse import (
    ClientDisconnectedError,
    Event,
    EventStream,
    format_event,
    run_until_disconnect,
)


class Connection:
    """The two ASGI callables of a request; `is_gone` is set when the client disconnects."""

    def __init__(self) -> None:
        self.is_gone = asyncio.Event()
        self.body = b""
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.is_complete = False

    async def receive(self) -> dict[str, Any]:
        await self.is_gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.body += message["body"]
            self.is_complete = not message["more_body"]


def run(test: Callable[[Connection], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            await test(Connection())

    asyncio.run(main())


async def two_events() -> AsyncIterator[Event]:
    yield '{"a":1}'
    yield ("named", '{"b":2}')


def test_the_bytes_of_events() -> None:
    assert format_event('{"a":"é"}') == 'data: {"a":"é"}\n\n'.encode()
    assert format_event(("response.created", "{}")) == b"event: response.created\ndata: {}\n\n"


def test_a_stream_ends_with_done() -> None:
    async def test(connection: Connection) -> None:
        await EventStream(two_events())({}, connection.receive, connection.send)
        assert connection.status == 200
        assert connection.headers[b"content-type"].startswith(b"text/event-stream")
        assert connection.headers[b"cache-control"] == b"no-cache"
        assert b"content-length" not in connection.headers
        expected = b'data: {"a":1}\n\nevent: named\ndata: {"b":2}\n\ndata: [DONE]\n\n'
        assert connection.body == expected
        assert connection.is_complete

    run(test)


def test_a_stream_of_named_events_ends_by_itself() -> None:
    async def test(connection: Connection) -> None:
        stream = EventStream(two_events(), send_done=False)
        await stream({}, connection.receive, connection.send)
        assert b"[DONE]" not in connection.body
        assert connection.is_complete

    run(test)


@pytest.mark.parametrize("send_done", [True, False])
def test_a_failure_becomes_an_event(send_done: bool) -> None:
    async def failing() -> AsyncIterator[Event]:
        yield "{}"
        raise EngineError("a secret text")

    async def test(connection: Connection) -> None:
        stream = EventStream(failing(), send_done=send_done)
        await stream({}, connection.receive, connection.send)
        first, second, *rest = connection.body.decode().strip().split("\n\n")
        assert first == "data: {}"
        data = json.loads(second.rpartition("data: ")[2])
        error = data["error"] if send_done else data
        assert error["code"] == "engine_error"
        if not send_done:  # the events before it have the numbers from 0
            assert ResponseErrorEvent.model_validate(data, strict=True).sequence_number == 1
            assert set(data) == {"type", "code", "message", "param", "sequence_number"}
        assert second.startswith("data: " if send_done else "event: error\ndata: ")
        assert rest == (["data: [DONE]"] if send_done else [])
        assert b"secret" not in connection.body
        assert connection.is_complete

    run(test)


def test_an_iterator_that_takes_too_long_ends_with_an_error() -> None:
    errors: list[BaseException] = []

    def convert(error: BaseException) -> APIError:
        errors.append(error)
        return APIError(504, "too long")

    async def endless() -> AsyncIterator[Event]:
        yield "{}"
        await asyncio.Event().wait()

    async def test(connection: Connection) -> None:
        deadline = asyncio.get_running_loop().time() + 0.01
        stream = EventStream(endless(), on_error=convert, deadline=deadline)
        await stream({}, connection.receive, connection.send)
        assert b"too long" in connection.body
        assert connection.body.endswith(b"data: [DONE]\n\n")

    run(test)
    assert isinstance(errors[0], TimeoutError)


def test_a_stream_is_closed_when_the_client_is_gone() -> None:
    ended: list[str] = []

    async def endless() -> AsyncIterator[Event]:
        try:
            while True:
                yield "{}"
                await asyncio.sleep(0)
        finally:
            await asyncio.sleep(0)  # an async end, such as that of a request to the engine
            ended.append("iterator")

    async def test(connection: Connection) -> None:
        asyncio.get_running_loop().call_later(0.01, connection.is_gone.set)
        with pytest.raises(ClientDisconnectedError):
            await EventStream(endless())({}, connection.receive, connection.send)
        assert ended == ["iterator"]
        assert connection.body
        assert not connection.is_complete

    run(test)


def test_a_handler_is_canceled_when_the_client_is_gone() -> None:
    ended: list[str] = []

    async def handler() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("handler")

    async def test(connection: Connection) -> None:
        asyncio.get_running_loop().call_later(0.01, connection.is_gone.set)
        with pytest.raises(ClientDisconnectedError):
            await run_until_disconnect(connection.receive, handler())
        assert ended == ["handler"]

    run(test)


def test_a_handler_is_canceled_with_its_caller() -> None:
    ended: list[str] = []

    async def test(connection: Connection) -> None:
        has_begun = asyncio.Event()

        async def handler() -> None:
            has_begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("handler")

        task = asyncio.create_task(run_until_disconnect(connection.receive, handler()))
        await has_begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["handler"]

    run(test)


def test_the_result_and_the_error_of_a_handler_are_passed_on() -> None:
    async def handler(value: int) -> int:
        if value < 0:
            raise ValueError("negative")
        return value

    async def test(connection: Connection) -> None:
        assert await run_until_disconnect(connection.receive, handler(3)) == 3
        with pytest.raises(ValueError, match="negative"):
            await run_until_disconnect(connection.receive, handler(-1))
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1  # no watcher is left

    run(test)
