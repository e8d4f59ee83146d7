"""Fixtures of the bad-input tests: the application with media workers, and the canary."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from qwen2vl.engine import AsyncLLM
from qwen2vl.processor.media_worker.pool import MediaWorkerPool
from qwen2vl.server.app import create_app
from qwen2vl.server.config import ServerConfig
from qwen2vl.server.launch import build_state, prepare_llm
from tests.server.bad_inputs.suite import Suite


@pytest.fixture(scope="package")
def media_workers() -> Iterator[MediaWorkerPool]:
    """Give two processes that decode."""
    with MediaWorkerPool(2) as pool:
        yield pool


@pytest.fixture(scope="package", autouse=True)
def _decode_in_workers(async_llm: AsyncLLM, media_workers: MediaWorkerPool) -> Iterator[None]:
    """Let the shared engine decode in workers, as a real server does."""
    processor = async_llm.llm.processor
    prepare_llm(async_llm.llm, ServerConfig(), media_workers)
    yield
    async_llm.llm.processor = processor


@pytest.fixture(scope="package")
def suite(async_llm: AsyncLLM) -> Iterator[Suite]:
    """Give the application of the default configuration."""
    app = create_app(build_state(async_llm, ServerConfig()))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        yield Suite(client)


@pytest.fixture(scope="package")
def canary_answers(suite: Suite) -> list[tuple[object, ...]]:
    """Give the answers to the canary requests before any bad input."""
    return suite.canary()


@pytest.fixture(autouse=True)
def _canary(
    request: pytest.FixtureRequest, suite: Suite, canary_answers: list[tuple[object, ...]]
) -> Iterator[None]:
    """Check after the last case of every test that the next good requests get the same answers."""
    yield
    items = request.session.items
    following = items[items.index(request.node) + 1 :][:1]
    if not following or following[0].function is not request.function:  # pyright: ignore[reportAttributeAccessIssue]
        assert suite.canary() == canary_answers
