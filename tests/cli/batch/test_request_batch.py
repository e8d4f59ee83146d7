"""answer_requests: answers as of LLM.chat, bad lines, retries, adapters, media."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from qwen2vl.processor.media_worker.pool import MediaWorkerPool
from qwen2vl.processor.media_worker.worker_process import WorkerLimits
from tests.cli.batch.requests import CHAT, chat, contents, questions, records, write_requests
from tests.cli.conftest import Run


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
    assert again.stderr == "qwen2vl: 0 requests answered, 0 failed, 20 already done: out.jsonl\n"
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
    assert [one["custom_id"] for one in failures] == [None] * 4
    # Each id has its real answer, although a later line has it again.
    assert {one["custom_id"] for one in found if not one["error"]} == {"a", "b"}
    assert "2 of 4 errors: such as line 5: custom_id: 'a' is also that of" in result.stderr
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
    for arguments, text in (
        (["other.jsonl"], "line 1 is not the one that the output has an answer to"),
        ([path, "--model", tiny_folder], "line 1 of the output was written without --model"),
        ([path, "--max-pixels", 9999], "line 1 of the output was written without --max-pixels"),
    ):
        result = run("batch", *arguments, "-o", "out.jsonl")
        assert result.exit_code == 2
        assert text in result.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before
    result = run("batch", path, "-o", path)
    assert "is the file of the requests; give another one" in result.stderr


def test_a_name_that_was_missing_is_given_to_repeat_what_failed(run: Run, tmp_path: Path) -> None:
    path = write_requests(tmp_path / "in.jsonl", ["a", "b"], model="gpt-4o-mini")
    result = run("batch", path, "-o", "out.jsonl")
    assert "0 requests answered, 2 failed, in" in result.stderr
    assert "output tokens/s" not in result.stderr
    text = "all 2 errors: the model 'gpt-4o-mini' does not exist"
    assert text in result.stderr and "(--retry-failed repeats what failed)" in result.stderr
    arguments = ("--served-model-name", "gpt-4o-mini", "--max-model-len", 4096, "--retry-failed")
    result = run("batch", path, "-o", "out.jsonl", *arguments, "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    assert "2 requests answered, 0 failed, in" in result.stderr
    # And without the name the batch is still the same.
    result = run("batch", path, "-o", "out.jsonl", "--dtype", "float32")
    assert "2 already done" in result.stderr


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
    error = records(tmp_path / "closed.jsonl")[0]["error"]
    assert error["code"] == "media_not_allowed"
    assert "unless --allowed-local-media-path DIR allows their folder" in error["message"]
    assert "server" not in error["message"]
    arguments = ("--allowed-local-media-path", tmp_path, "--num-media-workers", 1)
    assert run("batch", "in.jsonl", *arguments, "-o", "open.jsonl").exit_code == 0
    limited = run(
        *("batch", "in.jsonl", *arguments, "--limit-mm-per-prompt", "image=0", "-o", "no.jsonl")
    )
    assert limited.exit_code == 1
    assert records(tmp_path / "no.jsonl")[0]["error"]["code"] == "too_many_media"
    assert len(limits) == 3
    assert min(one.wait_seconds for one in limits) > 86_400, "busy workers are waited for"
