"""Mixed requests: good ones of several forms, a third bad ones, and clients that leave midway.

The good ones are drawn from a pool, greedy, so that each has to be answered with the same text
every time, whatever runs beside it. The pool also bounds what the server's caches can hold.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from serve.bad_requests import BadRequest, bad_requests, leaks_internals
from serve.http_client import Connection, ServerClosedError
from serve.prompts import chat_body, jpeg, question

__all__ = ["POOL", "MixedLoad", "MixedResult", "good_body"]

POOL = 100  # different good requests
CHAT = "/v1/chat/completions"


@cache
def good_body(number: int) -> tuple[str, bytes]:
    """Return path and body of one request of the pool."""
    text, tokens = question(number), 4 + number % 13
    sizes = ((56, 56), (112, 84), (224, 224), (140, 280))
    picture = jpeg(number, *sizes[number % 4])
    form = number % 6
    if form == 0:
        return CHAT, chat_body(text, max_tokens=tokens)
    if form == 1:
        return CHAT, chat_body(text, picture, max_tokens=tokens, logprobs=True, top_logprobs=2)
    if form == 2:
        body = {"model": "nano", "prompt": text, "max_tokens": tokens, "temperature": 0}
        return "/v1/completions", json.dumps(body).encode()
    if form == 3:
        usage = {"include_usage": True}
        return CHAT, chat_body(text, picture, max_tokens=tokens, stream=True, stream_options=usage)
    if form == 4:
        return CHAT, chat_body(text, max_tokens=tokens, n=2, temperature=0.8, seed=number)
    return CHAT, chat_body(text, picture, max_tokens=tokens)


def long_body(number: int, num_words: int = 600) -> bytes:
    """Return a request whose prompt of about 3,000 tokens nothing shares: fills the KV cache."""
    return chat_body(question(number, num_words), max_tokens=1, system=f"{number}")


@dataclass
class MixedResult:
    """What happened; everything but `counts` must be empty."""

    counts: Counter[str] = field(default_factory=Counter)  # good, bad, left
    failures: Counter[str] = field(default_factory=Counter)  # of good requests
    different: list[int] = field(default_factory=list)  # pool numbers answered differently
    wrong_refusals: Counter[str] = field(default_factory=Counter)  # of bad requests


class MixedLoad:
    """Sends mixed requests to one server, with the answers it has seen."""

    def __init__(self, port: int, seed: int = 0, pool: int = POOL) -> None:
        self.port, self.pool = port, pool
        self.rng = random.Random(seed)
        self.answers: dict[int, str] = {}
        self.bad = bad_requests()

    async def run(self, count: int, concurrency: int) -> MixedResult:
        """Send `count` requests: a third bad, a tenth by clients that leave, the others good."""
        result = MixedResult()
        kinds = iter(self.rng.choices(("bad", "left", "good"), weights=(10, 3, 17), k=count))
        await asyncio.gather(*(self._client(kinds, result) for _ in range(concurrency)))
        return result

    async def fill_kv_cache(self, count: int = 50) -> MixedResult:
        """Send long prompts: pages of the KV cache take memory when they are first written."""
        result, connection = MixedResult(), Connection(self.port)
        for number in range(count):
            reply = await connection.request("POST", CHAT, long_body(10_000 + number))
            result.counts["good"] += 1
            if reply.status != 200:
                text = reply.body.decode(errors="replace")
                result.failures[f"long prompt: {reply.status} {text[:200]}"] += 1
        connection.abort()
        return result

    async def _client(self, kinds: Any, result: MixedResult) -> None:
        connection = Connection(self.port)
        for kind in kinds:
            result.counts[kind] += 1
            if kind == "bad":
                await self._send_bad(connection, self.rng.choice(self.bad), result)
            elif kind == "left":
                await self._leave(self.rng.randrange(self.pool), self.rng.randrange(4))
            else:
                await self._send_good(connection, self.rng.randrange(self.pool), result)
        connection.abort()

    async def _send_good(self, connection: Connection, number: int, result: MixedResult) -> None:
        path, body = good_body(number)
        try:
            await connection.send("POST", path, body)
            status, headers = await connection.receive_head()
            if "event-stream" in headers.get("content-type", ""):
                text = await _joined_stream(connection, headers)
            else:
                data = b"".join([piece async for piece in connection.pieces(headers)])
                text = _text(data) if status == 200 else data.decode(errors="replace")
        except (ServerClosedError, OSError, ValueError, KeyError) as error:
            connection.abort()
            status, text = 0, f"{type(error).__name__}: {error}"
        if status != 200 or not text:
            result.failures[f"request {number}: {status} {text[:200]}"] += 1
        elif self.answers.setdefault(number, text) != text:
            result.different.append(number)

    async def _send_bad(self, connection: Connection, bad: BadRequest, result: MixedResult) -> None:
        try:
            reply = await connection.request(bad.method, bad.path, bad.body, bad.headers)
        except (ServerClosedError, OSError) as error:
            connection.abort()
            result.wrong_refusals[f"{bad.name}: {type(error).__name__}"] += 1
            return
        text = reply.body.decode(errors="replace")
        if not 400 <= reply.status < 500 or reply.status == 429 or leaks_internals(text):
            result.wrong_refusals[f"{bad.name}: {reply.status} {text[:200]}"] += 1

    async def _leave(self, number: int, how: int) -> None:
        """Leave within the body, after it, after the first bytes, or after a few events."""
        path, body = good_body(number)
        connection = Connection(self.port)
        try:
            head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            if how == 0:
                await connection.send_raw(head.encode() + body[: len(body) // 2])
                return
            await connection.send_raw(head.encode() + body)
            if how == 1:
                await asyncio.sleep(self.rng.random() / 50)
                return
            _, headers = await connection.receive_head()
            left = how
            async for _ in connection.pieces(headers):
                left -= 1
                if not left:
                    return
        except (ServerClosedError, OSError):
            pass
        finally:
            connection.abort()


def _text(data: bytes) -> str:
    """Return what a complete response says: texts, reasons and tokens of its choices."""
    choices = json.loads(data)["choices"]
    return json.dumps(
        [
            (
                choice["message"]["content"] if "message" in choice else choice["text"],
                choice["finish_reason"],
                [one["token"] for one in ((choice.get("logprobs") or {}).get("content") or ())],
            )
            for choice in choices
        ]
    )


async def _joined_stream(connection: Connection, headers: dict[str, str]) -> str:
    """Return the text of a stream, "" unless it was complete."""
    text, reason, done = "", None, False
    async for event in connection.events(headers):
        if event == b"[DONE]":
            done = True
            continue
        for choice in json.loads(event)["choices"]:
            text += choice["delta"].get("content") or ""
            reason = choice.get("finish_reason") or reason
    return json.dumps([text, reason]) if done and reason else ""
