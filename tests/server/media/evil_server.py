"""A loopback HTTP server that misbehaves on request, and counts who connects.

Paths select the behavior, see `_BEHAVIORS`; /redirect?URL sends the client elsewhere. It runs in a
thread of its own, so that tests of coroutines and of whole servers can use it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import unquote

__all__ = ["EvilServer"]

CHUNK = 1 << 16


@dataclass
class Hit:
    """One request that arrived."""

    target: str
    headers: dict[str, str]


@dataclass
class EvilServer:
    """The server; a context manager."""

    files: Mapping[str, bytes] = field(default_factory=dict)  # path -> body of a good response
    context: ssl.SSLContext | None = None
    connections: int = 0  # accepted so far
    open_connections: int = 0
    hits: list[Hit] = field(default_factory=list)
    port: int = 0

    def __enter__(self) -> EvilServer:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        """Return the URL of a path, under any host name."""
        return f"{scheme}://{host}:{self.port}{path}"

    def _run(self, coroutine: Awaitable[None]) -> None:
        async def run() -> None:
            await coroutine

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    async def _start(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", 0, ssl=self.context, limit=1 << 20
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open_connections += 1
        try:
            await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.open_connections -= 1
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        target = head[0].split(" ")[1]
        pairs = (line.split(": ", 1) for line in head[1:] if line)
        self.hits.append(Hit(target, {key.lower(): value for key, value in pairs}))
        path, _, query = target.partition("?")
        if path in self.files:
            await _send(writer, _response(self.files[path]))
        elif path == "/redirect":
            head_lines = f"HTTP/1.1 302 Found\r\nLocation: {unquote(query)}\r\n"
            await _send(writer, head_lines.encode("latin-1") + b"Content-Length: 0\r\n\r\n")
        else:
            await _BEHAVIORS[path](reader, writer)


def _response(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


async def _send(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(content)
    await writer.drain()


async def _endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        await _send(writer, bytes(CHUNK))


async def _endless_chunked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        await _send(writer, b"%x\r\n" % CHUNK + bytes(CHUNK) + b"\r\n")


async def _endless_headers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        await _send(writer, b"X-Filler: " + b"x" * 1000 + b"\r\n")


async def _endless_informational(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    while True:
        await _send(writer, b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100)
        await asyncio.sleep(0.01)


async def _drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n")
    while not reader.at_eof():  # until the client closes
        await _send(writer, b"x")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(1), 1.0)


async def _hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(CHUNK):  # until the client closes
        pass


def _fixed(content: bytes) -> Callable[..., Awaitable[None]]:
    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _send(writer, content)

    return send


_SECRET = b"Traceback: secret text of /srv/remote"
_BEHAVIORS: Mapping[str, Callable[..., Awaitable[None]]] = {
    "/endless": _endless,
    "/endless-chunked": _endless_chunked,
    "/endless-headers": _endless_headers,
    "/endless-informational": _endless_informational,
    "/drip": _drip,
    "/hang": _hang,
    "/403": _fixed(_response(_SECRET, "403 Forbidden")),
    "/404": _fixed(_response(_SECRET, "404 Not Found")),
    "/429": _fixed(_response(_SECRET, "429 Too Many Requests")),
    "/500": _fixed(_response(_SECRET, "500 Secret Text")),
    "/204": _fixed(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "/too-short": _fixed(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc"),
    "/declares-much": _fixed(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nabc"),
    "/too-long": _fixed(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcdef"),
    "/gzip": _fixed(_response(gzip.compress(bytes(10**7)), headers="Content-Encoding: gzip\r\n")),
    "/garbage": _fixed(b"\x00\xff not HTTP at all\r\n\r\n"),
    "/no-location": _fixed(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"),
    "/silent": _fixed(b""),
    "/switch": _fixed(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
    "/cookie": _fixed(_response(b"abc", headers="Set-Cookie: session=1\r\n")),
}
