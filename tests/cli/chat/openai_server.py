"""A scripted OpenAI-compatible server on loopback, for the tests of `qwen2vl chat --server`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Events = Sequence[Body | str]


@dataclass(kw_only=True)
class Reply:
    """One response: a status with a JSON body, or the events of a stream."""

    events: Events = ()
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    is_complete: bool = True  # ends with [DONE]; else the connection is closed
    then_wait: bool = False  # keep the stream open until the client closes it


@dataclass
class OpenAIServer:
    """What the server was asked, and what it answers."""

    url: str = ""
    models: Any = field(default_factory=lambda: {"data": [{"id": "nano"}, {"id": "forms"}]})
    answer: Callable[[Body], Reply] = lambda body: text_reply("Hello.")
    bodies: list[Body] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    client_left: threading.Event = field(default_factory=threading.Event)


def text_reply(*pieces: str, finish: str = "stop", usage: Body | None = None) -> Reply:
    """Return a stream of pieces of text."""
    events: list[Body | str] = [{"choices": [{"index": 0, "delta": {"role": "assistant"}}]}]
    events += [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if usage is not None:
        events.append({"choices": [], "usage": usage})
    return Reply(events=events)


def refusal(status: int, message: str, **headers: str) -> Reply:
    """Return an error in OpenAI's format."""
    return Reply(status=status, body={"error": {"message": message}}, headers=headers)


class _Handler(BaseHTTPRequestHandler):
    """Records a request and sends the scripted reply."""

    protocol_version = "HTTP/1.1"
    state: OpenAIServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.state.headers.append(dict(self.headers))
        models = self.state.models
        self.send(models if isinstance(models, Reply) else Reply(body=models))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.state.headers.append(dict(self.headers))
        self.state.bodies.append(body)
        self.send(self.state.answer(body))

    def send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name.replace("_", "-"), value)
        if reply.events:
            self.send_stream(reply)
            return
        text = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def send_stream(self, reply: Reply) -> None:
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for event in reply.events:
                data = event if isinstance(event, str) else json.dumps(event)
                self.wfile.write(f"data: {data}\n\n".encode())
            if reply.then_wait:
                self.wfile.flush()
                self.connection.settimeout(30)
                self.connection.recv(1)
        except ConnectionError:
            pass  # the client may leave before all is written
        if reply.then_wait:
            self.state.client_left.set()
        elif reply.is_complete:
            self.wfile.write(b"data: [DONE]\n\n")


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # of many requests at a time

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away


@contextmanager
def openai_server() -> Iterator[OpenAIServer]:
    """Run a server in a thread."""
    state = OpenAIServer()
    handler = type("Handler", (_Handler,), {"state": state})
    listener = _Listener(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
