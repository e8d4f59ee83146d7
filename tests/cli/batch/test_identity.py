"""batch_identity: everything that decides the answers changes it, and nothing else does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import pytest

from qwen2vl.cli.batch.identity import batch_identity
from qwen2vl.cli.commands.batch import batch


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make folders of models and adapters, two of them with equal names; work in their parent."""
    monkeypatch.chdir(tmp_path)
    for name in ("a/model", "b/model", "v1", "v2"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "schema.json").write_text("{}")
    return tmp_path


def parse(*arguments: str) -> dict[str, Any]:
    context = click.Context(batch)
    batch.parse_args(context, ["in.jsonl", "-o", "out.jsonl", *arguments])
    return context.params


def identity(*arguments: str) -> str:
    return batch_identity(parse(*arguments))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("--model a/model", "--model b/model"),
        ("--adapter v1", "--adapter v2"),
        ("--adapter mine=v1", "--adapter mine=v2"),
        ("--adapter mine=v1", "--adapter yours=v1"),
        ("--adapter mine=v1", "--adapter v1"),
        ("--lora-modules mine=v1", "--lora-modules mine=v2"),
        *(
            ("", option)
            for option in (
                *("--served-model-name x", "--dtype float32", "--device cpu", "--compile"),
                *("--quantize int8", "--min-pixels 9999", "--max-pixels 9999"),
                *("--max-model-len 99", "--limit-mm-per-prompt image=1", "--max-tokens 5"),
                *("--temperature 0", "--top-k 1", "--top-p 0.5", "--seed 1", "--regex a"),
                *("--choice a", "--boxes", "--json-schema schema.json"),
            )
        ),
    ],
)
def test_what_decides_the_answers(one: str, other: str) -> None:
    assert identity(*one.split()) != identity(*other.split())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("--model a/model", "--model ./b/../a/model"),
        ("--model a/model", "--model link"),
        ("--lora-modules mine=v1", "--adapter mine=./v1"),
        ("--adapter a=v1 --adapter b=v2", "--adapter b=v2 --adapter a=v1"),
        ("--limit-mm-per-prompt image=1,video=2", '--limit-mm-per-prompt {"video":2,"image":1}'),
        ("--served-model-name a,b", '--served-model-name ["a","b"]'),
        ("", "--max-num-seqs 99 --num-media-workers 9 --retry-failed"),
        ("", "--allowed-local-media-path v1 --allowed-media-domains example.com"),
    ],
)
def test_what_does_not(folder: Path, one: str, other: str) -> None:
    os.symlink(folder / "a" / "model", folder / "link")
    assert identity(*one.split()) == identity(*other.split())


def test_a_schema_is_that_of_its_file(folder: Path) -> None:
    before = identity("--json-schema", "schema.json")
    (folder / "schema.json").write_text('{"type": "object"}')
    assert identity("--json-schema", "schema.json") != before


def test_question_and_system_prompt() -> None:
    given = parse()
    found = {
        batch_identity(given, question=question, system=system)
        for question in ("a", "b")
        for system in (None, "a", "b")
    }
    assert len(found) == 6
