"""The row that a passing test run writes into docs/status.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import status
from tests.status import status_row, write_status

PAGE = "| tests | Python |\n|---|---|\n| fast set, at 459df27 | 3.11.7 |\n| slow set | never |\n"


def fake_git(monkeypatch: pytest.MonkeyPatch, changes: str = "") -> None:
    answers = {"status": changes, "rev-parse": "abc1234"}
    monkeypatch.setattr(status, "_git", lambda command, *_: answers[command])


def test_one_row_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_git(monkeypatch)
    page = tmp_path / "status.md"
    page.write_text(PAGE)
    write_status("fast set", page)
    lines = page.read_text().splitlines(keepends=True)
    assert lines[2] == status_row("fast set", "abc1234")
    assert [*lines[:2], lines[3]] == PAGE.splitlines(keepends=True)[:2] + ["| slow set | never |\n"]


def test_nothing_is_written_with_uncommitted_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_git(monkeypatch, changes=" M README.md")
    page = tmp_path / "status.md"
    page.write_text(PAGE)
    with pytest.raises(SystemExit, match="commit the working tree first"):
        write_status("fast set", page)
    assert page.read_text() == PAGE


def test_an_unknown_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_git(monkeypatch)
    page = tmp_path / "status.md"
    page.write_text(PAGE)
    with pytest.raises(SystemExit, match="0 rows begin with 'gpu set', must be one"):
        write_status("gpu set", page)


def test_the_page_has_the_row_of_make_status() -> None:
    assert sum(line.startswith("| fast set (`make test`)") for line in status.PAGE.open()) == 1
