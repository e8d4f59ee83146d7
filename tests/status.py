"""Writes docs/status.md: at which commit, and with which versions, a set of tests last passed."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch
import transformers

__all__ = ["status_row", "write_status"]

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "status.md"


def write_status(name: str, page: Path = PAGE) -> None:
    """Replace the row of a set of tests by one for the present commit.

    Raises:
        SystemExit: the working tree has uncommitted changes, or the page has no such row.
    """
    if _git("status", "--porcelain", "--untracked-files=no"):
        raise SystemExit("docs/status.md is not written: commit the working tree first")
    lines = page.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [index for index, line in enumerate(lines) if line.startswith(f"| {name}")]
    if len(rows) != 1:
        raise SystemExit(f"{page.name}: {len(rows)} rows begin with {name!r}, must be one")
    lines[rows[0]] = status_row(name, _git("rev-parse", "--short", "HEAD"))
    page.write_text("".join(lines), encoding="utf-8")


def status_row(name: str, commit: str) -> str:
    """Format a row of the table under "Last passed"."""
    machine = f"{platform.system()}, {platform.machine()}"
    versions = (platform.python_version(), torch.__version__, transformers.__version__)
    return f"| {name}, at {commit} | {' | '.join(versions)} | {machine} |\n"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
