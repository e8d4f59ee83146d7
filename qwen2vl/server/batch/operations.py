"""Answers the requests of a batch by the handlers of the server, in this process.

    BatchRequest -> pydantic model -> handler -> {"id", "custom_id", "response", "error"}

Validation, limits, media and errors are those of HTTP, and `response` has the status and the body
that a client of the server would get; a failed request also has `error`, as requests that never ran
have it. What may succeed a moment later, such as the fetch of an image, is tried again. (OpenAI:
the Batch API's output; vLLM: run_batch, BatchRequestOutput.)
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from qwen2vl.errors import EngineError, MediaWorkerError, abbreviate
from qwen2vl.files.record_file import RecordFile
from qwen2vl.processor.media.rgb import DecodedImage
from qwen2vl.processor.media.source import MediaLimits, MediaSource
from qwen2vl.processor.media.video_metadata import VideoReader
from qwen2vl.processor.media.video_source import VideoSource
from qwen2vl.processor.media_worker.pool import MediaWorkerPool
from qwen2vl.server.app import load_operations
from qwen2vl.server.batch.requests import BATCH_URLS, BatchRequest
from qwen2vl.server.batch.runner import Answer, BatchCounts, run_jobs
from qwen2vl.server.errors import APIError, to_api_error
from qwen2vl.server.metrics import REQUEST_TOKENS
from qwen2vl.server.middleware.validation_errors import validation_error
from qwen2vl.server.routing import Operation
from qwen2vl.server.state import Caller, ServerState

__all__ = ["BatchRequestHandler", "LazyDecoder", "run_requests"]

logger = logging.getLogger(__name__)

UNAVAILABLE = 503  # the engine has stopped, or the media workers have
TRANSIENT = frozenset({408, 429, 502, UNAVAILABLE})  # statuses of what may succeed a moment later
_PATH = re.compile(r"([a-z_]+)|\[(\d+)\]")  # parts of messages[0].content[1]
RETRY_SECONDS = (1.0, 4.0, 16.0)  # before each further attempt


async def run_requests(
    state: ServerState,
    requests: Iterable[BatchRequest],
    file: RecordFile,
    counts: BatchCounts,
    *,
    on_answer: Callable[[BatchCounts], None] = lambda counts: None,
) -> None:
    """Answer all requests into a file; arguments and errors are those of `run_jobs`."""
    tokens: dict[str, int] = {}
    REQUEST_TOKENS.set(tokens)  # the tasks of the requests have the same one

    def count(counts: BatchCounts) -> None:
        counts.output_tokens = tokens.get("completion_tokens", 0)
        on_answer(counts)

    handler = BatchRequestHandler(state)
    try:
        await run_jobs(iter(requests), handler, file, state.engine, counts, on_answer=count)
    finally:
        await state.connector.close()


class BatchRequestHandler:
    """Answers requests by the handlers of a server's state.

    Args:
        state: of a server that does not listen.
    """

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._operations = {one.path: one for one in load_operations() if one.path in BATCH_URLS}

    async def answer(self, request: BatchRequest) -> Answer:
        """Answer one request; what is wrong with it becomes its answer.

        Raises:
            EngineError: the engine has failed, not the request.
        """
        if request.error is not None:
            return _failed(request, request.error)
        for seconds in RETRY_SECONDS:
            answer = await self._try(request)
            if isinstance(answer, Answer):
                return answer
            if answer.status not in TRANSIENT:
                return _failed(request, answer)
            await asyncio.sleep(seconds)
        answer = await self._try(request)
        return answer if isinstance(answer, Answer) else _failed(request, answer)

    async def _try(self, request: BatchRequest) -> Answer | APIError:
        caller = Caller(request.request_id)
        try:
            body = self._validate(self._operations[request.url], request.body)
            result = await self._operations[request.url].handler(self._state, body, caller)
        except Exception as error:
            converted = to_api_error(error, caller.request_id)
            if converted.status == UNAVAILABLE and not _is_of_media_workers(error):
                raise EngineError(converted.message) from error
            if converted.code == "media_not_found":
                return _with_source(converted, request.body)
            if converted.status == 500 and not isinstance(error, APIError):
                logger.error("request %s failed", caller.request_id, exc_info=error)
            return converted
        return Answer(row=_row(request, 200, _body(result), b"null"))

    def failure(self, request: BatchRequest, error: EngineError) -> Answer:
        """Return the answer of a request with which the engine died again and again."""
        cause = error.__cause__
        return _failed(request, cause if isinstance(cause, APIError) else to_api_error(error))

    def _validate(self, operation: Operation, body: dict[str, Any]) -> BaseModel:
        try:
            return operation.request_model.model_validate(body)
        except ValidationError as error:
            raise validation_error(error, body, operation.request_model) from None


class LazyDecoder:
    """Media workers that are started by the first image or video; a batch of texts has none.

    Args:
        pool: not started; its owner closes it.
    """

    def __init__(self, pool: MediaWorkerPool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._is_started = False

    def open_image(
        self, source: MediaSource, limits: MediaLimits, name: str, *, apply_exif_orientation: bool
    ) -> DecodedImage:
        """Open any image as RGB; raises as `MediaWorkerPool.open_image` does."""
        return self._started_pool().open_image(
            source, limits, name, apply_exif_orientation=apply_exif_orientation
        )

    def open_video(
        self,
        source: VideoSource,
        limits: MediaLimits,
        name: str,
        *,
        fps: float,
        apply_exif_orientation: bool,
    ) -> VideoReader:
        """Open a video of any kind; raises as `MediaWorkerPool.open_video` does."""
        return self._started_pool().open_video(
            source, limits, name, fps=fps, apply_exif_orientation=apply_exif_orientation
        )

    def _started_pool(self) -> MediaWorkerPool:
        with self._lock:
            if not self._is_started:
                self._pool.start()
                self._pool.wait_until_ready()
                self._is_started = True
        return self._pool


def _is_of_media_workers(error: BaseException) -> bool:
    return any(isinstance(one, MediaWorkerError) for one in (error, error.__cause__))


def _body(result: Any) -> bytes:
    """Return the body of a response; no handler streams, because `stream` is refused."""
    if isinstance(result, Response):
        return bytes(result.body)
    assert isinstance(result, BaseModel), "a handler returns one of these"
    return result.model_dump_json().encode()


def _with_source(error: APIError, body: Any) -> APIError:
    """Add the URL of a file that does not exist; a server does not repeat paths, a batch may."""
    for name, index in _PATH.findall(error.param or ""):
        try:
            body = body[name] if name else body[int(index)]
        except (LookupError, TypeError):  # the param is no path of this body
            return error
    url = _find_url(body)
    if url is None:
        return error
    return APIError(
        error.status, f"{error.message} {abbreviate(url, 300)}", param=error.param, code=error.code
    )


def _find_url(value: Any) -> str | None:
    """Return the first file:// URL of a value."""
    if isinstance(value, str):
        return value if value[:7].lower() == "file://" else None
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((url for url in map(_find_url, values) if url is not None), None)


def _failed(request: BatchRequest, error: APIError) -> Answer:
    summary = {"code": error.code or error.type, "message": error.message}
    body = json.dumps(error.to_body(), ensure_ascii=False).encode()
    row = _row(request, error.status, body, json.dumps(summary, ensure_ascii=False).encode())
    return Answer(row=row, error=error.message)


def _row(request: BatchRequest, status: int, body: bytes, error: bytes) -> bytes:
    """Return a line of the output; bodies are JSON already, without line breaks."""
    custom_id = json.dumps(request.custom_id, ensure_ascii=False).encode()
    return (
        b'{"id": "%s", "custom_id": %s, "response": {"status_code": %d, "request_id": "%s", '
        b'"body": %s}, "error": %s}\n'
        % (request.id.encode(), custom_id, status, request.request_id.encode(), body, error)
    )
