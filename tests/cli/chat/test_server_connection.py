"""The HTTP client of `chat --server`: addresses, keys, and servers that are none."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from qwen2vl.cli.chat.backend import ChatServerError
from qwen2vl.cli.chat.server_connection import ServerConnection
from qwen2vl.errors import InputError
from tests.cli.chat.openai_server import OpenAIServer, Reply, text_reply


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("localhost:8000", "http://localhost:8000/v1"),
        ("https://host/api?x=1#y", "https://host/api/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_addresses(given: str, url: str) -> None:
    assert ServerConnection(given).url == url


@pytest.mark.parametrize(
    "given", ["ftp://host", "http://", "http://user:secret@host", "http://h:x"]
)
def test_other_addresses_are_refused(given: str) -> None:
    with pytest.raises(InputError, match="give http://HOST:PORT") as caught:
        ServerConnection(given)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["a b", "a\nb", "caf\xe9"])
def test_malformed_keys_are_refused(key: str) -> None:
    with pytest.raises(InputError, match="API key") as caught:
        ServerConnection("localhost:8000", key)
    assert key not in str(caught.value)


def test_an_address_without_a_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ChatServerError, match=f"cannot connect to http://127.0.0.1:{port}/v1; "):
        ServerConnection(f"127.0.0.1:{port}").list_models()


@pytest.mark.parametrize("models", [{}, [], "text", {"data": "x"}, Reply(body="<html>")])
def test_a_server_of_something_else(server: OpenAIServer, models: Any) -> None:
    server.models = models
    with pytest.raises(InputError, match="no list of models"):
        ServerConnection(server.url).list_models()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"error": {"message": "a"}}, "a"),  # OpenAI
        ({"error": "b"}, "b"),
        ({"object": "error", "message": "c"}, "c"),  # older vLLM
        ({"detail": "d"}, "d"),  # FastAPI
        ("plain", "plain"),
        ("", "Not Found"),
    ],
)
def test_error_bodies(server: OpenAIServer, body: Any, text: str) -> None:
    server.models = Reply(status=404, body=body)
    with pytest.raises(InputError) as caught:
        ServerConnection(server.url).list_models()
    assert str(caught.value) == f"the server refused the request (404): {text}"


def test_an_endless_error_is_cut(server: OpenAIServer) -> None:
    server.models = Reply(status=400, body="x" * 300_000)
    with pytest.raises(InputError) as caught:
        ServerConnection(server.url).list_models()
    assert len(str(caught.value)) < 600


def test_closing_the_generator_closes_the_connection(server: OpenAIServer) -> None:
    server.answer = lambda body: Reply(events=text_reply("a", "b").events, then_wait=True)
    chunks = ServerConnection(server.url).stream_chat({})
    next(chunks)
    chunks.close()
    assert server.client_left.wait(20)
