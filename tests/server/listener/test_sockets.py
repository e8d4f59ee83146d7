"""Ports are reserved at once, and what is wrong with an address is said in one line."""

from __future__ import annotations

import socket

import pytest

from qwen2vl.errors import ConfigError
from qwen2vl.server.listener.sockets import open_socket


def test_a_port_is_bound_but_does_not_listen() -> None:
    with (
        open_socket("127.0.0.1", 0) as sock,
        socket.socket() as client,
        pytest.raises(ConnectionRefusedError),
    ):
        client.connect(sock.getsockname())


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} is in use.*--port") as caught:
            open_socket("127.0.0.1", port)
        assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "host", ["203.0.113.7", "no.such.name.invalid", "a" * 64 + ".b", "é\udc00"]
)
def test_an_address_of_another_machine_is_refused(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "invalid" in host:  # no name server is asked

        def fail(*_: object, **__: object) -> None:
            raise socket.gaierror

        monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(ConfigError, match=r"is not an address of this machine|--host"):
        open_socket(host, 0)


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        sock = open_socket("::1", 0)
    except ConfigError:
        pytest.skip("no IPv6 loopback")
    with sock:
        assert sock.family == socket.AF_INET6
