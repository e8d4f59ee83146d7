"""Connections that are slow, endless, malformed or too many, by raw sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tests.server.conftest import LiveServer, ServerStarter, wait_until

HEAD = "POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
READY = b"GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@contextmanager
def connection(server: LiveServer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        yield sock


def read_response(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read one response with a Content-Length; (0, {}, b"") if the connection was closed."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = sock.recv(65536)
        if not chunk:
            return 0, {}, b""
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    while len(body) < int(headers["content-length"]):
        body += sock.recv(65536)
    return int(lines[0].split()[1]), headers, body


def code_of(body: bytes) -> str:
    return json.loads(body)["error"]["code"]


def is_closed(sock: socket.socket) -> bool:
    """Read until the server closes; within the socket's timeout."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def test_a_connection_is_reused(live_server: LiveServer) -> None:
    with connection(live_server) as sock:
        for _ in range(3):
            sock.sendall(READY)
            assert read_response(sock)[0] == 200


def test_pipelined_requests_are_answered_in_order(live_server: LiveServer) -> None:
    with connection(live_server) as sock:
        sock.sendall(READY + READY.replace(b"/ready", b"/none") + READY)
        data = b""
        while data.count(b"HTTP/1.1 ") < 3:
            data += sock.recv(65536)
        statuses = [part[:3] for part in data.split(b"HTTP/1.1 ")[1:]]
        assert statuses == [b"200", b"404", b"200"]


def test_headers_that_drip_are_refused(start_server: ServerStarter) -> None:
    server = start_server(header_timeout=0.2)
    with connection(server) as sock:
        sock.sendall(b"GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        began = time.monotonic()
        status, headers, body = read_response(sock)
        assert (status, code_of(body), headers["connection"]) == (408, "request_timeout", "close")
        assert time.monotonic() - began < 5
        assert is_closed(sock)


def test_a_second_request_that_drips_is_refused(start_server: ServerStarter) -> None:
    server = start_server(header_timeout=0.2)
    with connection(server) as sock:
        sock.sendall(READY)
        assert read_response(sock)[0] == 200
        sock.sendall(b"GET /rea")
        assert read_response(sock)[0] == 408


def test_a_silent_connection_is_closed(start_server: ServerStarter) -> None:
    server = start_server(header_timeout=0.2)
    with connection(server) as sock:
        assert is_closed(sock)


def test_an_idle_connection_is_closed_after_the_keep_alive_timeout(
    start_server: ServerStarter,
) -> None:
    server = start_server(keep_alive_timeout=1.0)
    with connection(server) as sock:
        sock.sendall(READY)
        assert read_response(sock)[0] == 200
        assert is_closed(sock)


def test_long_headers_are_refused(live_server: LiveServer) -> None:
    line = b"X-Long: " + b"a" * 20_000 + b"\r\n\r\n"
    with connection(live_server) as sock:
        sock.sendall(b"GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\n" + line)
        status, _, body = read_response(sock)
        assert (status, code_of(body)) == (431, "headers_too_large")
    with connection(live_server) as sock:  # without an end
        sock.sendall(b"GET /ready HTTP/1.1\r\nX-Long: " + b"a" * 20_000)
        status, _, body = read_response(sock)
        assert (status, code_of(body)) == (431, "headers_too_large")


def test_many_headers_are_refused(live_server: LiveServer) -> None:
    many = b"".join(b"X-%d: 1\r\n" % index for index in range(150))
    with connection(live_server) as sock:
        sock.sendall(b"GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\n" + many + b"\r\n")
        assert read_response(sock)[0] == 431


def test_garbage_is_refused(live_server: LiveServer) -> None:
    for garbage in (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
        with connection(live_server) as sock:
            sock.sendall(garbage)
            status, _, body = read_response(sock)
            assert (status, code_of(body)) == (400, "invalid_http")
            assert is_closed(sock)


def test_two_lengths_are_refused(live_server: LiveServer) -> None:
    """Proxies and servers that disagree about the end of a body allow request smuggling."""
    for lengths in (
        "Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        "Content-Length: -5\r\n\r\n",
        "Content-Length: 1e3\r\n\r\n",
    ):
        with connection(live_server) as sock:
            sock.sendall((HEAD + lengths).encode())
            assert read_response(sock)[0] == 400


def test_a_length_above_the_limit_is_refused_before_the_body(live_server: LiveServer) -> None:
    with connection(live_server) as sock:
        sock.sendall((HEAD + "Content-Length: 99999999999\r\n\r\n").encode())
        began = time.monotonic()
        status, _, body = read_response(sock)
        assert (status, code_of(body)) == (413, "body_too_large")
        assert time.monotonic() - began < 1


def test_expect_continue_is_not_granted_to_a_large_body(live_server: LiveServer) -> None:
    expect = "Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n"
    with connection(live_server) as sock:
        sock.sendall((HEAD + expect).encode())
        assert read_response(sock)[0] == 413  # not 100


def send_endless_chunks(sock: socket.socket, limit: int) -> int:
    """Send chunks until the server closes, or a limit; return the bytes that were taken."""
    sent = 0
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    try:
        while sent < limit:
            sock.sendall(chunk)
            sent += len(chunk)
    except (BrokenPipeError, ConnectionResetError):
        pass
    return sent


def test_an_endless_body_is_refused_while_it_streams(start_server: ServerStarter) -> None:
    server = start_server(max_body_bytes=1_000_000)
    with connection(server) as sock:
        sock.sendall((HEAD + "Transfer-Encoding: chunked\r\n\r\n").encode())
        began = time.process_time()
        sent = send_endless_chunks(sock, 200_000_000)
        assert sent < 20_000_000  # what the kernel's buffers hold is not read
        assert time.process_time() - began < 0.5  # of this process: both ends
        status, _, body = read_response(sock)
        assert (status, code_of(body)) == (413, "body_too_large")


def test_a_body_of_tiny_chunks_is_refused(live_server: LiveServer) -> None:
    with connection(live_server) as sock:
        sock.sendall((HEAD + "Transfer-Encoding: chunked\r\n\r\n").encode())
        with suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(b"1\r\n \r\n" * 100_000)
        assert read_response(sock)[0] == 400


def test_an_endless_body_of_an_unknown_route_is_cut(live_server: LiveServer) -> None:
    head = "POST /none HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connection(live_server) as sock:
        sock.sendall(head.encode())
        assert read_response(sock)[0] == 404
        deadline = time.monotonic() + 20
        with_error = False
        while not with_error and time.monotonic() < deadline:
            try:
                sock.sendall(b"1\r\n \r\n")
            except (BrokenPipeError, ConnectionResetError):
                with_error = True
            time.sleep(0.01)
        assert with_error


def test_the_connection_is_reused_after_a_body_that_nobody_read(live_server: LiveServer) -> None:
    head = "POST /none HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 8\r\n\r\n"
    with connection(live_server) as sock:
        sock.sendall(head.encode() + b"1234")
        assert read_response(sock)[0] == 404
        sock.sendall(b"5678" + READY)
        assert read_response(sock)[0] == 200


def test_a_dripping_body_is_refused(start_server: ServerStarter) -> None:
    server = start_server(body_timeout=0.3)
    with connection(server) as sock:
        sock.sendall((HEAD + "Content-Length: 1000\r\n\r\n").encode())
        began = time.monotonic()
        sock.settimeout(0.02)
        answer: Any = None
        while answer is None:
            try:
                sock.sendall(b" ")
                answer = read_response(sock)
            except TimeoutError:
                assert time.monotonic() - began < 10
        assert (answer[0], code_of(answer[2])) == (408, "request_timeout")


def test_a_client_that_does_not_read_is_dropped(start_server: ServerStarter) -> None:
    """Requests are pipelined until the responses fill the buffers; nothing of them is read."""
    server = start_server(write_timeout=0.3)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(20)
        sock.connect(("127.0.0.1", server.port))
        connections = server.server.server_state.connections
        wait_until(lambda: len(connections) == 1)
        request = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        try:
            for _ in range(2000):
                sock.sendall(request)
        except OSError:
            pass
        wait_until(lambda: not connections)


def test_connections_are_limited(start_server: ServerStarter) -> None:
    server = start_server(max_connections=2)
    with connection(server) as first, connection(server) as second:
        for sock in (first, second):
            sock.sendall(READY)
            assert read_response(sock)[0] == 200
        with connection(server) as third:
            status, headers, body = read_response(third)
            assert (status, code_of(body)) == (503, "too_many_connections")
            assert headers["retry-after"] == "1"
        first.close()
        wait_until(lambda: len(server.server.server_state.connections) == 1)
        with connection(server) as fourth:
            fourth.sendall(READY)
            assert read_response(fourth)[0] == 200


def test_an_upgrade_to_websockets_is_not_granted(live_server: LiveServer) -> None:
    head = "GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket"
    with connection(live_server) as sock:
        sock.sendall(f"{head}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        assert read_response(sock)[0] == 200
