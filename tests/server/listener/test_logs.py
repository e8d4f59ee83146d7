"""Log records: one line each in plain text, one object each in JSON, with tracebacks."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from qwen2vl.server.listener.logs import JsonFormatter, PlainFormatter, configure_logs
from qwen2vl.server.middleware.request_context import ACCESS_LOGGER

NAMES = ("qwen2vl", "uvicorn.error", ACCESS_LOGGER)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in NAMES]
    saved = [(one.handlers, one.propagate, one.level) for one in loggers]
    yield
    for one, (handlers, propagate, level) in zip(loggers, saved, strict=True):
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


def record(text: str, *, failed: bool = False) -> logging.LogRecord:
    info = None
    if failed:
        try:
            raise ValueError("the cause")
        except ValueError:
            info = sys.exc_info()
    return logging.LogRecord("qwen2vl.x", logging.WARNING, "", 0, text, (), info)


def test_plain() -> None:
    assert PlainFormatter().format(record("a\nb\x1b[31m")) == "qwen2vl: warning: a\\nb\\x1b[31m"
    text = PlainFormatter().format(record("a", failed=True))
    assert text.startswith("qwen2vl: warning: a\n  Traceback") and "ValueError: the cause" in text


def test_json() -> None:
    fields = json.loads(JsonFormatter().format(record("a\nb", failed=True)))
    assert (fields["level"], fields["logger"], fields["message"]) == (
        "warning",
        "qwen2vl.x",
        "a\nb",
    )
    assert "ValueError: the cause" in fields["traceback"]
    assert "\n" not in JsonFormatter().format(record("a\nb", failed=True))


@pytest.mark.parametrize("log_format", ["plain", "json"])
def test_where_logs_go(log_format: str, capfd: pytest.CaptureFixture[str]) -> None:
    configure_logs(log_format)  # type: ignore[arg-type]
    logging.getLogger("qwen2vl.engine").warning("a warning")
    logging.getLogger("qwen2vl.engine").info("not shown")
    logging.getLogger(ACCESS_LOGGER).info("GET")
    captured = capfd.readouterr()
    assert captured.out == "GET\n"
    assert "a warning" in captured.err and captured.err.count("\n") == 1
    assert "not shown" not in captured.err
