"""`quantize`: a folder that opens without a flag, by drawn or given examples; and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qwen2vl
from qwen2vl.quantization.scheme import describe
from qwen2vl.synth.fonts import FontError
from tests.cli.conftest import Run


def test_int4_by_drawn_examples(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    result = run("quantize", tiny_folder, "small", "--examples", 3)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("model: small (")
    assert lines[1] == (
        "the decoder has 4 bits, a scale for 32 inputs (AWQ); head and vision tower are rounded to "
        "8 bits as they are read"
    )
    assert lines[2] == "calibrated on 3 conversations"
    assert lines[3].startswith("try:   qwen2vl ask --model small")
    assert "int4/32" in describe(qwen2vl.LLM(tmp_path / "small").model)
    answer = run("ask", "--model", "small", "Hi", "--max-tokens", 2)
    assert answer.exit_code == 0


def test_int8(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    result = run("quantize", tiny_folder, "small", "--to", "int8")
    assert result.exit_code == 0
    assert "the decoder has 8 bits, a scale for each output (GPTQ)" in result.stdout
    assert "calibrated" not in result.stdout
    assert "int4" not in describe(qwen2vl.LLM(tmp_path / "small").model)


def test_without_examples(run: Run, tiny_folder: Path) -> None:
    result = run("quantize", tiny_folder, "small", "--examples", 0)
    assert result.exit_code == 0
    assert "not calibrated" in result.stdout


def test_given_conversations(run: Run, tiny_folder: Path, tmp_path: Path, picture: Path) -> None:
    turns = [
        {"role": "user", "content": [{"type": "image", "image": str(picture)}]},
        {"role": "assistant", "content": "noise"},
    ]
    lines = [json.dumps(turns), "", json.dumps({"messages": turns[1:]}), json.dumps(turns)]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines), encoding="utf-8")
    result = run("quantize", tiny_folder, "small", "--prompts", "asked.jsonl", "--examples", 2)
    assert result.exit_code == 0, result.output
    assert "calibrated on 2 conversations" in result.stdout


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "--prompts p.jsonl: cannot be read: No such file or directory"),
        (b"\xff\xfe", "--prompts p.jsonl: cannot be read: not UTF-8 text"),
        (b"\n", "--prompts p.jsonl: holds no conversation"),
        (b"[]\n{", "--prompts p.jsonl, line 1: "),
        (b"\n{oops", "--prompts p.jsonl, line 2: not JSON"),
        (b'[{"role": "cook", "content": "Hi"}]', "--prompts p.jsonl, line 1: "),
        (b'"Hi"', "--prompts p.jsonl, line 1: "),
        (b"7", "--prompts p.jsonl, line 1: "),
    ],
)
def test_conversations_that_cannot_be_used(
    run: Run, tiny_folder: Path, tmp_path: Path, content: bytes | None, text: str
) -> None:
    if content is not None:
        (tmp_path / "p.jsonl").write_bytes(content)
    result = run("quantize", tiny_folder, "small", "--prompts", "p.jsonl")
    assert result.exit_code == 2
    assert text in result.stderr
    assert not (tmp_path / "small").exists()


def test_prompts_for_int8_are_a_mistake(run: Run, tiny_folder: Path) -> None:
    result = run("quantize", tiny_folder, "small", "--to", "int8", "--prompts", "p.jsonl")
    assert result.exit_code == 2
    assert "--prompts calibrates int4 only; leave it out for int8" in result.stderr


def test_a_target_that_is_there_is_named_before_any_work(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("worked")

    monkeypatch.setattr("qwen2vl.synth.render", fail)
    result = run("quantize", tiny_folder, tiny_folder)
    assert result.exit_code == 1
    assert "exists already and is not an empty folder" in result.stderr


def test_without_fonts_the_pictures_have_no_letters(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_: object) -> None:
        raise FontError("no fonts")

    monkeypatch.setattr("qwen2vl.synth.world.check_fonts", none)
    result = run("quantize", tiny_folder, "small", "--examples", 4)
    assert result.exit_code == 0
    assert "calibrating on pictures without letters" in result.stderr
