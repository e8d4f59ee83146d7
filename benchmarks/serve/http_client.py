"""HTTP/1.1 client on asyncio streams: costs little CPU and can send what libraries refuse to.

A benchmark client shares the machine with the server it measures. One request costs this client
about 0.1 ms; `load.py` reports its CPU seconds beside each measurement. Nothing is retried.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Connection", "Reply", "ServerClosedError", "post_json"]

READ_LIMIT = 2**22  # of one line or header block


class ServerClosedError(ConnectionError):
    """The server closed the connection before a complete response."""


@dataclass(frozen=True)
class Reply:
    """A complete response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One connection, kept open between requests; connects on the first one."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.host, self.port = host, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        """Connect unless connected."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(
                self.host, self.port, limit=READ_LIMIT
            )

    async def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send one request; headers given replace the defaults."""
        lines = {"Host": f"{self.host}:{self.port}", "Content-Length": str(len(body))}
        if body:
            lines["Content-Type"] = "application/json"
        lines |= headers or {}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
        await self.send_raw(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)

    async def send_raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        await self.open()
        assert self._writer is not None
        self._writer.write(data)
        await self._writer.drain()

    async def receive(self) -> Reply:
        """Receive one response.

        Raises:
            ServerClosedError: the connection was closed before its end.
        """
        status, headers = await self.receive_head()
        body = b"".join([piece async for piece in self.pieces(headers)])
        return Reply(status, headers, body)

    async def receive_head(self) -> tuple[int, dict[str, str]]:
        """Receive status and headers (names in lower case); the body is read by `pieces`."""
        assert self._reader is not None
        try:
            block = await self._reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            self.abort()
            raise ServerClosedError(f"before a response: {type(error).__name__}") from error
        first, *lines = block.decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines if line)
        headers = {name.lower(): value.strip() for name, _, value in fields}
        return int(first.split(" ", 2)[1]), headers

    async def pieces(self, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """Yield the body as it arrives, chunk by chunk."""
        assert self._reader is not None
        try:
            if headers.get("transfer-encoding") == "chunked":
                while size := int(await self._reader.readline() or b"0", 16):
                    data = await self._reader.readexactly(size + 2)
                    yield data[:-2]
                await self._reader.readexactly(2)
            else:
                yield await self._reader.readexactly(int(headers.get("content-length", 0)))
        except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
            self.abort()
            raise ServerClosedError(f"within a response: {type(error).__name__}") from error
        if headers.get("connection", "").lower() == "close":
            self.abort()

    async def events(self, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """Yield the data of each server-sent event."""
        rest = b""
        async for piece in self.pieces(headers):
            *events, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in events:
                for line in event.split(b"\n"):
                    if line.startswith(b"data:"):
                        yield line[5:].strip()

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send one request and receive its response."""
        await self.send(method, path, body, headers)
        return await self.receive()

    def abort(self) -> None:
        """Close at once, as a client does that leaves; the next request connects again."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    async def close(self) -> None:
        """Close in the regular way."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


async def post_json(port: int, path: str, value: Any, **headers: str) -> Reply:
    """Post one JSON value on a connection of its own."""
    connection = Connection(port)
    try:
        return await connection.request("POST", path, json.dumps(value).encode(), headers)
    finally:
        connection.abort()
