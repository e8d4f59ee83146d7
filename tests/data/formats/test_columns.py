"""Columns: nulls count as absent, columns of other trainings are refused, unused ones are named."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.data.formats.columns import drop_nulls
from tests.data.formats.prepared import error_of, parse

ROW: dict[str, Any] = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
}


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"rejected_response": "no"}, "rejected_response"),
        ({"rejected_messages": [{"role": "assistant", "content": "no"}]}, "rejected_messages"),
        ({"rejected_images": ["a.png"]}, "rejected_images"),
        ({"chosen": "a", "rejected": "b"}, "chosen"),
        ({"preferred_output": [{"role": "assistant", "content": "a"}]}, "preferred_output"),
        ({"audios": ["a.wav"]}, "audios"),
        ({"audio": {"path": "a.wav", "array": [0.0]}}, "audio"),
        ({"completions": ["a"], "labels": [True]}, "completions"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
    ],
)
def test_columns_that_change_the_meaning_are_refused_by_name(
    columns: dict[str, Any], name: str
) -> None:
    text = error_of({**ROW, **columns})
    assert text.startswith(f"task: the column {name} ")
    assert "remove the column to train on the rest" in text


@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_a_row_of_kto_is_refused_and_its_remedy_teaches_no_bad_answer(key: str) -> None:
    bad, good = (error_of({**ROW, key: value}) for value in (False, True))
    assert bad.startswith(f"task: the column {key} marks an answer to avoid (KTO)")
    assert bad.endswith("leave the row out")
    assert good.endswith("remove the column to train on the answer")


@pytest.mark.parametrize("value", [None, "", [], {}])
def test_empty_columns_of_that_kind_are_nothing(value: Any) -> None:
    row = {**ROW, "rejected_response": value, "audios": value, "label": None}
    assert parse(row).unused == ()


def test_what_nothing_is_made_of_is_named() -> None:
    row = {**ROW, "id": 7, "label": 3, "source": "web", "score": 0, "empty": "", "null": None}
    assert parse(row).unused == ("label", "source", "score")


def test_rewards_are_named_as_unused() -> None:
    assert parse({**ROW, "reward": 0.5, "rewards": [1.0]}).unused == ("reward", "rewards")


def test_openai_preferences_are_of_another_task_not_of_an_unknown_format() -> None:
    row = {"input": {"messages": ROW["messages"]}, "non_preferred_output": ROW["messages"]}
    assert error_of(row).startswith("task: the column non_preferred_output is of preference data")


def test_keys_inside_a_column_are_named_too() -> None:
    turns = [
        {"from": "human", "value": "q", "markdown": None, "lang": "en"},
        {"from": "gpt", "value": "a", "model": "x"},
    ]
    assert parse({"conversations": turns}).unused == ("conversations.lang", "conversations.model")
    pair = {"user": "q", "assistant": "a", "source": "web"}
    assert parse({"texts": [pair, pair]}).unused == ("texts.source",)


def test_a_system_message_overrides_the_column_which_is_then_unused() -> None:
    own = {"messages": [{"role": "system", "content": "own"}, *ROW["messages"]], "system": "other"}
    assert parse(own).messages[0]["content"] == "own"
    assert parse(own).unused == ("system",)
    given = parse({**ROW, "system": "other"})
    assert (given.messages[0], given.unused) == ({"role": "system", "content": "other"}, ())


def test_nulls_are_dropped_at_every_depth_but_in_lists() -> None:
    value = {"a": None, "b": [{"c": None, "d": 0}, None], "e": {"f": {"g": None}}}
    assert drop_nulls(value) == {"b": [{"d": 0}, None], "e": {"f": {}}}


def test_nan_is_null_as_in_frames_of_pandas() -> None:
    nan = float("nan")
    assert drop_nulls({"a": nan, "b": [nan, 1.5, {"c": nan}]}) == {"b": [None, 1.5, {}]}
    row = {**ROW, "image": nan, "images": [nan], "system": nan, "objects": nan, "label": nan}
    assert (parse(row).messages, parse(row).unused) == (ROW["messages"], ())
