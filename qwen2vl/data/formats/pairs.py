"""Formats of questions and answers in columns: Cauldron, Alpaca, ms-swift's query, TRL's prompt.

    {"texts": [{"user": ..., "assistant": ...}], "images": [...]}            Cauldron, FineVision
    {"instruction": ..., "input": ..., "output": ..., "history": [[q, a]]}   Alpaca, LLaMA-Factory
    {"query": ..., "response": ..., "history": [[q, a]]}                     ms-swift
    {"prompt": [messages], "completion": [messages]}                         TRL, conversational

The answers of a history are learned, as LLaMA-Factory and ms-swift do; of prompt and completion
only the completion is. `system` and `tools` may be added to each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qwen2vl.data.formats.columns import Row
from qwen2vl.data.formats.messages import build_conversation, require_list
from qwen2vl.data.formats.samples import Conversation, SampleError
from qwen2vl.errors import abbreviate

__all__ = ["parse_alpaca", "parse_prompt_completion", "parse_qa_pairs", "parse_query_response"]


def parse_qa_pairs(value: Any, row: Row, name: str) -> Conversation:
    """Parse a list of questions with their answers; media without a tag precede the first.

    Raises:
        SampleError: a pair lacks its question or its answer.
    """
    turns: list[Mapping[str, Any]] = []
    for i, pair in enumerate(require_list(value, "texts")):
        if not isinstance(pair, Mapping) or {"user", "assistant"} - pair.keys():
            raise SampleError(
                "messages", f"texts[{i}] is {abbreviate(pair)}; it must have user and assistant"
            )
        for key in pair:
            if key not in ("user", "assistant"):
                row.add_unused(f"texts.{key}")
        turns += _pair(pair["user"], pair["assistant"])
    return build_conversation(name, turns, row, key="texts")


def parse_alpaca(row: Row, name: str) -> Conversation:
    """Parse instruction and input, joined by a line break, and output.

    Raises:
        SampleError: a column is no text, or the history is malformed.
    """
    instruction, given = _take_text(row, "instruction"), _take_text(row, "input")
    question = "\n".join(text for text in (instruction, given) if text)
    turns = [*_history(row), *_pair(question, _take_text(row, "output"))]
    return build_conversation(name, turns, row, key="instruction")


def parse_query_response(row: Row, name: str) -> Conversation:
    """Parse query and response.

    Raises:
        SampleError: a column is no text, or the history is malformed.
    """
    question = _take_text(row, "query")
    turns = [*_history(row), *_pair(question, _take_text(row, "response"))]
    return build_conversation(name, turns, row, key="query")


def parse_prompt_completion(row: Row, name: str) -> Conversation:
    """Parse the messages of prompt and completion, of which only the latter are learned.

    Raises:
        SampleError: a message is malformed.
    """
    prompt = require_list(row.take("prompt"), "prompt")
    completion = require_list(row.take("completion"), "completion")
    return build_conversation(
        name, [*prompt, *completion], row, key="prompt + completion", num_context=len(prompt)
    )


def _history(row: Row) -> Iterator[Mapping[str, Any]]:
    """Yield the messages of [[question, answer], ...]."""
    history = row.take("history") or []
    if not isinstance(history, list):
        raise SampleError("messages", f"history is {abbreviate(history)}; it must be a list")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise SampleError(
                "messages",
                f"history[{i}] is {abbreviate(pair)}; it must be [question, answer]",
            )
        yield from _pair(*pair)


def _pair(question: Any, answer: Any) -> list[Mapping[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _take_text(row: Row, key: str) -> str:
    value = row.take(key)
    if value is not None and not isinstance(value, str):
        raise SampleError("messages", f"{key} is {abbreviate(value)}; it must be text")
    return value or ""
