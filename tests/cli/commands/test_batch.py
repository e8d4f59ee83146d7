"""`batch`: errors of its command line; what it answers is tested in tests/cli/batch."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from tests.cli.batch.requests import write_requests
from tests.cli.conftest import Run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.jsonl"], "Missing option '-o'"),
        (["-o", "out.jsonl"], "REQUESTS: got none, must be one file"),
        (["in.jsonl", "-i", "in.jsonl", "-o", "out.jsonl"], "got 'in.jsonl', 'in.jsonl', must be"),
        (["none.jsonl", "-o", "out.jsonl"], "-i none.jsonl: does not exist"),
        (
            ["-", "-o", "out.jsonl"],
            "-i -: a batch that is resumed reads its files again, and cannot",
        ),
        (["-i", "-", "-o", "out.jsonl"], "cannot read stdin again; give a file, such as requests."),
        (["in.jsonl", "-o", "-"], "-o -: a batch that is resumed reads its files again"),
        (["in.jsonl", "-o", "folder"], "-o folder: is a folder; give a file"),
        (["in.jsonl.gz", "-o", "out.jsonl"], "-i in.jsonl.gz: is gzip, but requests are one JSON"),
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
    path = write_requests(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "folder").mkdir()
    result = run("batch", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out.jsonl").exists()
