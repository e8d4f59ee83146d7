"""Server that answers every request at once with the same response: measures the client alone.

python -m serve.trivial_server PORT        (with benchmarks/ on PYTHONPATH)
"""

from __future__ import annotations

import asyncio
import re
import sys

BODY = (
    b'{"choices":[{"message":{"role":"assistant","content":"x"},"finish_reason":"length"}],'
    b'"usage":{"prompt_tokens":1,"completion_tokens":1}}'
)
RESPONSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY)
) + BODY
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class TrivialServer(asyncio.Protocol):
    """Reads requests by their length and answers each."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        while (end := self.data.find(b"\r\n\r\n")) >= 0:
            found = LENGTH.search(self.data, 0, end)
            total = end + 4 + (int(found[1]) if found else 0)
            if len(self.data) < total:
                return
            del self.data[:total]
            assert self.transport is not None
            self.transport.write(RESPONSE)


async def main(port: int) -> None:
    """Serve until the process is ended."""
    server = await asyncio.get_running_loop().create_server(TrivialServer, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
