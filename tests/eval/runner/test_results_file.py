"""Results files: header, refusal of another run's answers, reading, foreign files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2vl.errors import InputError
from qwen2vl.eval.runner.results_file import ResultsHeader, open_results, read_results
from qwen2vl.eval.task import ExampleResult
from tests.eval.runner.toy import toy_header

RESULT = ExampleResult(
    **{"name": "a/1", "part": "a", "kind": "k", "question": "?", "truth": "\u00e9\n"},
    **{"answer": "x", "score": 0.0, "chance": 0.25, "edits": 1, "length": 2, "logprob": -1.5},
)


def write(path: Path, header: ResultsHeader) -> None:
    with open_results(path, header) as results:
        results.append([RESULT])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write(path, toy_header())
    assert read_results(path) == (toy_header(), {"a/1": RESULT})
    first, second = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert next(iter(first)) == "suite" and list(second)[:2] == ["id", "part"]
    assert "similar_score" not in second


def test_without_a_path_results_are_kept_in_memory(tmp_path: Path) -> None:
    with open_results(None, toy_header()) as results:
        results.append([RESULT])
        results.sync()
    assert results.results == {"a/1": RESULT} and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"suite": "other"}, "suite toy in place of other"),
        ({"digest": "d2"}, "digest d1 in place of d2"),
        ({"blind": True}, "blind False in place of True"),
        ({"model": {"name": "toy", "weights": "v"}}, "model.weights w in place of v"),
        ({"settings": {"max_tokens": 5}}, "settings.max_tokens 4 in place of 5"),
    ],
)
def test_the_file_of_another_run_is_refused_and_kept(
    tmp_path: Path, changes: dict[str, object], difference: str
) -> None:
    path = tmp_path / "results.jsonl"
    write(path, toy_header())
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"has the answers of another run: {difference}; give"):
        write(path, toy_header(**changes))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"notes\n", b'{"custom_id": "1"}\n', b'{"custom', b'{"id": "1"}\n']
)
def test_foreign_files_are_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError):
        write(path, toy_header())
    with pytest.raises(InputError):
        read_results(path)
    assert path.read_bytes() == content


def test_an_incomplete_last_line_is_ignored_when_reading(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write(path, toy_header())
    with path.open("ab") as file:
        file.write(b'{"id": "a/2", "pa')
    assert list(read_results(path)[1]) == ["a/1"]


def test_results_of_unknown_fields_and_absent_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write(path, toy_header())
    with path.open("ab") as file:
        file.write(b'{"id": "a/2"}\n')
    with pytest.raises(InputError, match="line 3 is no result of this version"):
        read_results(path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_results(tmp_path / "none")
