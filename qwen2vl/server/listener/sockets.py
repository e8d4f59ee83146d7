"""Listening sockets: bound at once, listening later.

A socket that is bound reserves its port while the model is loaded; clients are refused until the
server listens. Imports nothing of the server, so that a port in use is reported before anything is
loaded. (vLLM: create_server_socket.)
"""

from __future__ import annotations

import errno
import socket

from qwen2vl.errors import ConfigError

__all__ = ["open_socket"]


def open_socket(host: str, port: int) -> socket.socket:
    """Bind a TCP socket without listening; port 0: any free one.

    Clients are refused until `HTTPServer` listens; that the port is free is known at once.

    Raises:
        ConfigError: the address is in use, not one of this machine, or may not be used.
    """
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise ConfigError(f"--host {host}: is not a name or an address of this machine") from None
    family, kind, protocol, _, address = info[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _bind_error(host, port, error) from None
    return sock


def _bind_error(host: str, port: int, error: OSError) -> ConfigError:
    reasons = {
        errno.EADDRINUSE: "is in use; stop the program that listens there, or give another --port",
        errno.EACCES: "may not be used by this user; give a --port above 1023",
        errno.EADDRNOTAVAIL: "is not an address of this machine; give another --host",
    }
    reason = reasons.get(error.errno or 0, f"cannot be used: {error.strerror}")
    failure = ConfigError(f"{host}:{port} {reason}")
    failure.exit_code = 1  # the machine's state is the cause
    return failure
