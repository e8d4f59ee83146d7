"""Requests that a server must refuse: a status from 400 to 499, fixed text, no harm."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from record import ROOT

from serve.prompts import chat_body, jpeg

__all__ = ["BadRequest", "bad_requests", "bomb_png", "leaks_internals"]

# None of them belongs into an error for a client: text of Python, paths, object addresses.
PARENT = ROOT.parent if ROOT.parent.name else ROOT  # not the root folder, which begins every path
PATHS = (f"{PARENT}/", "/usr/", "/tmp/")
FORBIDDEN = ("Traceback", 'File "', *PATHS, " at 0x", ".py", "pydantic.dev")


@dataclass(frozen=True)
class BadRequest:
    """One request that is wrong in one way."""

    name: str
    body: bytes
    path: str = "/v1/chat/completions"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)


def leaks_internals(text: str) -> bool:
    """Tell whether an error shows what only the server may know."""
    return any(part in text for part in FORBIDDEN)


@cache
def bomb_png(side: int = 12_000) -> bytes:
    """Return a PNG of `side` x `side` black pixels: 420 kB that decode to 432 MB."""
    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * side)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(value)) + kind + value + struct.pack(">I", zlib.crc32(kind + value))
        for kind, value in chunks
    )


def _png_header(width: int, height: int) -> bytes:
    """Return a PNG whose header says this size and whose data is one empty block."""
    png = bytearray(bomb_png(1))
    png[16:24] = struct.pack(">II", width, height)
    png[29:33] = struct.pack(">I", zlib.crc32(bytes(png[12:29])))
    return bytes(png)


def _with_url(url: str) -> bytes:
    content: list[Any] = [{"type": "image_url", "image_url": {"url": url}}]
    return _chat([{"role": "user", "content": content}])


def _chat(messages: Any, **extra: Any) -> bytes:
    return json.dumps({"model": "nano", "messages": messages, "max_tokens": 4} | extra).encode()


def bad_requests() -> list[BadRequest]:
    """List the requests, without the large ones."""
    hello = [{"role": "user", "content": "Hello"}]
    fields: dict[str, dict[str, Any]] = {
        "unknown field": {"temprature": 0.5},
        "negative max_tokens": {"max_tokens": -1},
        "max_tokens as text": {"max_tokens": "many"},
        "temperature above its range": {"temperature": 99},
        "n above its limit": {"n": 1000},
        "stop strings above their limit": {"stop": ["x"] * 100},
        "bias of no token": {"logit_bias": {"no number": 1}},
        "schema of no type": {
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 7}}
        },
        "tools of a wrong type": {"tools": "get_weather"},
        "chat template in the request": {"chat_template": "{{ 1 }}"},
        "unknown model": {"model": "no-such-model"},
    }
    messages: dict[str, Any] = {
        "no messages": [],
        "messages of a wrong type": "Hello",
        "unknown role": [{"role": "wizard", "content": "Hello"}],
        "content of a wrong type": [{"role": "user", "content": 7}],
        "prompt above the context": [{"role": "user", "content": "long " * 5000}],
    }
    picture = jpeg(0, 56, 56)
    pictures = {
        "half a JPEG": picture[: len(picture) // 2],
        "no bytes": b"",
        "HTML in place of an image": b"<!doctype html><title>404</title>",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "header of 30000 x 30000": _png_header(30_000, 30_000),
        "width of 2^31 - 1": _png_header(2**31 - 1, 1),
        "no height": _png_header(4, 0),
    }
    urls = {
        "metadata service": "http://169.254.169.254/latest/meta-data/",
        "local file": "file:///etc/passwd",
        "path": "/etc/passwd",
        "wrong base64": "data:image/png;base64,@@@@",
        "unknown scheme": "gopher://127.0.0.1/",
    }
    good = chat_body("Hello", max_tokens=2)
    return [
        *(BadRequest(name, _chat(hello, **extra)) for name, extra in fields.items()),
        *(BadRequest(name, _chat(value)) for name, value in messages.items()),
        *(BadRequest(name, chat_body("?", data, max_tokens=4)) for name, data in pictures.items()),
        *(BadRequest(name, _with_url(url)) for name, url in urls.items()),
        BadRequest("no JSON", b"{"),
        BadRequest("no object", b"[1, 2]"),
        BadRequest("invalid UTF-8", b'{"model": "\xff\xfe"}'),
        BadRequest("equal keys", b'{"model": "nano", "model": "other", "messages": []}'),
        BadRequest("NaN", b'{"model": "nano", "messages": [], "temperature": NaN}'),
        BadRequest("nested", b"[" * 5000 + b"]" * 5000),
        BadRequest("no body", b""),
        BadRequest("another content type", good, headers={"Content-Type": "text/plain"}),
        BadRequest("foreign Origin", good, headers={"Origin": "http://evil.example"}),
        BadRequest("foreign Host", good, headers={"Host": "evil.example"}),
        BadRequest("unknown route", good, path="/v1/nothing"),
        BadRequest("another method", b"", method="DELETE"),
    ]
