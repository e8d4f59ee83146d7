"""docs/guides/serve.md names every field, option, error code and route of the server.

The examples of the page run in tests/flows/test_docs.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from qwen2vl.cli.serve.vllm_options import VLLM_OPTIONS
from qwen2vl.engine.stats import EngineStats
from qwen2vl.server.app import load_operations
from qwen2vl.server.metrics import ServerMetrics
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


SUPPORTED, IGNORED, NEUTRAL, REFUSED = (
    "",
    "Accepted and ignored",
    "Accepted only with a value that changes nothing",
    "Refused",
)


def listed_fields(kind: str, route: str) -> set[str]:
    """Return the fields of a kind that the page lists for a route, named by its last part."""
    text = section("Fields").partition(f"\n### {kind}\n")[2] if kind else section("Fields")
    names: set[str] = set()
    for line in text.partition("\n### ")[0].splitlines():
        if line.startswith("| "):
            _, _, fields, routes, _ = line.split("|")
        elif line.startswith("- "):
            routes, _, fields = line.removeprefix("- ").partition(":")
        else:
            continue
        if route in routes.strip().split(", "):
            names |= {span for span in spans(fields) if re.fullmatch(r"[a-z_]+", span)}
    return names


def kind_of(field: FieldInfo) -> str:
    """Return the kind of a field, by its model."""
    for mark in field.metadata:
        if isinstance(mark, Unsupported):
            return NEUTRAL if mark.neutral else REFUSED
    return IGNORED if "ignored" in str(field.description) else SUPPORTED


@pytest.mark.parametrize("kind", [SUPPORTED, IGNORED, NEUTRAL, REFUSED])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.path)
def test_the_fields_of_each_route_are_listed(operation: Operation, kind: str) -> None:
    fields = operation.request_model.model_fields
    route = operation.path.removesuffix("/completions") if "chat" in operation.path else ""
    listed = listed_fields(kind, (route or operation.path).rpartition("/")[2])
    expected = {name for name, field in fields.items() if kind_of(field) == kind}
    if "best_of" in expected:  # whose value is named
        assert "n" in expected
    assert listed == expected


def test_fields_that_are_listed_exist() -> None:
    known = {name for one in OPERATIONS for name in one.request_model.model_fields}
    named = {span for span in spans(section("Fields")) if re.fullmatch(r"[a-z_]+", span)}
    assert not named - known


@pytest.mark.parametrize("names", VLLM_OPTIONS)
def test_every_option_of_vllm_that_is_answered_is_listed(names: str) -> None:
    options = " ".join(f"`{'-' if len(name) < 3 else '--'}{name}`" for name in names.split())
    answer = re.sub(r"--[a-z][\w-]*", r"`\g<0>`", VLLM_OPTIONS[names])
    assert f"\n| {options} | {answer} |\n" in PAGE


def test_every_metric_is_listed() -> None:
    text = ServerMetrics(stats=EngineStats).expose().decode()
    names = set(re.findall(r"^# TYPE qwen2vl:(\w+) ", text, re.MULTILINE))
    names = {name for name in names if not name.endswith("_created")}
    assert not names - spans(section("Operation"))


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
