"""The README's program runs as written and prints what its comment promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_the_program_prints_what_the_readme_promises(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (promised,) = re.findall(r"print\(.*\)  # (.+)", program)
    exec(compile(program, str(README), "exec"), {})  # our own text
    assert capsys.readouterr().out.strip() == promised
