"""`pack-text`: documents from rows and files; errors name file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2vl.data.sources.packed_text import TokenStore
from qwen2vl.loading import load_processor
from tests.cli.conftest import Run


def test_rows_and_files_become_one_token_store(run: Run) -> None:
    Path("a.txt").write_text("one document\nof two lines")
    Path("b.jsonl").write_text('{"text": "two"}\n\n{"text": "three", "id": 3}\n')
    result = run("pack-text", "a.txt", "b.jsonl", "-o", "store", "--model", "nano")
    assert result.exit_code == 0, result.stderr
    tokenizer = load_processor("nano").tokenizer
    store = TokenStore("store", tokenizer, max_tokens=512)
    assert len(store) == 3
    texts = [tokenizer.decode(store.read(i).ids.tolist(), keep_special="all") for i in range(3)]
    assert texts == [
        "one document\nof two lines<|endoftext|>",
        "two<|endoftext|>",
        "three<|endoftext|>",
    ]
    assert result.stdout.startswith(f"3 documents, {store.lengths().sum()} tokens, ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt: No such file or directory; check the path"),
        ("x.txt", b"caf\xe9", "x.txt is not UTF-8 text (byte 3)"),
        ("x.jsonl", b'{"text": "a"}\n{"text"', "x.jsonl:2 is not JSON"),
        ("x.jsonl", b'{"words": "a"}', 'x.jsonl:1 has no "text"'),
        ("x.jsonl", b"", "there is no text to pack"),
    ],
)
def test_errors_are_one_line(run: Run, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    result = run("pack-text", name, "-o", "store", "--model", "nano")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert message in line
    assert not Path("store").exists()


def test_an_existing_folder_is_not_overwritten(run: Run) -> None:
    Path("a.txt").write_text("words")
    Path("store").mkdir()
    result = run("pack-text", "a.txt", "-o", "store", "--model", "nano")
    assert "store exists; name a new folder" in result.stderr
