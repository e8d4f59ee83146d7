"""Logs of a server: the access log on stdout, everything else on stderr; plain text or JSON.

Unlike the notes of other commands, an error is logged with its traceback: clients get a request id
instead of a text, and this is where to look it up. Texts are escaped, because a path or a file name
may hold line breaks or terminal control sequences.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import TextIO

from qwen2vl.server.config import LogFormat
from qwen2vl.server.middleware.request_context import ACCESS_LOGGER

__all__ = ["JsonFormatter", "PlainFormatter", "configure_logs"]

LIBRARY_LOGGERS = ("qwen2vl", "uvicorn.error")


class PlainFormatter(logging.Formatter):
    """Formats a record as `qwen2vl: LEVEL: text`, with the traceback in further lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        text = f"qwen2vl: {record.levelname.lower()}: {_escape(record.getMessage())}"
        if record.exc_info:
            text += "\n  " + self.formatException(record.exc_info).replace("\n", "\n  ")
        return text


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        fields = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def configure_logs(log_format: LogFormat) -> None:
    """Replace the handlers of the library's loggers and of the access log."""
    formatter = JsonFormatter() if log_format == "json" else PlainFormatter()
    handler = _handler(sys.stderr, formatter, logging.WARNING)
    for name in LIBRARY_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    access = logging.getLogger(ACCESS_LOGGER)
    access.handlers = [_handler(sys.stdout, logging.Formatter("%(message)s"), logging.INFO)]
    access.propagate = False
    access.setLevel(logging.INFO)


def _handler(stream: TextIO, formatter: logging.Formatter, level: int) -> logging.Handler:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    handler.setLevel(level)
    return handler


def _escape(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
