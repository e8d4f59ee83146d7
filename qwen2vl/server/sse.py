"""Server-sent events, and the end of a request when its client disconnects.

`EventStream` is the response of a streaming handler: it writes one event for each item of an
iterator. `run_until_disconnect` runs a handler that does not stream. Either cancels the handler as
soon as the client is gone, so that its engine request is aborted in the handler's `finally`. That a
client takes what is sent in time is the protocol's business (listener/http_protocol.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwen2vl.server.errors import APIError, to_api_error

__all__ = [
    "ClientDisconnectedError",
    "Event",
    "EventStream",
    "format_event",
    "run_until_disconnect",
]

Event = str | tuple[str, str]  # data, or (event name, data); data is JSON without line breaks
T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientDisconnectedError(Exception):
    """The client closed the connection before its response was complete."""


def format_event(event: Event) -> bytes:
    """Return the bytes of one event."""
    if isinstance(event, tuple):
        name, data = event
        return f"event: {name}\ndata: {data}\n\n".encode()
    return f"data: {event}\n\n".encode()


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine; cancel it when the client disconnects.

    Args:
        receive: ASGI callable of the request, whose body has been read.
        work: the handler.

    Raises:
        ClientDisconnectedError: the client is gone; the coroutine has been canceled and has ended.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnectedError
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events.

    A failure of the iterator is sent as an event with OpenAI's error body, and `data: [DONE]` ends
    the stream either way. An API with named events (Responses) has no [DONE], and an event `error`
    with a `sequence_number`, which counts the events. (OpenAI: ResponseErrorEvent.)
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[Event],
        *,
        send_done: bool = True,
        on_error: Callable[[BaseException], APIError] = to_api_error,
        deadline: float | None = None,
    ) -> None:
        """Wrap an iterator.

        Args:
            events: yields the data of one event each, or (name, data).
            send_done: whether `data: [DONE]` ends the stream.
            on_error: converts an exception of the iterator to what the client receives.
            deadline: time of the event loop after which `on_error` gets a TimeoutError.
        """
        self.events = events
        self.status_code = 200
        self.background = None
        self._send_done = send_done
        self._on_error = on_error
        self._deadline = deadline
        self._num_events = 0  # that were sent
        # Proxies such as nginx would otherwise collect the events.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the events until the iterator ends or the client disconnects."""
        try:
            await run_until_disconnect(receive, self._write(send))
        finally:
            aclose = getattr(self.events, "aclose", None)
            if aclose is not None:
                await aclose()  # at once, not when the generator is finalized

    async def _write(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        try:
            async with asyncio.timeout_at(self._deadline):
                async for event in self.events:
                    await self._send(send, format_event(event))
                    self._num_events += 1
        except Exception as error:
            await self._send(send, self._error_event(error))
        await self._send(send, DONE if self._send_done else b"", more=False)

    def _error_event(self, error: Exception) -> bytes:
        body = self._on_error(error).to_body()
        if self._send_done:
            return format_event(json.dumps(body, ensure_ascii=False))
        fields = {**body["error"], "type": "error", "sequence_number": self._num_events}
        return format_event(("error", json.dumps(fields, ensure_ascii=False)))

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": more})
