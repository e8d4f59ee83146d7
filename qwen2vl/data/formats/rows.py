"""The parser of rows: finds the format of a row by its columns.

The first column of this order that the row has decides: messages, conversations, conversation,
texts, prompt with completion, instruction with output, query with response, text, caption. Columns
that the format does not use, those of another format included, are reported as unused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qwen2vl.data.formats.columns import Row
from qwen2vl.data.formats.documents import (
    is_interleaved,
    parse_continuation,
    parse_interleaved,
    parse_text,
)
from qwen2vl.data.formats.messages import build_conversation, require_list
from qwen2vl.data.formats.pairs import (
    parse_alpaca,
    parse_prompt_completion,
    parse_qa_pairs,
    parse_query_response,
)
from qwen2vl.data.formats.samples import Conversation, Document, SampleError
from qwen2vl.data.formats.sharegpt import parse_sharegpt

__all__ = ["parse_row"]


def parse_row(row: Any, name: str) -> Conversation | Document:
    """Parse one row; `name` identifies the sample, with the row's own id appended if it has one.

    Raises:
        SampleError: unknown format, unknown role, a column of another kind of training, or tags
            and media that do not match.
    """
    if not isinstance(row, Mapping):
        raise SampleError("messages", f"the row is a {type(row).__name__}, not an object")
    row_id = row.get("id")
    name = f"{name} ({row_id})" if isinstance(row_id, str | int) and row_id != "" else name
    try:
        columns = Row(row)
        sample = _parse(columns, name)
    except RecursionError as error:
        raise SampleError("messages", "the row is nested too deeply") from error
    return replace(sample, unused=columns.unused(), notes=columns.notes())


def _parse(row: Row, name: str) -> Conversation | Document:
    if row.peek("messages") is not None:
        turns = require_list(row.take("messages"), "messages")
        if any(isinstance(turn, Mapping) and "from" in turn for turn in turns):
            return parse_sharegpt(turns, row, name, "messages")
        return build_conversation(name, turns, row, key="messages")
    for key in ("conversations", "conversation"):
        if row.peek(key) is not None:
            return parse_sharegpt(row.take(key), row, name, key)
    if row.peek("texts") is not None:
        if is_interleaved(row.peek("texts")):
            return parse_interleaved(row, name)
        return parse_qa_pairs(row.take("texts"), row, name)
    return _parse_columns(row, name)


def _parse_columns(row: Row, name: str) -> Conversation | Document:
    """Parse a row whose texts are in columns of their own."""
    prompt, completion = row.peek("prompt"), row.peek("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return parse_continuation(row, name)
    if prompt is not None and completion is not None:
        return parse_prompt_completion(row, name)
    if row.peek("instruction") is not None and row.peek("output") is not None:
        return parse_alpaca(row, name)
    if row.peek("query") is not None and row.peek("response") is not None:
        return parse_query_response(row, name)
    for key in ("text", "caption"):
        if isinstance(row.peek(key), str):
            return parse_text(row.take(key), row, name)
    raise SampleError("messages", _describe_unknown(row))


def _describe_unknown(row: Row) -> str:
    """Say what columns a row of no format has."""
    keys = row.describe_keys()
    if not keys:
        return "the row is empty"
    value = row.peek(keys)  # of the only column
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return (
            f"the row is an object whose {keys} is a list of {len(value):,} objects; if they are "
            "the rows, write that list alone, or one row a line"
        )
    return (
        f"the row has the keys {keys}, and none of messages, conversations, texts or text "
        "(docs/guides/data-formats.md has all formats)"
    )
