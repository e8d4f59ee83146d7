"""What the bad-input tests share: the rows of rows.csv, requests, safe error texts, the canary.

Every test declares the rows that it sends by `@covers(...)`; test_rows.py checks that none is
missing. `Suite.ask` sends a chat request to the application, `Suite.refused` also checks the error
body: OpenAI's form, one line, the right item, and nothing of libraries, paths or the input's bytes.
"""

from __future__ import annotations

import base64
import csv
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.media import encoded, smooth

__all__ = [
    "CANARY",
    "ROWS",
    "Sent",
    "Suite",
    "covered_rows",
    "covers",
    "data_url",
    "image_item",
    "text_item",
    "video_item",
]

CHAT = "/v1/chat/completions"
FIRST = "messages[0].content[0]"

with (Path(__file__).parent / "rows.csv").open(encoding="utf-8", newline="") as _file:
    ROWS: Mapping[str, Mapping[str, str]] = {row["case"]: row for row in csv.DictReader(_file)}

covered_rows: dict[str, list[str]] = {}
_Test = TypeVar("_Test", bound=Callable[..., None])

ROOT = Path(__file__).resolve().parents[3]
PARENT = ROOT.parent if ROOT.parent.name else ROOT  # not the root folder, which begins every path

# Of libraries, this machine and the process; never in a text for clients.
UNSAFE = re.compile(
    r"Traceback|0x[0-9a-f]{6}|Errno|BytesIO|\bPIL\b|libav|avcodec|httpcore|httpx|h11|pydantic|"
    r"starlette|uvicorn|torch|numpy|llguidance|object at|site-packages|\.py\b|/tmp/|/root|/usr/|"
    rf"/home/|{re.escape(str(PARENT))}/|/proc/|"
    r"127\.0\.0\.1|[A-Za-z0-9+/]{64,}"
)


def covers(*cases: str) -> Callable[[_Test], _Test]:
    """Declare which rows of rows.csv a test sends."""

    def declare(test: _Test) -> _Test:
        for case in cases:
            assert case in ROWS, f"no row {case!r}"
            covered_rows.setdefault(case, []).append(test.__name__)
        return test

    return declare


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def text_item(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def image_item(source: bytes | str, **options: Any) -> dict[str, Any]:
    url = data_url(source) if isinstance(source, bytes) else source
    return {"type": "image_url", "image_url": {"url": url}, **options}


def video_item(source: bytes | str | list[str], **options: Any) -> dict[str, Any]:
    if isinstance(source, list):
        return {"type": "video", "video": source, **options}
    url = data_url(source, "video/mp4") if isinstance(source, bytes) else source
    return {"type": "video_url", "video_url": {"url": url}, **options}


@functools.cache
def canary_image() -> bytes:
    return encoded(smooth(84, 112), "JPEG")


CANARY: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "What is a canary?"}],
    [{"role": "user", "content": [image_item(canary_image()), text_item("Describe the image.")]}],
)


@dataclass(frozen=True)
class Sent:
    """An answer: status, JSON, and what the tests compare."""

    status: int
    body: dict[str, Any]

    @property
    def answer(self) -> tuple[Any, ...]:
        """Text, sampled tokens and their log probabilities: equal only for equal inputs."""
        choice = self.body["choices"][0]
        logprobs = [round(one["logprob"], 4) for one in choice["logprobs"]["content"]]
        return choice["message"]["content"], tuple(choice["token_ids"]), tuple(logprobs)

    @property
    def media(self) -> list[dict[str, Any]]:
        """What the server says about each image or video."""
        return self.body["usage"]["media"]

    @property
    def error(self) -> dict[str, Any]:
        return self.body["error"]


class Suite:
    """Sends requests to one application."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def post(self, body: Any, path: str = CHAT, **options: Any) -> Sent:
        """Send a JSON body."""
        response = self.client.post(path, json=body, **options)
        return Sent(response.status_code, response.json())

    def ask(self, content: Any, **fields: Any) -> Sent:
        """Send one user message, greedy, for a few tokens with log probabilities."""
        return self.chat([{"role": "user", "content": content}], **fields)

    def chat(self, messages: Any, **fields: Any) -> Sent:
        """Send a conversation, as `ask` does."""
        body = {
            "messages": messages,
            "max_tokens": 4,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": True,
            "return_token_ids": True,
            **fields,
        }
        return self.post({key: value for key, value in body.items() if value is not ...})

    def accepted(self, content: Any, **fields: Any) -> Sent:
        """Send one user message that must be answered."""
        sent = self.ask(content, **fields)
        assert sent.status == 200, sent.body
        assert sent.answer[1], "no token was generated"
        return sent

    def refused(
        self,
        content: Any,
        status: int = 400,
        text: str = "",
        *,
        param: str | None = FIRST,
        **fields: Any,
    ) -> dict[str, Any]:
        """Send one user message that must be refused; return its error."""
        return check_refusal(self.ask(content, **fields), status, text, param)

    def refused_fields(
        self, text: str = "", *, param: str | None = None, status: int = 400, **fields: Any
    ) -> dict[str, Any]:
        """Send a good message with bad fields; `param` is the first field unless given."""
        wanted = param or next(iter(fields))
        return check_refusal(self.ask("hi", **fields), status, text, wanted)

    def canary(self) -> list[tuple[Any, ...]]:
        """Return the answers to two good requests, one of them with an image."""
        sent = [self.chat(messages, max_tokens=6) for messages in CANARY]
        for one in sent:
            assert one.status == 200, one.body
        return [one.answer for one in sent]


def check_refusal(sent: Sent, status: int, text: str, param: str | None) -> dict[str, Any]:
    """Check an error body: status, text, item, and that it leaks nothing."""
    assert sent.status == status, sent.body
    assert set(sent.body) == {"error"}
    error = sent.error
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert re.search(text, message), message
    assert error["param"] == param, error
    check_safe(message)
    return error


def check_safe(message: str) -> None:
    """Check that a text for a client is one short line without internals."""
    assert "\n" not in message
    assert len(message) < 1000, len(message)
    found = UNSAFE.search(message)
    assert found is None, f"{found!r} in {message!r}"
