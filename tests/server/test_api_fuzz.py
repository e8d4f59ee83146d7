"""Generated requests: none may cause an internal error, leak internals, or harm a later answer.

Schemathesis draws them from /openapi.json; hypothesis builds messages that are almost right, and
damages images and videos. All draws are seeded (tests/conftest.py: derandomize). A few hundred
cases run always, thousands are marked slow.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from starlette.testclient import TestClient

from qwen2vl.engine import AsyncLLM
from qwen2vl.processor.media_worker.pool import MediaWorkerPool
from qwen2vl.server.app import create_app
from qwen2vl.server.config import ServerConfig
from qwen2vl.server.launch import build_state, prepare_llm
from tests.media import animation, encoded, encoded_video, noise, smooth
from tests.server.bad_inputs.suite import CHAT, Suite, check_safe, data_url

MAX_TOKENS = 2  # of a generated request, so that valid ones are quick


@pytest.fixture(scope="module")
def suite(async_llm: AsyncLLM) -> Iterator[Suite]:
    """Give an application that decodes in media workers."""
    processor = async_llm.llm.processor
    with MediaWorkerPool(2) as pool:
        prepare_llm(async_llm.llm, ServerConfig(), pool)
        app = create_app(build_state(async_llm, ServerConfig(access_log=False)))
        with TestClient(app, base_url="http://127.0.0.1:8000") as client:
            yield Suite(client)
    async_llm.llm.processor = processor


def run_cases(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], cases: int) -> None:
    """Call `check` with values of a strategy; a failing one is shrunk."""

    @settings(
        max_examples=cases,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much),
        deadline=None,
    )
    @given(strategy)
    def run(value: Any) -> None:
        check(value)

    run()


def numbers_of_cases(few: int, many: int) -> Any:
    return pytest.mark.parametrize(
        "cases", [few, pytest.param(many, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
    )


def check_response(response: Any) -> None:
    """Check that a response is an answer, a stream of them, or a refusal in OpenAI's form."""
    assert response.status_code < 500, response.text
    if response.status_code < 400:
        events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        for event in events:
            assert event == "[DONE]" or "error" not in json.loads(event), event
        return
    if not response.content:  # HEAD
        return
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]


# Path -> field that limits its output.
LIMITS = {CHAT: "max_tokens", "/v1/completions": "max_tokens", "/v1/responses": "max_output_tokens"}


def shortened(body: Any, path: str) -> Any:
    """Let a request that may be valid generate few tokens; bad values stay."""
    if not isinstance(body, dict) or path not in LIMITS:
        return body
    names = (LIMITS[path], "max_completion_tokens") if path == CHAT else (LIMITS[path],)
    short = {
        name: MAX_TOKENS if type(body[name]) is int and body[name] > MAX_TOKENS else body[name]
        for name in names
        if body.get(name) is not None
    }
    return {**body, **(short or {LIMITS[path]: MAX_TOKENS})}


def with_integers(value: Any) -> Any:
    """Write whole numbers without a fraction: 3.0 is an integer for JSON Schema, not here."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: with_integers(one) for key, one in value.items()}
    return [with_integers(one) for one in value] if isinstance(value, list) else value


# The description -------------------------------------------------------------------------------


def send(client: TestClient, case: Any) -> Any:
    """Send a case of schemathesis by the application's test client."""
    headers = {name: str(value) for name, value in (case.headers or {}).items()}
    options: dict[str, Any] = {"params": dict(case.query or {})}
    if case.method == "POST":
        body = None if not isinstance(case.body, dict | list | str | int | float) else case.body
        text = json.dumps(shortened(with_integers(body), case.path))
        options["content"] = text.encode("utf-8", "surrogatepass")
        headers["content-type"] = case.media_type or "application/json"
    safe = {
        name: value
        for name, value in headers.items()
        if name.isascii() and value.isascii() and value.isprintable()
    }
    return client.request(case.method, case.formatted_path, headers=safe, **options)


@numbers_of_cases(60, 5000)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_description(suite: Suite, mode: GenerationMode, cases: int) -> None:
    description = suite.client.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(description)
    operations = [result.ok() for result in schema.get_all_operations()]  # pyright: ignore[reportAttributeAccessIssue]
    assert len(operations) >= 8
    strategies = [operation.as_strategy(generation_mode=mode) for operation in operations]
    before = suite.canary()
    run_cases(st.one_of(strategies), lambda case: check_response(send(suite.client, case)), cases)
    assert suite.canary() == before


# Messages --------------------------------------------------------------------------------------


@functools.cache
def files() -> tuple[bytes, ...]:
    images = [encoded(smooth(40, 56), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP")]
    return (
        *images,
        encoded(noise(30, 30), "TIFF"),
        animation("GIF", 3),
        animation("PNG", 3),
        encoded_video(4, width=32, height=32),
        encoded_video(3, width=32, height=32, container="matroska", codec="mpeg4"),
    )


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(
        ["<|im_end|>", "<|image_pad|>", "\0", "data:", "a" * 300, "\u202e", "http://["]
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def often(value: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw junk instead of a value one time in eight."""
    return st.integers(0, 7).flatmap(lambda number: JUNK if number == 0 else value)


URLS = st.deferred(
    lambda: (
        st.sampled_from(files()).map(data_url)
        | st.sampled_from(
            ["http://127.0.0.1/", "file:///etc/passwd", "data:,", "x", "data:image/png;base64,"]
        )
    )
)
OPTIONS = st.dictionaries(
    st.sampled_from(
        ["min_pixels", "max_pixels", "fps", "nframes", "detail", "resized_height", "video_start"]
    ),
    st.integers(-1, 10**6) | st.sampled_from(["low", "high", 0.5, None]) | JUNK,
    max_size=2,
)


def item(kind: str, key: str, value: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    fixed = st.fixed_dictionaries({"type": often(st.just(kind)), key: often(value)})
    return st.tuples(OPTIONS, fixed).map(lambda pair: {**pair[0], **pair[1]})


ITEMS = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": often(st.text(max_size=30))}),
    item("image_url", "image_url", URLS.map(lambda url: {"url": url})),
    item("image", "image", URLS),
    item("video_url", "video_url", URLS.map(lambda url: {"url": url})),
    item("video", "video", st.lists(URLS, max_size=3)),
    item("box", "box", st.lists(st.integers(-5, 2000), max_size=5)),
    JUNK,
)
CALL = st.fixed_dictionaries(
    {
        "id": often(st.just("call_1")),
        "type": often(st.just("function")),
        "function": often(
            st.fixed_dictionaries({"name": often(st.just("f")), "arguments": often(st.just("{}"))})
        ),
    }
)
MESSAGES = often(
    st.lists(
        often(
            st.fixed_dictionaries(
                {
                    "role": often(st.sampled_from(["user", "assistant", "system", "tool"])),
                    "content": often(st.text(max_size=30) | st.lists(ITEMS, max_size=3)),
                },
                optional={"tool_calls": often(st.lists(CALL, max_size=2)), "name": JUNK},
            )
        ),
        min_size=1,
        max_size=3,
    )
)


@numbers_of_cases(150, 5000)
def test_messages(suite: Suite, cases: int) -> None:
    before = suite.canary()

    def check(messages: Any) -> None:
        body = {"messages": messages, "max_tokens": 1}
        content = json.dumps(body).encode("utf-8", "surrogatepass")
        headers = {"content-type": "application/json"}
        response = suite.client.post(CHAT, content=content, headers=headers)
        assert response.status_code in (200, 400, 413), response.text
        check_response(response)

    run_cases(MESSAGES, check, cases)
    assert suite.canary() == before


# Bytes -----------------------------------------------------------------------------------------


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """Damage a good file: flip, delete, insert and repeat bytes, or cut it."""
    data = bytearray(draw(st.sampled_from(files())))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["flip", "delete", "insert", "repeat", "cut"]))
        if kind == "flip" and data:
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "delete":
            del data[start : start + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[start:start] = draw(st.binary(max_size=20))
        elif kind == "repeat":
            data[start:start] = data[start : start + 200]
        elif kind == "cut":
            del data[start:]
    return bytes(data)


@numbers_of_cases(150, 5000)
def test_media_bytes(suite: Suite, cases: int) -> None:
    before = suite.canary()

    def check(case: tuple[bytes, str]) -> None:
        data, kind = case
        part = {"type": kind, kind: {"url": data_url(data)}}
        body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
        response = suite.client.post(CHAT, json=body)
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            error = response.json()["error"]
            check_safe(error["message"])
            assert error["param"] in ("messages[0].content[0]", "messages"), error

    sources = damaged_files() | st.binary(max_size=300)
    kinds = st.sampled_from(["image_url", "video_url"])
    run_cases(st.tuples(sources, kinds), check, cases)
    assert suite.canary() == before
