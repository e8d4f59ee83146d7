"""ServerAnswerer: answers the items of suites with a model of an OpenAI-compatible server.

The client is that of `qwen2vl chat --server`, and a number of requests is open at a time, so that
the server's batch is full. Pixels are sent as PNG. The log probability of an answer is the sum of
those that the server sends, which has no end token; None where it sends none.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from math import fsum
from typing import Any

from qwen2vl.cli.chat.backend import ChatServerError
from qwen2vl.cli.chat.server_backend import ServerBackend
from qwen2vl.cli.chat.server_connection import ServerConnection
from qwen2vl.eval.runner.run import SuiteAnswer
from qwen2vl.eval.task import Messages

__all__ = ["ServerAnswerer", "encode_pixels"]

RETRY_SECONDS = (1.0, 4.0, 16.0)  # before a request is sent again: a busy server, a lost connection


class ServerAnswerer:
    """Answers greedily, with several requests at a time. (Implements Answerer.)"""

    def __init__(
        self,
        connection: ServerConnection,
        model: str | None,
        *,
        max_tokens: int,
        concurrency: int,
    ) -> None:
        """Choose a model of the server.

        Args:
            connection: to the server.
            model: its name there; None: the first that the server lists.
            max_tokens: limit of an answer.
            concurrency: requests that are open at a time.

        Raises:
            InputError: the server has no such model, or names none.
            ChatServerError: the server cannot be reached.
        """
        parameters = {
            "max_tokens": max_tokens,
            "temperature": 0,
            "repetition_penalty": 1,
            "logprobs": True,
        }
        self._connection = connection
        self._backend = ServerBackend(connection, model, parameters)
        self._concurrency = concurrency

    @property
    def model(self) -> str:
        """The model's name on the server."""
        assert self._backend.adapter is not None, "a backend has chosen one"
        return self._backend.adapter

    def max_model_len(self) -> int | None:
        """Ask the server for the context of the model.

        Returns:
            Tokens of a prompt and its answer; None: the server does not list them.

        Raises:
            InputError: the server refused it.
            ChatServerError: the server cannot be reached, or failed.
        """
        return self._connection.max_model_len(self.model)

    def answer(
        self, batch: Sequence[Messages], on_answer: Callable[[], None]
    ) -> Sequence[SuiteAnswer]:
        """Answer a batch; after the first error no further request is sent.

        Raises:
            InputError: the server refused a request.
            ChatServerError: the server failed several times, or its stream broke off.
        """

        def answer_one(messages: Messages) -> SuiteAnswer:
            answer = self._request(messages)
            on_answer()
            return answer

        pool = ThreadPoolExecutor(self._concurrency)
        try:
            return list(pool.map(answer_one, batch))
        finally:
            pool.shutdown(cancel_futures=True)

    def _request(self, messages: Messages) -> SuiteAnswer:
        """Send a request, again after a failure of the server or the connection."""
        for seconds in RETRY_SECONDS:
            try:
                return self._request_once(messages)
            except ChatServerError:
                time.sleep(seconds)
        return self._request_once(messages)

    def _request_once(self, messages: Messages) -> SuiteAnswer:
        streamed = _StreamedAnswer()
        body = self._backend.request_body(encode_pixels(messages))
        with closing(self._backend.stream(body)) as chunks:
            for chunk in chunks:
                streamed.add(chunk)
        return streamed.complete()


@dataclass(slots=True)
class _StreamedAnswer:
    """The pieces of a streamed answer."""

    pieces: list[str] = field(default_factory=list[str])
    logprobs: list[float] = field(default_factory=list[float])
    prompt_tokens: int | None = None
    is_finished: bool = False

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take what a chunk brings; the last one has the usage."""
        tokens = (chunk.get("usage") or {}).get("prompt_tokens")
        if isinstance(tokens, int):
            self.prompt_tokens = tokens
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            self.pieces.append(str(delta.get("content") or delta.get("refusal") or ""))
            self.logprobs += _read_logprobs(choice)
            self.is_finished = self.is_finished or choice.get("finish_reason") is not None

    def complete(self) -> SuiteAnswer:
        """Return the answer.

        Raises:
            ChatServerError: the stream broke off.
        """
        if not self.is_finished:
            raise ChatServerError("the server ended its stream before the answer was complete")
        return SuiteAnswer(
            text="".join(self.pieces),
            logprob=fsum(self.logprobs) if self.logprobs else None,
            prompt_tokens=self.prompt_tokens,
        )


def encode_pixels(messages: Messages) -> Messages:
    """Return messages in which arrays of pixels are PNG files: one, or one for each frame."""
    return [
        {
            **message,
            "content": [_encode_part(part) for part in message["content"]]
            if isinstance(message["content"], list)
            else message["content"],
        }
        for message in messages
    ]


def _encode_part(part: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    if isinstance(pixels := part.get("image"), np.ndarray):
        return {**part, "image": _to_png(pixels)}
    if isinstance(frames := part.get("video"), np.ndarray):
        return {**part, "video": [_to_png(frame) for frame in frames]}
    return part


def _to_png(pixels: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _read_logprobs(choice: dict[str, Any]) -> list[float]:
    content = (choice.get("logprobs") or {}).get("content") or ()
    return [float(one["logprob"]) for one in content]
