"""The HTTP/1.1 protocol of one connection: uvicorn's, with deadlines and a limit on connections.

    no request within header_timeout, or headers that drip    408 or closed
    request line and headers too long                         431
    response sent, but its request's body does not end        closed after LINGER_SECONDS
    body in thousands of tiny chunks                          400
    client does not take what was sent within write_timeout   closed; the handler is canceled
    more connections than max_connections                      503

uvicorn itself has only a keep-alive timeout and a limit on incomplete headers.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from qwen2vl.server.config import ServerConfig
from qwen2vl.server.errors import SERVER_ERROR, APIError

__all__ = ["bounded_protocol"]

LINGER_SECONDS = 1.0  # a client that still sends reads the response in this time
LINGER_BYTES = 256 * 1024  # that are read and thrown away meanwhile
MANY_CHUNKS = 1000  # of a body; if more, they must have MIN_MEAN_BYTES on average
MIN_MEAN_BYTES = 64  # a chunk costs the same CPU time to parse, however small it is


def bounded_protocol(config: ServerConfig) -> type[H11Protocol]:
    """Return the protocol class of a server; uvicorn creates one object for each connection."""

    class ConfiguredProtocol(_BoundedProtocol):
        limits = config

    return ConfiguredProtocol


class _BoundedProtocol(H11Protocol):
    limits: ServerConfig

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._has_partial_headers = False
        self._num_lingering_bytes = 0
        self._num_chunks = 0
        self._num_chunk_bytes = 0
        self._next_event = self.conn.next_event
        self.conn.next_event = self._counted_event

    def _counted_event(self) -> Any:
        """Return h11's next event; refuse a body in tiny chunks, which costs CPU, not bytes."""
        event = self._next_event()
        if isinstance(event, h11.Data):
            self._num_chunks += 1
            self._num_chunk_bytes += len(event.data)
            mean = self._num_chunk_bytes / self._num_chunks
            if self._num_chunks > MANY_CHUNKS and mean < MIN_MEAN_BYTES:
                raise h11.RemoteProtocolError("tiny chunks")
        elif isinstance(event, h11.Request):
            self._num_chunks = self._num_chunk_bytes = self._num_lingering_bytes = 0
        return event

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(
                APIError(
                    503,
                    f"{self.limits.max_connections} connections are open, which is the limit; "
                    "close idle ones",
                    type=SERVER_ERROR,
                    code="too_many_connections",
                    retry_after=1,
                )
            )
            return
        # A pause as soon as anything waits, so that the timer covers every byte.
        transport.set_write_buffer_limits(high=0)
        self._start_read_timer(self.limits.header_timeout, self._on_header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_read_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        state = self.conn.their_state
        if state is h11.IDLE:
            # Between requests: what has arrived is the beginning of the next one's headers.
            self._has_partial_headers = True
            if self._read_timer is None and not self.transport.is_closing():
                self._start_read_timer(self.limits.header_timeout, self._on_header_timeout)
        elif state is not h11.SEND_BODY or not self._is_response_complete():
            self._has_partial_headers = False
            self._stop_read_timer()
        else:
            self._num_lingering_bytes += len(data)
            if self._num_lingering_bytes > LINGER_BYTES:
                self.transport.pause_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._start_read_timer(LINGER_SECONDS, self._close)

    def send_400_response(self, msg: str) -> None:
        """Refuse what h11 does not accept; called while its exception is handled."""
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        if status == 431:
            text = (
                f"the request line and headers are longer than {self.limits.max_header_bytes:,} "
                "bytes; send fewer or shorter ones"
            )
            self._refuse(APIError(431, text, code="headers_too_large"))
        else:
            self._refuse(APIError(400, "this is not an HTTP/1.1 request", code="invalid_http"))

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_timeout, self._abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _is_response_complete(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _on_header_timeout(self) -> None:
        self._read_timer = None
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            return
        if not self._has_partial_headers:
            self._close()
            return
        text = f"the headers were not complete after {self.limits.header_timeout:g} s; send faster"
        self._refuse(APIError(408, text, code="request_timeout"))

    def _refuse(self, error: APIError) -> None:
        """Write an error without a request, and close; uses no h11, whose state may be ERROR."""
        if self._is_response_complete() or not self.cycle.response_started:
            body = json.dumps(error.to_body()).encode()
            retry = "" if error.retry_after is None else f"retry-after: {error.retry_after:g}\r\n"
            head = (
                f"HTTP/1.1 {error.status} {error.code}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n{retry}connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _close(self) -> None:
        self._read_timer = None
        self.transport.close()

    def _abort(self) -> None:
        self._write_timer = None
        self.transport.abort()  # close() would wait for the client to take the rest

    def _start_read_timer(self, seconds: float, call: Callable[[], None]) -> None:
        self._stop_read_timer()
        self._read_timer = self.loop.call_later(seconds, call)

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
