"""Requests made to exhaust a server, and what refusing them costs it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from serve.bad_requests import bomb_png
from serve.http_client import Connection, ServerClosedError
from serve.processes import ServerProcess, reset_peak_memory
from serve.prompts import chat_body

__all__ = ["BOMBS", "Refusal", "refuse"]

CHAT = "/v1/chat/completions"
PIECE = b" " * 65_536


@dataclass(frozen=True)
class Refusal:
    """Cost of one refusal to the server and its decoding workers."""

    status: int  # 0: the connection was closed without a response
    seconds: float  # until the client knew
    cpu_ms: float
    peak_mib: float  # of memory above the one before


async def send_png(connection: Connection) -> int:
    """Send the PNG of 420 kB that decodes to 432 MB."""
    reply = await connection.request("POST", CHAT, chat_body("?", bomb_png(), max_tokens=4))
    return reply.status


async def send_declared_body(connection: Connection) -> int:
    """Announce a body of a terabyte and send its first bytes."""
    await connection.send("POST", CHAT, b"{", {"Content-Length": str(10**12)})
    return (await connection.receive()).status


async def send_endless_body(connection: Connection) -> int:
    """Send a chunked body without an end until the server answers or closes."""
    headers = {"Transfer-Encoding": "chunked", "Content-Length": ""}
    headers["Content-Type"] = "application/json"
    await connection.send("POST", CHAT, b"", headers)
    reply = asyncio.create_task(connection.receive())
    chunk = b"%x\r\n%s\r\n" % (len(PIECE), PIECE)
    while not reply.done():
        try:
            await connection.send_raw(chunk)
        except OSError:
            break
        await asyncio.sleep(0)
    return (await reply).status


async def send_slow_body(connection: Connection) -> int:
    """Send one byte of a body each second."""
    await connection.send("POST", CHAT, b"{", {"Content-Length": "1000"})
    return await _send_slowly(connection)


async def send_slow_head(connection: Connection) -> int:
    """Send one byte of the headers each second."""
    await connection.send_raw(f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ".encode())
    return await _send_slowly(connection)


async def _send_slowly(connection: Connection) -> int:
    reply = asyncio.create_task(connection.receive())
    while not reply.done():
        try:
            await connection.send_raw(b" ")
        except OSError:
            break
        await asyncio.wait([reply], timeout=1)
    return (await reply).status


Bomb = Callable[[Connection], Awaitable[int]]
BOMBS: dict[str, Bomb] = {
    "png": send_png,
    "declared_body": send_declared_body,
    "endless_body": send_endless_body,
    "slow_body": send_slow_body,
    "slow_head": send_slow_head,
}


async def _run(port: int, bomb: Bomb, timeout: float) -> int:
    connection = Connection(port)
    try:
        return await asyncio.wait_for(bomb(connection), timeout)
    except (OSError, ServerClosedError):
        return 0
    finally:
        connection.abort()


def refuse(server: ServerProcess, name: str, *, times: int = 1, timeout: float = 90.0) -> Refusal:
    """Send one kind `times` times and return the mean cost.

    Raises:
        TimeoutError: the server did not refuse it in time.
    """
    bomb_png()  # made before the clock starts
    reset_peak_memory(server.pid)
    before, start = server.usage(), time.perf_counter()
    statuses = [asyncio.run(_run(server.port, BOMBS[name], timeout)) for _ in range(times)]
    seconds, after = time.perf_counter() - start, server.usage()
    return Refusal(
        status=statuses[-1],
        seconds=seconds / times,
        cpu_ms=1000 * (after.cpu_seconds - before.cpu_seconds) / times,
        peak_mib=max(0.0, after.peak_mib - before.rss_mib),
    )
