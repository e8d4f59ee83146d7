"""The same requests to the server and to an `LLM` in this process: are the answers equal?"""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2vl.engine import LLM, SamplingParams
from serve.http_client import Connection, ServerClosedError
from serve.prompts import chat_body, jpeg, question

__all__ = ["Answer", "differences", "llm_answer", "mixed_bodies", "server_answers"]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SAMPLING = ("temperature", "top_p", "seed", "n", "stop", "presence_penalty", "max_tokens")


@dataclass(frozen=True)
class Answer:
    """One completion: text, end, and tokens as bytes with their log probabilities."""

    text: str
    finish_reason: str
    tokens: tuple[tuple[int, ...], ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Request:
    """A route and a body that `LLM` can answer as well."""

    path: str
    body: Mapping[str, Any]


def mixed_bodies(count: int, seed: int = 0) -> list[Request]:
    """Return requests of text, one or two pictures, frames, raw completions; streamed and not.

    Some are greedy, others are sampled with a seed, penalties, stop strings or several samples.
    """
    rng = random.Random(seed)
    return [_body(rng, seed + number) for number in range(count)]


def _body(rng: random.Random, number: int) -> Request:
    sampling: dict[str, Any] = rng.choice(
        (
            {"temperature": 0},
            {"temperature": 0, "presence_penalty": 0.5},
            {"temperature": 0, "stop": [" a", "circle"]},
            {"temperature": 0.9, "top_p": 0.8, "seed": number},
            {"temperature": 1.2, "seed": number, "n": 2},
        )
    )
    sampling = sampling | {"max_tokens": rng.randint(4, 40), "stream": rng.random() < 0.5}
    text, form = question(number), rng.randrange(6)
    if form == 0:
        sampling |= {"logprobs": 0, "model": "nano", "prompt": text}
        return Request(COMPLETIONS, sampling)
    size = rng.choice(((56, 84), (224, 224), (112, 280)))
    # A few pictures come more than once, so that the caches are used too.
    picture = jpeg(number if rng.random() < 0.7 else number % 5, *size)
    body = json.loads(
        chat_body(
            text,
            None if form == 1 else picture,
            max_tokens=1,
            ignore_eos=False,
            logprobs=True,
            top_logprobs=0,
        )
    )
    content = body["messages"][-1]["content"]
    if form == 2:
        content.insert(0, {"type": "image_url", "image_url": {"url": _url(jpeg(number + 1, 56))}})
    if form == 3:
        frames = [_url(jpeg(number + frame, 84, 84)) for frame in range(4)]
        content[0] = {"type": "video", "video": frames}
    return Request(CHAT, body | sampling)


def _url(data: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


# The LLM ----------------------------------------------------------------------------------------


def llm_answer(llm: LLM, request: Request) -> list[Answer]:
    """Answer one request in this process."""
    body = request.body
    params = SamplingParams(
        **{name: body[name] for name in SAMPLING if name in body},
        logprobs=0,
        ignore_eos=body.get("ignore_eos", False),
        skip_grounding_tokens=True,
    )
    if request.path == COMPLETIONS:
        completions = llm.generate(body["prompt"], params)
    else:
        completions = llm.chat(body["messages"], params)
    tokenizer = llm.processor.tokenizer
    end_ids = {tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")}
    answers = []
    for completion in completions:
        assert completion.logprobs is not None
        scored = list(completion.logprobs)
        # The server leaves the end token out, as OpenAI does.
        if completion.finish_reason == "stop" and scored and scored[-1].token_id in end_ids:
            scored.pop()
        answers.append(
            Answer(
                completion.text,
                completion.finish_reason,
                tuple(tuple(tokenizer.id_to_bytes(one.token_id)) for one in scored),
                tuple(one.logprob for one in scored),
            )
        )
    return answers


# The server -------------------------------------------------------------------------------------


async def server_answers(
    port: int, requests: Sequence[Request], concurrency: int
) -> list[list[Answer] | str]:
    """Send all requests from `concurrency` clients; an error's text in place of answers."""
    found: list[list[Answer] | str] = [""] * len(requests)
    numbers = iter(range(len(requests)))

    async def client() -> None:
        connection = Connection(port)
        for number in numbers:
            try:
                found[number] = await _ask(connection, requests[number])
            except (OSError, ServerClosedError, LookupError, ValueError) as error:
                connection.abort()
                found[number] = f"{type(error).__name__}: {error}"
        connection.abort()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return found


async def _ask(connection: Connection, request: Request) -> list[Answer] | str:
    await connection.send("POST", request.path, json.dumps(request.body).encode())
    status, headers = await connection.receive_head()
    if status == 200 and request.body["stream"]:
        events = [event async for event in connection.events(headers)]
        if events[-1] != b"[DONE]":
            return f"the stream ended with {events[-1][:200]!r}"
        chunks = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
        return _answers(chunks)
    data = b"".join([piece async for piece in connection.pieces(headers)])
    return _answers(json.loads(data)["choices"]) if status == 200 else f"{status}: {data!r}"


def _answers(choices: Iterable[dict[str, Any]]) -> list[Answer]:
    """Join the choices of a response, or of all chunks of a stream, to answers."""
    parts: dict[int, list[dict[str, Any]]] = {}
    for choice in choices:
        parts.setdefault(choice["index"], []).append(choice)
    answers = []
    for _, pieces in sorted(parts.items()):
        text, reason = "", ""
        tokens: list[tuple[int, ...]] = []
        logprobs: list[float] = []
        for piece in pieces:
            message = piece.get("delta") or piece.get("message") or {"content": piece.get("text")}
            text += message.get("content") or ""
            reason = piece.get("finish_reason") or reason
            scored = piece.get("logprobs") or {}
            for one in scored.get("content") or ():
                tokens.append(tuple(one["bytes"]))
                logprobs.append(one["logprob"])
            tokens += [tuple(one.encode()) for one in scored.get("tokens") or ()]
            logprobs += scored.get("token_logprobs") or ()
        answers.append(Answer(text, reason, tuple(tokens), tuple(logprobs)))
    return answers


def differences(found: Sequence[Answer] | str, expected: Sequence[Answer]) -> str:
    """Return what differs between two lists of answers, "" if they are equal.

    Log probabilities may differ by rounding: batches of another size add in another order.
    """
    if isinstance(found, str) or len(found) != len(expected):
        return f"got {found!r}"
    for mine, other in zip(found, expected, strict=True):
        for name in ("text", "finish_reason", "tokens"):
            if getattr(mine, name) != getattr(other, name):
                return f"{name}: got {getattr(mine, name)!r}, LLM has {getattr(other, name)!r}"
        if any(abs(a - b) > 1e-3 for a, b in zip(mine.logprobs, other.logprobs, strict=True)):
            return f"logprobs: got {mine.logprobs}, LLM has {other.logprobs}"
    return ""
