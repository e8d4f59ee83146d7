"""`batch`: requests and images, resuming after kill -9 at any moment, errors of the options."""

from __future__ import annotations

import csv
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen2vl.cli import options
from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.processor.media_worker.pool import MediaWorkerPool
from qwen2vl.processor.media_worker.worker_process import WorkerLimits
from tests.adapters import TEXT, write_adapter
from tests.cli.conftest import Run

CHAT = "/v1/chat/completions"
WORDS = ("apple", "river", "stone", "cloud", "seven", "music")


def questions(count: int) -> list[str]:
    return [f"What is {WORDS[i % len(WORDS)]}{i} backwards?" for i in range(count)]


def write_requests(path: Path, texts: list[str], **fields: Any) -> Path:
    """Write a request for each text; its custom id is the text."""
    with path.open("w") as file:
        for text in texts:
            messages = [{"role": "user", "content": text}]
            body = {"messages": messages, "temperature": 0, "max_tokens": 12, **fields}
            line = {"custom_id": text, "method": "POST", "url": CHAT, "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(one) for one in path.read_text().splitlines()]


def contents(path: Path) -> dict[str, str]:
    """Return custom id -> answer; every id once."""
    found = records(path)
    by_id = {
        one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"]
        for one in found
    }
    assert len(by_id) == len(found)
    return by_id


def chat(texts: list[str]) -> dict[str, str]:
    """Return text -> answer of LLM.chat."""
    params = SamplingParams(temperature=0, max_tokens=12, skip_grounding_tokens=True)
    with LLM("nano", device="cpu", dtype="float32") as llm:
        found = llm.chat([[{"role": "user", "content": one}] for one in texts], params)
    return {text: one.text for text, one in zip(texts, found, strict=True)}


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load in float32, so that answers do not depend on what else runs."""
    real = options.load_model_from_options

    def load(given: dict[str, Any], **arguments: Any) -> Any:
        return real({**given, "dtype": "float32"}, **arguments)

    monkeypatch.setattr(options, "load_model_from_options", load)


# Requests ---------------------------------------------------------------------------------------


def test_requests_are_answered_as_by_llm_chat(run: Run, tmp_path: Path) -> None:
    texts = questions(20)
    write_requests(tmp_path / "in.jsonl", texts)
    result = run("batch", "in.jsonl", "-o", "out.jsonl")
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "out.jsonl") == chat(texts)
    assert "qwen2vl: 20 requests answered, 0 failed, in " in result.stderr
    assert result.stderr.strip().endswith(" output tokens/s): out.jsonl")
    assert result.stdout == ""
    again = run("batch", "-i", "in.jsonl", "--output-file", "out.jsonl")
    assert again.exit_code == 0
    assert "0 requests answered, 0 failed, 20 already done, in 0.0 s" in again.stderr
    assert len(records(tmp_path / "out.jsonl")) == 20


def test_bad_lines_are_reported_and_skipped(run: Run, tmp_path: Path) -> None:
    path = write_requests(tmp_path / "in.jsonl", ["a", "b"])
    path.write_text("no JSON\n" + path.read_text() + "{}\n" + path.read_text())
    for done, failed in (("", 4), (", 6 already done (4 failed)", 0)):
        result = run("batch", path, "-o", "out.jsonl")
        assert result.exit_code == 1
        assert f"{2 if not done else 0} requests answered, {failed} failed{done}" in result.stderr
    found = records(tmp_path / "out.jsonl")
    assert len(found) == 6
    failures = [one for one in found if one["error"]]
    assert sorted(str(one["custom_id"]) for one in failures) == ["None", "None", "a", "b"]
    # What is deleted from the output is answered again.
    good = [json.dumps(one) + "\n" for one in found if not one["error"]]
    (tmp_path / "out.jsonl").write_text("".join(good))
    assert (
        "0 requests answered, 4 failed, 2 already done"
        in run("batch", path, "-o", "out.jsonl").stderr
    )


def test_failed_requests_are_repeated_by_an_option(run: Run, tmp_path: Path) -> None:
    path = write_requests(tmp_path / "in.jsonl", ["a", "b", "c"])
    run("batch", path, "-o", "out.jsonl")
    output = tmp_path / "out.jsonl"
    good = records(output)
    failed = [{**one, "error": {"code": "media_timeout"}} for one in good[:2]]
    output.write_text("".join(json.dumps(one) + "\n" for one in [*failed, good[2]]))
    before = output.read_bytes()
    assert run("batch", path, "-o", "out.jsonl").exit_code == 1
    # Answers to another input are not removed.
    write_requests(tmp_path / "other.jsonl", ["a", "b", "C"])
    result = run("batch", "other.jsonl", "-o", "out.jsonl", "--retry-failed")
    assert "line 3 is not the one that the output has an answer to" in result.stderr
    assert output.read_bytes() == before
    result = run("batch", path, "-o", "out.jsonl", "--retry-failed")
    assert "2 requests answered, 0 failed, 1 already done, in" in result.stderr
    assert result.exit_code == 0
    assert records(output)[0]["id"] == good[2]["id"]
    assert sorted(one["id"] for one in records(output)) == sorted(one["id"] for one in good)


def test_an_output_of_another_program_is_kept(run: Run, tmp_path: Path) -> None:
    path = write_requests(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "out.jsonl").write_text('{"a": 1}')
    result = run("batch", path, "-o", "out.jsonl")
    assert result.exit_code == 2
    assert "-o out.jsonl: was not written by this command" in result.stderr
    assert (tmp_path / "out.jsonl").read_text() == '{"a": 1}'


def test_an_output_that_was_cut_is_continued(run: Run, tmp_path: Path) -> None:
    texts = questions(12)
    path = write_requests(tmp_path / "in.jsonl", texts)
    run("batch", path, "-o", "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    expected = contents(tmp_path / "whole.jsonl")
    rng = random.Random(7)
    for size in (0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(3))):
        (tmp_path / "cut.jsonl").write_bytes(whole[:size])
        result = run("batch", path, "-o", "cut.jsonl")
        assert result.exit_code == 0, result.stderr
        assert contents(tmp_path / "cut.jsonl") == expected, size


def test_an_output_of_another_input_or_model_is_refused_and_kept(
    run: Run, tmp_path: Path, tiny_folder: Path
) -> None:
    path = write_requests(tmp_path / "in.jsonl", ["a"])
    run("batch", path, "-o", "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    write_requests(tmp_path / "other.jsonl", ["b"])
    for arguments in (
        ["other.jsonl"],
        [path, "--model", tiny_folder],
        [path, "--max-pixels", 9999],
    ):
        result = run("batch", *arguments, "-o", "out.jsonl")
        assert result.exit_code == 2
        assert "line 1 is not the one that the output has an answer to" in result.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before
    result = run("batch", path, "-o", path)
    assert "is the file of the requests; give another one" in result.stderr


def test_adapters_are_models_of_the_requests(
    run: Run, tmp_path: Path, tiny_folder: Path, tiny_adapter: Path
) -> None:
    path = write_requests(tmp_path / "in.jsonl", ["a"], model="mine")
    for option in ("--adapter", "--lora-modules"):
        output = f"{option[2:]}.jsonl"
        arguments = ("--model", tiny_folder, option, f"mine={tiny_adapter}")
        assert run("batch", path, *arguments, "-o", output).exit_code == 0
        assert records(tmp_path / output)[0]["response"]["body"]["model"] == "mine"
    for names in ("a,mine", '["a", "mine"]'):
        (tmp_path / "named.jsonl").unlink(missing_ok=True)
        result = run("batch", path, "--served-model-name", names, "-o", "named.jsonl")
        assert result.exit_code == 0


def test_local_media_are_allowed_by_an_option(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[WorkerLimits] = []
    real = MediaWorkerPool.__init__

    def init(pool: MediaWorkerPool, count: int, given: WorkerLimits) -> None:
        limits.append(given)
        real(pool, count, given)

    monkeypatch.setattr(MediaWorkerPool, "__init__", init)
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    url = {"url": f"file://{tmp_path}/a.png"}
    content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What is it?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
    line = json.dumps({"custom_id": "a", "url": CHAT, "body": body})
    (tmp_path / "in.jsonl").write_text(line)
    result = run("batch", "in.jsonl", "-o", "closed.jsonl")
    assert result.exit_code == 1
    assert records(tmp_path / "closed.jsonl")[0]["error"]["code"] == "media_not_allowed"
    arguments = ("--allowed-local-media-path", tmp_path, "--num-media-workers", 1)
    assert run("batch", "in.jsonl", *arguments, "-o", "open.jsonl").exit_code == 0
    limited = run(
        *("batch", "in.jsonl", *arguments, "--limit-mm-per-prompt", "image=0", "-o", "no.jsonl")
    )
    assert limited.exit_code == 1
    assert records(tmp_path / "no.jsonl")[0]["error"]["code"] == "too_many_media"
    assert len(limits) == 3
    assert min(one.wait_seconds for one in limits) > 86_400, "busy workers are waited for"


# kill -9 ----------------------------------------------------------------------------------------


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a batch, which does not outlive the test."""
    command = [sys.executable, "-m", "qwen2vl", "batch", *arguments, "--dtype", "float32"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_size(process: subprocess.Popen[bytes], path: Path, size: int) -> None:
    """Wait until the output of a batch is larger than a size, or the batch has ended."""
    deadline = time.monotonic() + 60
    while process.poll() is None and not (path.exists() and path.stat().st_size > size):
        assert time.monotonic() < deadline, "the batch writes nothing"
        time.sleep(0.001)


@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_every_line_is_answered_once_after_kill_9(tmp_path: Path, num_kills: int) -> None:
    texts = questions(25 * num_kills)
    write_requests(tmp_path / "in.jsonl", texts)
    output = tmp_path / "out.jsonl"
    rng = random.Random(num_kills)
    num_interrupted = 0
    for _ in range(num_kills):
        before = output.read_bytes() if output.exists() else b""
        with started(tmp_path, "in.jsonl", "-o", "out.jsonl") as process:
            wait_for_size(process, output, len(before))
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            process.wait(60)
        num_interrupted += process.returncode == -signal.SIGKILL
        assert output.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert num_interrupted >= max(1, num_kills // 2)
    assert output.read_bytes().count(b"\n") < len(texts), "the last kill left something to do"
    with started(tmp_path, "in.jsonl", "-o", "out.jsonl") as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert contents(output) == chat(texts)


def test_ctrl_c_keeps_what_is_written(tmp_path: Path) -> None:
    texts = questions(2000)
    write_requests(tmp_path / "in.jsonl", texts)
    output = tmp_path / "out.jsonl"
    with started(tmp_path, "in.jsonl", "-o", "out.jsonl") as process:
        wait_for_size(process, output, 0)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.decode().endswith("qwen2vl: interrupted; the same command continues\n")
    assert 0 < len(records(output)) < 2000
    assert re.search(rf"{len(records(output)):,} requests? answered, 0 failed", error.decode())


# Images -----------------------------------------------------------------------------------------


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
    for other in (["What?"], ["What is it?", "--system", "x"], ["What is it?", "--seed", 1]):
        result = run(*arguments, *other)
        assert result.exit_code == 2
        assert "answers another question about" in result.stderr
    # Other images are added.
    result = run(*arguments, images / "10.jpg", "What is it?")
    assert "1 image answered, 0 failed, 1 already done" in result.stderr


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


@pytest.fixture(scope="session")
def tiny_adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an adapter of the tiny model."""
    from qwen2vl import load

    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    model, _ = load(tiny_folder, dtype="float32")
    write_adapter(folder, model, TEXT)
    return folder


# Errors of the command line ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.jsonl"], "Missing option '-o'"),
        (["-o", "out.jsonl"], "REQUESTS: got none, must be one file"),
        (["in.jsonl", "-i", "in.jsonl", "-o", "out.jsonl"], "got 'in.jsonl', 'in.jsonl', must be"),
        (["none.jsonl", "-o", "out.jsonl"], "-i none.jsonl: does not exist"),
        (["in.jsonl", "-o", "out.csv"], "answers to requests are JSON lines; name it .jsonl"),
        (["in.jsonl", "-o", "none/out.jsonl"], "the folder"),
        (["in.jsonl", "-o", "out.jsonl", "--temperature", 0], "each request has its own"),
        (
            ["in.jsonl", "-o", "out.jsonl", "--limit-mm-per-prompt", "x"],
            "--limit-mm-per-prompt: got",
        ),
        (["in.jsonl", "-o", "out.jsonl", "--lora-modules", "x"], "--lora-modules: got"),
        (
            ["in.jsonl", "-o", "out.jsonl", "--allowed-local-media-path", "none"],
            "--allowed-local-media-path: ",
        ),
        (["in.jsonl", "-o", "out.jsonl", "--allowed-media-domains", "[1]"], "is not a JSON list"),
        (["--images", "a.png", "-o", "out.jsonl"], "QUESTION is missing"),
        (["--images", "a.png", " ", "-o", "out.jsonl"], "QUESTION is missing"),
        (["--images", "a.png", "in.jsonl", "-o", "out.jsonl"], "in.jsonl: is a file, but the last"),
        (["--images", "a.png", "What", "is it?", "-o", "o.jsonl"], "quote the question"),
        (["--images", "a.png", "What?", "-o", "out.txt"], "ends in .jsonl or .csv"),
        (["--images", "a.png", "What?", "-o", "out.csv"], "does not exist; give a folder"),
        (["--images", "*.png", "What?", "-o", "out.csv"], "no file matches this pattern"),
        (["--images", ".", "What?", "-o", "out.csv"], "the folder has no image (.png, .jpg"),
        (
            ["--images", ".", "What?", "-o", "out.csv", "--num-media-workers", 1],
            "--num-media-workers: --images QUESTION has none",
        ),
    ],
)
def test_errors_of_the_command_line(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    write_requests(tmp_path / "in.jsonl", ["a"])
    result = run("batch", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out.jsonl").exists()
