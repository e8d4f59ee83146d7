"""`quantize`: quantized folders, synthetic or given calibration data, and errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import qwen2vl
from qwen2vl.quantization.scheme import describe_quantization
from qwen2vl.synth import Mixture, Spec, sample
from qwen2vl.synth.fonts import FontError, files_of
from tests.cli.conftest import Run


def test_int4_with_synthetic_calibration_data(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    result = run("quantize", tiny_folder, "small", "--num-calibration-samples", 3)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("model: small (")
    assert lines[1] == "decoder: 4 bits, group size 32, calibrated by GPTQ on 3 conversations"
    assert lines[2].startswith("vision tower: 8 bits, one scale per output channel, rounded to n")
    assert lines[3] == "lm_head: stored unquantized, quantized to 8 bits at load time"
    assert lines[4] == "format: compressed-tensors (mixed-precision)"
    assert lines[5].startswith("try:   qwen2vl ask --model small")
    assert re.search(r"has [\d.]+ MB\), written in [\d.]+ s$", lines[0])
    assert "int4/32" in describe_quantization(qwen2vl.LLM(tmp_path / "small").model)
    answer = run("ask", "--model", "small", "Hi", "--max-tokens", 2)
    assert answer.exit_code == 0


def test_int8(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    result = run("quantize", tiny_folder, "-o", "small", "--weight-format", "int8")
    assert result.exit_code == 0
    assert (
        "decoder: 8 bits, one scale per output channel, rounded to nearest (RTN)\n" in result.stdout
    )
    assert "format: compressed-tensors (int-quantized)\n" in result.stdout
    assert "calibrated" not in result.stdout
    assert "int4" not in describe_quantization(qwen2vl.LLM(tmp_path / "small").model)


def test_int4_without_calibration(run: Run, tiny_folder: Path) -> None:
    result = run("quantize", tiny_folder, "small", "--num-calibration-samples", 0)
    assert result.exit_code == 0
    assert "decoder: 4 bits, group size 32, rounded to nearest (RTN)\n" in result.stdout


def test_the_option_quantize_names_the_layers_it_does_not_apply_to(
    run: Run, tiny_folder: Path
) -> None:
    run("quantize", tiny_folder, "small", "--weight-format", "int8")
    result = run("ask", "--model", "small", "--quantize", "int4", "Hi", "--max-tokens", 1)
    assert result.exit_code == 0, result.output
    assert re.search(
        r"quantize 'int4': \d+ layers are stored quantized and stay so; it applies to the other "
        r"\d+ layers",
        result.stderr,
    )


@pytest.mark.parametrize("targets", [[], ["small", "-o", "other"]])
def test_the_folder_to_write_is_given_once(run: Run, tiny_folder: Path, targets: list[str]) -> None:
    result = run("quantize", tiny_folder, *targets)
    assert result.exit_code == 2
    assert "give the folder to write once: as DST or by -o DST" in result.stderr


def test_calibration_data_from_a_file(
    run: Run, tiny_folder: Path, tmp_path: Path, image_file: Path
) -> None:
    turns = [
        {"role": "user", "content": [{"type": "image", "image": str(image_file)}]},
        {"role": "assistant", "content": "noise"},
    ]
    lines = [json.dumps(turns), "", json.dumps({"messages": turns[1:]}), json.dumps(turns)]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines), encoding="utf-8")
    result = run(
        "quantize",
        tiny_folder,
        "small",
        "--calibration-data",
        "asked.jsonl",
        "--num-calibration-samples",
        2,
    )
    assert result.exit_code == 0, result.output
    assert "calibrated by GPTQ on 2 conversations" in result.stdout


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "--calibration-data p.jsonl: cannot be read: No such file or directory"),
        (b"\xff\xfe", "--calibration-data p.jsonl: cannot be read: not UTF-8 text"),
        (b"\n", "--calibration-data p.jsonl: holds no conversation"),
        (b"[]\n{", "--calibration-data p.jsonl, line 1: "),
        (b"\n{oops", "--calibration-data p.jsonl, line 2: not JSON"),
        (b'[{"role": "cook", "content": "Hi"}]', "--calibration-data p.jsonl, line 1: "),
        (b'"Hi"', "--calibration-data p.jsonl, line 1: "),
        (b"7", "--calibration-data p.jsonl, line 1: "),
    ],
)
def test_invalid_calibration_data(
    run: Run, tiny_folder: Path, tmp_path: Path, content: bytes | None, text: str
) -> None:
    if content is not None:
        (tmp_path / "p.jsonl").write_bytes(content)
    result = run("quantize", tiny_folder, "small", "--calibration-data", "p.jsonl")
    assert result.exit_code == 2
    assert text in result.stderr
    assert not (tmp_path / "small").exists()


def test_calibration_data_for_int8_is_an_error(run: Run, tiny_folder: Path) -> None:
    result = run(
        "quantize", tiny_folder, "small", "--weight-format", "int8", "--calibration-data", "p.jsonl"
    )
    assert result.exit_code == 2
    assert "--calibration-data is for int4 only; leave it out for int8" in result.stderr


def test_an_existing_target_is_an_error_before_any_work(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("worked")

    monkeypatch.setattr("qwen2vl.synth.render", fail)
    result = run("quantize", tiny_folder, tiny_folder)
    assert result.exit_code == 2
    assert "exists already and is not an empty folder" in result.stderr


def test_without_fonts_calibration_images_have_text_in_bundled_fonts(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_bundled(name: str) -> tuple[tuple[str, ...], ...]:
        if name != "bundled":
            raise FontError("no fonts")
        return files_of(name)

    monkeypatch.setattr("qwen2vl.synth.world.files_of", find_bundled)
    monkeypatch.setattr("qwen2vl.synth.families.text.files_of", find_bundled)
    mixtures: list[Mixture] = []

    def sample_and_record(seed: int, index: int, mixture: Mixture) -> Spec:
        mixtures.append(mixture)
        return sample(seed, index, mixture)

    monkeypatch.setattr("qwen2vl.synth.sample", sample_and_record)
    result = run("quantize", tiny_folder, "small", "--num-calibration-samples", 4)
    assert result.exit_code == 0, result.output
    assert "calibrating on text in the fonts of this package" in result.stderr
    assert {mixture.fonts for mixture in mixtures} == {"bundled"}
    assert all(mixture.weights["text"] > 0 for mixture in mixtures)
