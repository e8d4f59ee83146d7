"""Runs: batches, resuming from any cut of the file and after a real kill -9, progress, scores."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from qwen2vl.eval.runner.results_file import open_results
from qwen2vl.eval.runner.run import (
    BATCH_SIZE,
    MAX_BATCH_PIXELS,
    SuiteAnswer,
    num_missing,
    run_items,
    score_item,
    split_batches,
)
from tests.eval.runner.toy import NUM_ITEMS, ToyAnswerer, ToySuite, toy_header

SUITE = ToySuite()
ITEMS = SUITE.items(SUITE.parts)

KILLED = """
import sys
from pathlib import Path
from tests.eval.runner.test_run import run_toy
from tests.eval.runner.toy import ToyAnswerer
run_toy(Path(sys.argv[1]), ToyAnswerer(kill_after=2))
"""


def run_toy(path: Path | None, answerer: ToyAnswerer) -> list[tuple[str, int, int]]:
    """Run the whole suite; return the progress."""
    progress: list[tuple[str, int, int]] = []
    with open_results(path, toy_header()) as results:
        run_items(SUITE, ITEMS, answerer, results, on_progress=lambda *p: progress.append(p))
        assert num_missing(ITEMS, results) == 0
    return progress


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a run that was not interrupted."""
    path = tmp_path_factory.mktemp("complete") / "results.jsonl"
    run_toy(path, ToyAnswerer())
    return path.read_bytes()


def test_batches_are_full_and_in_order() -> None:
    answerer = ToyAnswerer()
    progress = run_toy(None, answerer)
    assert [len(batch) for batch in answerer.batches] == [BATCH_SIZE, BATCH_SIZE, 22]
    assert [q for batch in answerer.batches for q in batch] == [item.question for item in ITEMS]
    assert [done for _, done, _ in progress][-1] == NUM_ITEMS == progress[0][2]
    assert all(a[1] <= b[1] for a, b in pairwise(progress))


def test_a_run_that_is_killed_is_continued_to_the_same_file(
    tmp_path: Path, complete: bytes
) -> None:
    path = tmp_path / "results.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=Path(__file__).parents[3])
    assert done.returncode == -9
    written = path.read_bytes()
    assert written.count(b"\n") == 1 + 2 * BATCH_SIZE and complete.startswith(written)
    answerer = ToyAnswerer()
    run_toy(path, answerer)
    assert path.read_bytes() == complete
    assert [len(batch) for batch in answerer.batches] == [22]


def test_a_file_that_was_cut_anywhere_is_continued_to_the_same_file(
    tmp_path: Path, complete: bytes
) -> None:
    path, random = tmp_path / "results.jsonl", Random(3)
    for cut in [0, 1, len(complete) - 1, *(random.randrange(len(complete)) for _ in range(30))]:
        path.write_bytes(complete[:cut])
        run_toy(path, ToyAnswerer())
        assert path.read_bytes() == complete, cut


def test_of_a_batch_that_was_begun_all_questions_are_answered_again(
    tmp_path: Path, complete: bytes
) -> None:
    path, answerer = tmp_path / "results.jsonl", ToyAnswerer()
    path.write_bytes(b"".join(complete.splitlines(keepends=True)[: 1 + BATCH_SIZE + 10]))
    progress = run_toy(path, answerer)
    assert [len(batch) for batch in answerer.batches] == [BATCH_SIZE, 22]
    assert (progress[0][1], progress[-1][1]) == (BATCH_SIZE + 11, NUM_ITEMS)


def test_a_subset_is_extended_without_answering_it_again(tmp_path: Path) -> None:
    path, first, second = tmp_path / "results.jsonl", ToyAnswerer(), ToyAnswerer()
    with open_results(path, toy_header()) as results:
        run_items(SUITE, ITEMS[:BATCH_SIZE], first, results)
    run_toy(path, second)
    assert [len(batch) for batch in second.batches] == [BATCH_SIZE, 22]


def test_scores_of_an_item() -> None:
    word, text = ITEMS[1], ITEMS[5]
    right = score_item(word, SuiteAnswer(text="2.", logprob=-0.123456))
    assert (right.score, right.similar_score, right.similar_chance) == (1, 1, 0.2)
    assert (right.logprob, right.edits, right.part) == (-0.1235, None, "word")
    similar = score_item(word, SuiteAnswer(text="2.0"))
    assert (similar.score, similar.similar_score, similar.logprob) == (0, 1, None)
    read = score_item(text, SuiteAnswer(text="11"))
    assert (read.score, read.edits, read.length, read.truth) == (0, 1, 2, "10")


def test_batches_of_large_pictures_are_smaller() -> None:
    items = ToySuite().items(["word", "text"])
    assert [len(batch) for batch in split_batches(items)] == [64, 64, 22]
    large = [replace(item, num_pixels=MAX_BATCH_PIXELS // 3) for item in items[:7]]
    larger = [replace(item, num_pixels=MAX_BATCH_PIXELS + 1) for item in items[7:9]]
    batches = list(split_batches([*large, *larger, *items[9:12]]))
    assert [len(batch) for batch in batches] == [3, 3, 1, 1, 1, 3]
    assert [item for batch in batches for item in batch] == [*large, *larger, *items[9:12]]
    assert list(split_batches([])) == []
