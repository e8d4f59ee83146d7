"""A file of rows for each framework: tokens as of messages by hand, and what is learned."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen2vl.data.config import SourceConfig
from qwen2vl.data.formats import parse_row
from qwen2vl.data.sources.source import open_source
from tests.data.formats.prepared import DATA, learned, prepare, write_pictures
from tests.tiny import tiny_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
END = "<|im_end|>"
A, B = {"type": "image", "image": "a.png"}, {"type": "image", "image": "b.png"}
STAR = "\u273f"


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else [*content]}


def answer(*content: Any) -> dict[str, Any]:
    return {**user(*content), "role": "assistant"}


def box(*numbers: float, picture: int = 1) -> dict[str, Any]:
    return {"type": "box", "box": numbers, "picture": picture}


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}}


@dataclass(frozen=True)
class Expected:
    """The messages by hand that a row must equal in tokens, and the spans that are learned."""

    messages: Sequence[Any]
    learned: Sequence[str]
    tools: Any = None
    unused: tuple[str, ...] = ()


SHORT = {"role": "system", "content": "Be short."}
BOX = "<|box_start|>(179,238),(536,714)<|box_end|>"

EXPECTED: dict[str, list[Expected]] = {
    "ms_swift.jsonl": [
        Expected(
            [
                user(A, text("Find "), {"type": "ref", "ref": "the dog"}, text(", please.")),
                answer(
                    {"type": "ref", "ref": "a dog"},
                    box(20, 20, 60, 60),
                    text(" and "),
                    box(0, 0, 10, 84),
                ),
            ],
            [
                f"<|object_ref_start|>a dog<|object_ref_end|>{BOX} and "
                f"<|box_start|>(0,0),(89,999)<|box_end|>{END}"
            ],
        ),
        Expected(
            [
                user(A, text("Open it")),
                answer("click(start_box='<|box_start|>(500,250)<|box_end|>')"),
            ],
            [f"click(start_box='<|box_start|>(500,250)<|box_end|>'){END}"],
        ),
        Expected(
            [
                user(A, B, text("Where?")),
                answer(box(10, 10, 20, 20, picture=2), text(" "), box(10, 10, 20, 20, picture=1)),
            ],
            [
                "<|box_start|>(179,71),(357,143)<|box_end|> "
                f"<|box_start|>(89,119),(179,238)<|box_end|>{END}"
            ],
        ),
        Expected(
            [user(A, text("Where?")), answer("<|box_start|>(100,250),(500,999)<|box_end|>")],
            [f"<|box_start|>(100,250),(500,999)<|box_end|>{END}"],
        ),
        Expected(
            [user("Hello!"), answer("Hi"), user("1+1?"), answer("2")],
            [f"2{END}"],
            unused=("channel",),
        ),
        Expected(
            [
                user(A, text("Time?")),
                {**answer("I look."), "tool_calls": [call("click", '{"x": 1}')]},
                {"role": "tool", "content": [text('{"images": "'), B, text('"}')]},
                answer("Eleven."),
            ],
            [
                f'I look.\n{STAR}FUNCTION{STAR}: click\n{STAR}ARGS{STAR}: {{"x": 1}}\n'
                f"{STAR}RESULT{STAR}",
                f": Eleven.{END}",
            ],
            tools=[{"name": "click"}],
        ),
        Expected(
            [SHORT, user(A, text("Color?")), answer("Red."), user("And now?"), answer("Blue.")],
            [f"Red.{END}", f"Blue.{END}"],
        ),
        Expected([SHORT, user("Color?"), answer("Red.")], [f"Red.{END}"]),
    ],
    "llama_factory.json": [
        Expected(
            [
                SHORT,
                user(A, text("Weather in both?")),
                {
                    "role": "assistant",
                    "tool_calls": [
                        call("get", '{"city": "Bonn"}'),
                        call("get", '{"city": "Ulm"}'),
                    ],
                },
                {"role": "tool", "content": "dry"},
                answer("Dry."),
            ],
            [
                f'{STAR}FUNCTION{STAR}: get\n{STAR}ARGS{STAR}: {{"city": "Bonn"}}\n'
                f'{STAR}FUNCTION{STAR}: get\n{STAR}ARGS{STAR}: {{"city": "Ulm"}}\n'
                f"{STAR}RESULT{STAR}",
                f": Dry.{END}",
            ],
            tools=[{"name": "get", "description": "weather"}],
        ),
        Expected(
            [SHORT, user("Name?"), answer("Bo."), user("Translate.\nHund"), answer("dog")],
            [f"Bo.{END}", f"dog{END}"],
        ),
        Expected([user("Say hi."), answer("hi")], [f"hi{END}"]),
    ],
    "trl.jsonl": [
        Expected([user(A, text("Color?")), answer("red")], [f"red{END}"]),
        Expected([user(A, text("Color?")), answer("red")], [f"red{END}"]),
        Expected(
            [user("Hello"), answer("Hi"), user(A, text("Color?")), answer("red")], [f"red{END}"]
        ),
        Expected([], [" blue.<|endoftext|>"]),
        Expected(
            [
                user("Lights on."),
                {"role": "assistant", "tool_calls": [call("light", '{"place": "hall"}')]},
                {"role": "tool", "content": "on"},
                answer("Done!"),
            ],
            [
                f'{STAR}FUNCTION{STAR}: light\n{STAR}ARGS{STAR}: {{"place": "hall"}}\n'
                f"{STAR}RESULT{STAR}",
                f": Done!{END}",
            ],
            tools=[{"function": {"name": "light", "parameters": {"type": "object"}}}],
        ),
    ],
    "datasets.jsonl": [
        Expected([user(B, A, text("Which?")), answer("both")], [f"both{END}"], unused=("source",)),
        Expected([user("Hello"), answer("Hi")], [f"Hi{END}"], unused=("source",)),
    ],
    "llava.json": [
        Expected([user(text("Color?"), A), answer("red")], [f"red{END}"]),
        Expected([user("Hello"), answer("Hi")], [f"Hi{END}"]),
    ],
    "openai.jsonl": [
        Expected(
            [SHORT, user("Capital?"), answer("Rome"), user("Sure?"), answer("Paris")],
            [f"Paris{END}"],
        ),
        Expected(
            [
                user("Weather?"),
                {"role": "assistant", "tool_calls": [call("get", '{"city": "Bonn"}')]},
                {"role": "tool", "content": "dry"},
                answer("Dry."),
            ],
            [f": Dry.{END}"],
            tools=[{"name": "get", "parameters": {}}],
            unused=("parallel_tool_calls",),
        ),
    ],
}
ROWS = [
    pytest.param(name, index, expected, id=f"{name}:{index + 1}")
    for name, rows in EXPECTED.items()
    for index, expected in enumerate(rows)
]


@pytest.mark.parametrize(("name", "index", "expected"), ROWS)
def test_a_row_trains_as_the_messages_by_hand(
    tmp_path: Path, name: str, index: int, expected: Expected
) -> None:
    write_pictures(tmp_path)
    source = open_source(
        SourceConfig(path=str(FIXTURES / name)),
        DATA,
        tokenizer=tiny_tokenizer(),
        cache_dir=tmp_path / "cache",
        seed=0,
        default_system=0.0,
    )
    assert len(source) == len(EXPECTED[name])
    sample = source.read(index)
    prepared = prepare(sample, tmp_path)
    assert learned(prepared) == list(expected.learned)
    assert sample.unused == expected.unused  # type: ignore[union-attr]
    if not expected.messages:
        assert prepared.input_ids == tiny_tokenizer().encode_text("The sky is blue.") + [
            tiny_tokenizer().token_to_id("<|endoftext|>")
        ]
        return
    by_hand = parse_row({"messages": expected.messages, "tools": expected.tools}, "by hand")
    reference = prepare(by_hand, tmp_path)
    assert prepared.input_ids == reference.input_ids
    assert prepared.grids == reference.grids
    assert [i.pair_digests for i in prepared.items] == [i.pair_digests for i in reference.items]


def test_fixtures_are_small_and_all_are_used() -> None:
    files = {path.name: path for path in FIXTURES.iterdir()}
    assert files.keys() == EXPECTED.keys()
    for path in files.values():
        raw = path.read_text(encoding="utf-8")
        assert len(raw) < 2500
        assert json.loads(raw) if path.suffix == ".json" else map(json.loads, raw.splitlines())


def test_the_rows_of_the_page_are_read(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    page = Path(__file__).resolve().parents[3] / "docs" / "guides" / "data-formats.md"
    blocks = re.findall(r"^```text\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    rows = [json.loads(line) for block in blocks for line in block.splitlines()]
    assert len(rows) == 16
    for row in rows:
        sample = parse_row(row, "page")
        assert sample.unused == ()
        assert learned(prepare(sample, tmp_path))
