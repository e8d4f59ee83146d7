"""answer_images: one question about each image, resuming, errors, grammars and adapters."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen2vl.engine import LLM
from tests.cli.batch.requests import records
from tests.cli.conftest import Run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write three images, one in a subfolder, and a file that is none."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("2.png", "10.jpg", "sub/1.webp")):
        Image.new("RGB", (56 + 28 * number, 56), "red").save(folder / name)
    (folder / "bad.png").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_question_about_each_image(run: Run, tmp_path: Path, images: Path) -> None:
    arguments = ("--images", "images", "What is it?", "--temperature", 0, "--max-tokens", 8)
    result = run("batch", *arguments, "-o", "out.jsonl")
    assert result.exit_code == 1
    assert "3 images answered, 1 failed, in" in result.stderr
    found = {one["image"]: one for one in records(tmp_path / "out.jsonl")}
    bad = found.pop("images/bad.png")
    assert bad["answer"] is bad["finish_reason"] is None
    assert "bad.png is text/plain, not a supported image" in bad["error"]
    with LLM("nano", device="cpu", dtype="float32") as llm:
        for name, one in found.items():
            assert set(one) == {"image", "answer", "finish_reason", "error", "id"}
            content = [{"image": str(tmp_path / name)}, {"text": "What is it?"}]
            (expected,) = llm.chat(
                [{"role": "user", "content": content}], temperature=0, max_tokens=8
            )
            assert (one["answer"], one["error"]) == (expected.text, None)
    assert set(found) == {"images/2.png", "images/10.jpg", "images/sub/1.webp"}
    again = run("batch", *arguments, "-o", "out.jsonl")
    assert again.exit_code == 1
    assert "0 images answered, 0 failed, 4 already done (1 failed)" in again.stderr


def test_a_csv_that_was_cut_is_continued(run: Run, tmp_path: Path, images: Path) -> None:
    arguments = ("--images", "images/**/*", "--boxes", "Find, the\nred square.", "--max-tokens", 64)
    assert run("batch", *arguments, "-o", "whole.csv").exit_code == 1  # notes.txt, bad.png
    whole = (tmp_path / "whole.csv").read_bytes()

    def rows(name: str) -> list[dict[str, str]]:
        with (tmp_path / name).open(newline="") as file:
            return sorted(csv.DictReader(file), key=lambda row: row["image"])

    expected = rows("whole.csv")
    assert list(expected[0]) == ["image", "answer", "finish_reason", "error", "boxes", "id"]
    assert [row["image"] for row in expected] == [
        *("images/10.jpg", "images/2.png", "images/bad.png", "images/notes.txt"),
        "images/sub/1.webp",
    ]
    shape = json.loads(expected[0]["boxes"])[0]
    assert set(shape) == {"phrase", "pixels"} and len(shape["pixels"]) == 2
    rng = random.Random(3)
    for size in (5, *(rng.randrange(len(whole)) for _ in range(3))):
        (tmp_path / "cut.csv").write_bytes(whole[:size])
        assert run("batch", *arguments, "-o", "cut.csv").exit_code == 1
        assert rows("cut.csv") == expected, size


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_failed_images_are_repeated_by_an_option(
    run: Run, tmp_path: Path, images: Path, name: str
) -> None:
    arguments = ("batch", "--images", "images", "What?", "--max-tokens", 4, "-o", name)
    assert run(*arguments).exit_code == 1
    Image.new("RGB", (56, 56), "red").save(images / "bad.png")
    again = run(*arguments)
    assert "0 images answered, 0 failed, 4 already done (1 failed)" in again.stderr
    again = run(*arguments, "--retry-failed")
    assert again.exit_code == 0
    assert "1 image answered, 0 failed, 3 already done, " in again.stderr
    assert (tmp_path / name).read_text().count("images/bad.png") == 1


def test_any_failure_of_an_image_is_its_answer(
    run: Run, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LLM.prepare

    def prepare(llm: LLM, messages: Any, *arguments: Any, **options: Any) -> Any:
        if "10.jpg" in str(messages):
            raise ZeroDivisionError("secret")
        return real(llm, messages, *arguments, **options)

    monkeypatch.setattr(LLM, "prepare", prepare)
    result = run("batch", "--images", "images", "What?", "--max-tokens", 4, "-o", "out.jsonl")
    assert result.exit_code == 1
    assert "2 images answered, 2 failed, in" in result.stderr
    found = {one["image"]: one["error"] for one in records(tmp_path / "out.jsonl")}
    assert found["images/10.jpg"] == "internal error: ZeroDivisionError"


def test_answers_to_another_question_are_refused(run: Run, images: Path) -> None:
    arguments = ("batch", "--images", images / "2.png", "-o", "out.jsonl", "--max-tokens", 4)
    assert run(*arguments, "What is it?").exit_code == 0
    for other, text in (
        (["What?"], "answers another question about"),
        (["What is it?", "--system", "x"], "line 1 of the output was written without --system"),
        (["What is it?", "--seed", 1], "line 1 of the output was written without --seed"),
    ):
        result = run(*arguments, *other)
        assert result.exit_code == 2
        assert text in result.stderr
    other_image = ("batch", "--images", images / "10.jpg", "What?", "-o", "out.jsonl")
    assert "answers another question about" in run(*other_image, "--max-tokens", 4).stderr
    # Other images are added.
    result = run(*arguments, images / "10.jpg", "What is it?")
    assert "1 image answered, 0 failed, 1 already done" in result.stderr


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_answers_with_other_columns_are_refused(
    run: Run, tmp_path: Path, images: Path, tiny_folder: Path, tiny_adapter: Path, name: str
) -> None:
    common = ("batch", "--images", images / "2.png", "What?", "--model", tiny_folder)
    common += ("--max-tokens", 4, "-o", name)
    adapter = ("--adapter", f"a={tiny_adapter}")
    for first, second, text in (
        (adapter, (), "has the key adapter"),
        ((), adapter, "lacks the key adapter"),
        ((), ("--boxes",), "lacks the key boxes"),
    ):
        (tmp_path / name).unlink(missing_ok=True)
        assert run(*common, *first).exit_code == 0
        before = (tmp_path / name).read_bytes()
        result = run(*common, *second)
        assert result.exit_code == 2
        assert (text if name == "out.jsonl" else "its first line is not") in result.stderr
        assert (tmp_path / name).read_bytes() == before


def test_images_of_other_formats_are_reported(run: Run, images: Path) -> None:
    for name in ("a.HEIC", "sub/b.svg", ".hidden.heic", "notes.md"):
        (images / name).write_text("")
    result = run("batch", "--images", images, "What?", "--max-tokens", 4, "-o", "out.jsonl")
    text = f"2 images are skipped, as the format is not supported: {images}/a.HEIC, {images}/sub/b"
    assert text in " ".join(result.stderr.split())
    assert "hidden" not in result.stderr and "notes" not in result.stderr


def test_grammars_and_adapters(
    run: Run, tmp_path: Path, images: Path, tiny_folder: Path, tiny_adapter: Path
) -> None:
    pytest.importorskip("llguidance")
    result = run(
        *("batch", "--images", images / "2.png", "Is it red?", "--choice", "yes"),
        *("--choice", "no", "-o", "out.jsonl", "--model", tiny_folder),
        *("--adapter", f"a={tiny_adapter}", "--adapter", f"b={tiny_adapter}"),
    )
    assert result.exit_code == 0, result.stderr
    found = records(tmp_path / "out.jsonl")
    assert {one["answer"] for one in found} <= {"yes", "no"}
    assert sorted(one["adapter"] for one in found) == ["a", "b"]
