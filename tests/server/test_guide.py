"""docs/guides/serve.md names every field, option, error code and route of the server.

The examples of the page run in tests/flows/test_docs.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen2vl.server.app import load_operations
from qwen2vl.server.protocol.sampling import Unsupported
from qwen2vl.server.routing import Operation
from tests.flows.test_docs import options_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "guides" / "serve.md").read_text(encoding="utf-8")
OPERATIONS = load_operations()


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def spans(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def row(title: str) -> set[str]:
    """Return the code spans of a row of the table of fields."""
    (line,) = (line for line in section("Fields").splitlines() if line.startswith(f"| {title} |"))
    return spans(line)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.path)
def test_every_field_is_listed(operation: Operation) -> None:
    fields = operation.request_model.model_fields
    assert not set(fields) - spans(section("Fields"))
    unsupported = {
        name: mark.neutral
        for name, field in fields.items()
        for mark in field.metadata
        if isinstance(mark, Unsupported)
    }
    if operation.path == "/v1/responses":  # of which others have more
        for name in ("n", "return_token_ids", "prompt"):
            del unsupported[name]
    if operation.path == "/v1/chat/completions":
        del unsupported["echo"]
    listed = {True: row("refused unless it changes nothing"), False: row("refused")}
    assert not [name for name, neutral in unsupported.items() if name not in listed[bool(neutral)]]
    ignored = {name for name, field in fields.items() if "ignored" in str(field.description)}
    assert not ignored - row("ignored")


def test_fields_that_are_listed_exist() -> None:
    known = {name for one in OPERATIONS for name in one.request_model.model_fields}
    named = {span for span in spans(section("Fields")) if re.fullmatch(r"[a-z_]+", span)}
    assert not named - known


def test_every_route_is_listed() -> None:
    routes = section("Requests").partition("\nThe examples")[0]
    assert all(operation.path in routes for operation in OPERATIONS)


def test_every_option_is_listed() -> None:
    named = set(re.findall(r"--[a-z][\w-]*", PAGE))
    options = {option for option in options_of("serve") if option.startswith("--")}
    assert not options - named - {"--help", "--debug"}


def error_codes() -> Iterator[str]:
    """Yield the values of `code` in calls of APIError, and of functions that make one."""
    for path in (ROOT / "qwen2vl" / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.keyword) or node.arg != "code":
                continue
            if isinstance(node.value, ast.Constant):
                yield str(node.value.value)


def test_every_error_code_is_listed() -> None:
    codes = set(error_codes())
    assert {"model_not_found", "invalid_api_key", "rate_limit_exceeded"} <= codes
    assert not codes - spans(section("Errors"))
