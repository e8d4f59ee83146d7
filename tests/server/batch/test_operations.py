"""BatchRequestHandler: every route, failures as the server's, media, an engine that dies."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen2vl.engine import AsyncLLM
from qwen2vl.errors import EngineDeadError, MediaWorkersBusyError
from qwen2vl.files.record_file import RecordFile
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.media_worker.pool import MediaWorkerPool
from qwen2vl.server.app import load_operations
from qwen2vl.server.batch import operations
from qwen2vl.server.batch.operations import LazyDecoder, run_requests
from qwen2vl.server.batch.requests import BATCH_URLS, BatchInput
from qwen2vl.server.batch.runner import BatchCounts
from qwen2vl.server.errors import APIError
from qwen2vl.server.serving import chat as serving_chat
from qwen2vl.server.state import ServerState
from tests.server.conftest import StateMaker

CHAT = "/v1/chat/completions"


def chat(*content: Any, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": list(content)}]
    return {"messages": messages, "temperature": 0, "max_tokens": 16, **fields}


def text(question: str) -> dict[str, Any]:
    return {"type": "text", "text": question}


def run(
    folder: Path, state: ServerState, *requests: tuple[str, dict[str, Any]]
) -> tuple[list[Any], BatchCounts]:
    """Answer requests, given as url and body; return the output's lines in order, and counts."""
    lines = [
        json.dumps({"custom_id": str(number), "url": url, "body": body})
        for number, (url, body) in enumerate(requests)
    ]
    (folder / "in").write_text("\n".join(lines))
    batch = BatchInput(folder / "in", max_bytes=10**6, max_depth=64)
    counts = BatchCounts()
    with RecordFile(folder / "out", row_start=b'{"id": "batch_req_') as file:
        asyncio.run(run_requests(state, batch, file, counts))
    records = [json.loads(one) for one in (folder / "out").read_text().splitlines()]
    return sorted(records, key=lambda one: int(one["custom_id"])), counts


def test_answers_are_those_of_llm_chat(
    tmp_path: Path, make_state: StateMaker, async_llm: AsyncLLM
) -> None:
    questions = [f"What is {word} backwards?" for word in ("apple", "river", "a1", "B2c", "tree")]
    records, counts = run(tmp_path, make_state(), *((CHAT, chat(text(q))) for q in questions))
    expected = asyncio.run(
        async_llm.chat(
            [[{"role": "user", "content": q}] for q in questions],
            temperature=0,
            max_tokens=16,
            skip_grounding_tokens=True,
        )
    )
    bodies = [one["response"]["body"] for one in records]
    assert [one["choices"][0]["message"]["content"] for one in bodies] == [
        one.text for one in expected
    ]
    assert (counts.answered, counts.failed) == (5, 0)
    assert counts.output_tokens == sum(len(one.token_ids) for one in expected)
    for one in records:
        assert one["error"] is None
        assert one["response"]["status_code"] == 200
        assert list(one) == ["id", "custom_id", "response", "error"]
        assert one["id"] == "batch_" + one["response"]["request_id"]


def test_every_route_of_openai(tmp_path: Path, make_state: StateMaker) -> None:
    assert set(BATCH_URLS) == {one.path for one in load_operations() if "/v1/" in one.path}
    records, _ = run(
        tmp_path,
        make_state(),
        (CHAT, chat(text("Hi"))),
        ("/v1/completions", {"prompt": "a", "max_tokens": 2}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 2}),
        ("/v1/embeddings", {"input": ["a", "b"]}),
    )
    assert [one["response"]["body"]["object"] for one in records] == [
        *("chat.completion", "text_completion", "response", "list")
    ]


def test_failures_are_those_of_the_server(tmp_path: Path, make_state: StateMaker) -> None:
    records, counts = run(
        tmp_path,
        make_state(),
        (CHAT, chat(text("Hi"), temperature_=1)),
        (CHAT, chat(text("Hi"), model="other")),
        (CHAT, chat(text("Hi"), max_tokens=100_000)),
        ("/v1/embeddings", {"input": ""}),
    )
    assert [one["response"]["status_code"] for one in records] == [400, 404, 400, 400]
    for one in records:
        error = one["response"]["body"]["error"]
        assert one["error"] == {"code": error["code"], "message": error["message"]}
    assert [one["error"]["code"] for one in records] == [
        *("unknown_parameter", "model_not_found", "context_length_exceeded", "invalid_value")
    ]
    assert (counts.answered, counts.failed) == (0, 4)


def test_media_are_refused_unless_allowed(tmp_path: Path, make_state: StateMaker) -> None:
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    image = {"type": "image_url", "image_url": {"url": f"file://{tmp_path}/a.png"}}
    request = (CHAT, chat(image, text("What is it?")))
    (closed,), _ = run(tmp_path, make_state(), request)
    assert closed["error"]["code"] == "media_not_allowed"
    assert "unless --allowed-local-media-path DIR" in closed["error"]["message"]
    (tmp_path / "out").unlink()
    (opened,), _ = run(tmp_path, make_state(allowed_local_media_path=tmp_path), request)
    assert opened["error"] is None
    (seen,) = opened["response"]["body"]["usage"]["media"]
    assert seen["original_size"] == {"width": 56, "height": 56}


def test_a_file_that_does_not_exist_is_named(tmp_path: Path, make_state: StateMaker) -> None:
    url = f"file://{tmp_path}/none.png"
    image = {"type": "image_url", "image_url": {"url": url}}
    state = make_state(allowed_local_media_path=tmp_path)
    (record,), _ = run(tmp_path, state, (CHAT, chat(text("Hi"), image)))
    message = f"messages[0].content[1]: the file does not exist; check the path {url!r}"
    assert record["error"] == {"code": "media_not_found", "message": message}
    assert record["response"]["body"]["error"]["message"] == message


def test_a_request_runs_again_after_the_engine_died(
    tmp_path: Path, make_state: StateMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state()
    real, calls = state.engine.stream_prepared, 0

    def die_twice(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= 2:
            raise EngineDeadError("died")
        return real(*arguments, **options)

    monkeypatch.setattr(state.engine, "stream_prepared", die_twice)
    (record,), _ = run(tmp_path, state, (CHAT, chat(text("Hi"))))
    assert (record["error"], calls) == (None, 3)
    calls = -2
    (tmp_path / "out").unlink()
    (record,), counts = run(tmp_path, state, (CHAT, chat(text("Hi"))))
    assert record["response"]["status_code"] == 503
    assert record["error"]["code"] == "engine_error"
    assert counts.failed == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MediaWorkersBusyError("busy"), 503),
        (APIError(502, "no connection"), 502),
        (APIError(408, "too slow"), 408),
    ],
)
def test_what_may_succeed_later_is_tried_again(
    tmp_path: Path,
    make_state: StateMaker,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
) -> None:
    state = make_state()
    real, num_failures = serving_chat.prepare, 3

    async def prepare(*arguments: Any, **options: Any) -> Any:
        nonlocal num_failures
        num_failures -= 1
        if num_failures >= 0:
            raise error
        return await real(*arguments, **options)

    monkeypatch.setattr(operations, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(serving_chat, "prepare", prepare)
    (record,), _ = run(tmp_path, state, (CHAT, chat(text("Hi"))))
    assert (record["error"], num_failures) == (None, -1)
    (tmp_path / "out").unlink()
    num_failures = 4
    (record,), _ = run(tmp_path, state, (CHAT, chat(text("Hi"))))
    assert (record["response"]["status_code"], num_failures) == (status, 0)


def test_an_internal_error_does_not_show_its_text(
    tmp_path: Path, make_state: StateMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state()

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(state.engine, "stream_prepared", fail)
    (record,), _ = run(tmp_path, state, (CHAT, chat(text("Hi"))))
    assert record["response"]["status_code"] == 500
    assert "secret" not in json.dumps(record)


def test_media_workers_start_with_the_first_image() -> None:
    pool = MediaWorkerPool(1)
    try:
        decoder = LazyDecoder(pool)
        assert pool.worker_pids == []
        buffer = io.BytesIO()
        Image.new("RGB", (30, 20)).save(buffer, "PNG")
        for _ in range(2):
            opened = decoder.open_image(
                buffer.getvalue(), MediaLimits(), "a", apply_exif_orientation=True
            )
            assert opened.image.size == (30, 20)
        assert len(pool.worker_pids) == 1
    finally:
        pool.close()
