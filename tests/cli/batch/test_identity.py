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
    return batch_identity(parse(*arguments), batch).digest


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
                *("--dtype float32", "--device cpu", "--compile"),
                *("--quantize int8", "--kv-cache-dtype int8"),
                *("--min-pixels 9999", "--max-pixels 9999"),
                *("--max-tokens 5", "--temperature 0", "--top-k 1", "--top-p 0.5", "--seed 1"),
                "--regex a",
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
        ("", "--limit-mm-per-prompt image=1 --max-model-len 99 --served-model-name x"),
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


def test_the_system_prompt_decides() -> None:
    found = {batch_identity(parse(), batch, system=one).digest for one in (None, "a", "b")}
    assert len(found) == 3


@pytest.mark.parametrize(
    ("now", "before", "text"),
    [
        ("--max-pixels 9999", "", "without --max-pixels"),
        ("--model a/model", "", "without --model"),
        ("", "--dtype float32", "with --dtype float32"),
        ("--dtype bfloat16", "--dtype float32", "with --dtype float32"),
        ("", "--kv-cache-dtype int8", "with --kv-cache-dtype int8"),
        ("", "--compile --quantize int8", "with --quantize int8 and with --compile"),
        ("--seed 1", "--temperature 0 --seed 1", "with --temperature 0"),
        ("--adapter mine=v1 --adapter v2", "--adapter v2", "without --adapter mine"),
        (
            *("--seed 1 --adapter mine=v1", "--seed 2 --adapter mine=v1"),
            "with another value of --seed, --adapter mine, or an option that is not given here",
        ),
        ("", "--max-pixels 9999", "with an option that is not given here, such as --model"),
    ],
)
def test_the_option_that_differs_is_named(now: str, before: str, text: str) -> None:
    here = batch_identity(parse(*now.split()), batch)
    assert here.describe(identity(*before.split())) == text


def test_the_system_prompt_is_named() -> None:
    here = batch_identity(parse(), batch, system="x")
    assert here.describe(batch_identity(parse(), batch).digest) == "without --system"
