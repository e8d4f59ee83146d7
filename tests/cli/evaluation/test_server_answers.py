"""ServerAnswerer: requests to an OpenAI-compatible server, in parallel; what it may refuse."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from qwen2vl.cli.chat.backend import ChatServerError
from qwen2vl.cli.chat.server_connection import ServerConnection
from qwen2vl.cli.evaluation import server_answers
from qwen2vl.cli.evaluation.server_answers import ServerAnswerer
from qwen2vl.errors import InputError
from tests.cli.chat.openai_server import Body, OpenAIServer, Reply, openai_server, refusal

QUESTIONS = [[{"role": "user", "content": f"question {n}"}] for n in range(12)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.delenv("QWEN2VL_API_KEY", raising=False)
    with openai_server() as running:
        running.answer = echo
        yield running


def answerer(server: OpenAIServer, concurrency: int = 4) -> ServerAnswerer:
    return ServerAnswerer(ServerConnection(server.url), None, max_tokens=9, concurrency=concurrency)


def reply(*pieces: tuple[str, float | None], finish: str | None = "stop") -> Reply:
    """Return a stream of pieces of text with their log probabilities."""
    choices: list[Body] = []
    for text, logprob in pieces:
        content = [] if logprob is None else [{"token": text, "logprob": logprob}]
        logprobs = {"logprobs": {"content": content}} if content else {}
        choices.append({"index": 0, "delta": {"content": text}, **logprobs})
    if finish is not None:
        choices.append({"index": 0, "delta": {}, "finish_reason": finish})
    usage = {"choices": [], "usage": {"prompt_tokens": 37}}
    return Reply(events=[*({"choices": [choice]} for choice in choices), usage])


def echo(body: Body) -> Reply:
    return reply((f"re: {body['messages'][0]['content']}", -0.25), ("!", -0.5))


def test_answers_are_in_the_order_of_the_batch(server: OpenAIServer) -> None:
    counted: list[int] = []
    answers = answerer(server).answer(QUESTIONS, lambda: counted.append(1))
    assert [a.text for a in answers] == [f"re: question {n}!" for n in range(12)]
    assert {a.logprob for a in answers} == {-0.75}
    assert {a.prompt_tokens for a in answers} == {37} and len(counted) == 12
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("nano", 0, 9)
    assert body["logprobs"] is True and body["repetition_penalty"] == 1


@pytest.mark.parametrize(
    ("card", "expected"),
    [({"max_model_len": 4096}, 4096), ({}, None), ({"max_model_len": "many"}, None)],
)
def test_the_context_of_the_model_is_asked_for(
    server: OpenAIServer, card: Body, expected: int | None
) -> None:
    server.models = {"data": [{"id": "nano", **card}, {"id": "forms", "max_model_len": 7}]}
    assert answerer(server).max_model_len() == expected


def test_several_requests_are_open_at_a_time(server: OpenAIServer) -> None:
    together = threading.Barrier(4, timeout=20)

    def wait(body: Body) -> Reply:
        together.wait()
        return echo(body)

    server.answer = wait
    assert len(answerer(server).answer(QUESTIONS, lambda: None)) == 12


def test_a_server_without_log_probabilities_is_asked_without_them(server: OpenAIServer) -> None:
    def refuse(body: Body) -> Reply:
        if "logprobs" in body:
            return refusal(400, "logprobs is not supported")
        return reply(("yes", None))

    server.answer = refuse
    answers = answerer(server, 1).answer(QUESTIONS[:3], lambda: None)
    assert [(a.text, a.logprob) for a in answers] == [("yes", None)] * 3
    assert len(server.bodies) == 4  # refused once


def test_pixels_are_sent_as_png(server: OpenAIServer) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (3, 20, 30, 3), dtype=np.uint8)
    content = [
        {"type": "image", "image": pixels[0]},
        {"type": "video", "video": pixels, "fps": 2},
        {"type": "text", "text": "What?"},
    ]
    server.answer = lambda body: reply(("ok", None))
    answerer(server).answer([[{"role": "user", "content": content}]], lambda: None)
    image, video, text = server.bodies[0]["messages"][0]["content"]
    assert (pixels[0] == decode(image["image_url"]["url"])).all()
    assert [(decode(url) == f).all() for url, f in zip(video["video"], pixels, strict=True)] == [
        *(True, True, True)
    ]
    assert video["fps"] == 2 and text["text"] == "What?"


def decode(url: str) -> np.ndarray:
    content = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    return np.array(Image.open(io.BytesIO(content)))


def test_a_failed_request_is_sent_again(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_answers, "RETRY_SECONDS", (0.0, 0.0))
    replies = [refusal(503, "busy"), reply(("half", -1.0), finish=None), reply(("yes", -1.0))]
    server.answer = lambda body: replies.pop(0)
    (answer,) = answerer(server).answer(QUESTIONS[:1], lambda: None)
    assert (answer.text, answer.logprob, len(server.bodies)) == ("yes", -1.0, 3)


def test_errors_end_the_batch(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_answers, "RETRY_SECONDS", (0.0,))
    server.answer = lambda body: refusal(400, "too long")
    with pytest.raises(InputError, match="refused the request"):
        answerer(server, 1).answer(QUESTIONS, lambda: None)
    assert len(server.bodies) <= 3  # the others were not sent
    server.answer = lambda body: reply(("half", -1.0), finish=None)
    with pytest.raises(ChatServerError, match="before the answer was complete"):
        answerer(server).answer(QUESTIONS[:1], lambda: None)
