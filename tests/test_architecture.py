"""The tables of docs/architecture.md are held against the code: modules, and the two paths."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qwen2vl"


def rows_of(section: str) -> list[list[str]]:
    """Read the rows of the table in a section of the page, as cells."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    body = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def calls_in(path: str, *names: str) -> set[str]:
    """List the calls in a module, or in a function or method of it: `b.c` of `a.b.c()`."""
    node: ast.AST = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    for name in names:
        (node,) = (n for n in ast.iter_child_nodes(node) if getattr(n, "name", "") == name)
    calls = [ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]
    return {".".join(call.split(".")[-2:]) for call in calls}


def test_the_package_table_has_every_module() -> None:
    expected: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        folder = f"{path.parent.relative_to(PACKAGE)}/" if path.parent != PACKAGE else "qwen2vl/"
        expected.setdefault(folder, set())
        if not path.stem.startswith("__"):
            expected[folder].add(path.stem)
    listed = {row[0].strip("`"): row[1] for row in rows_of("Packages")}
    assert listed.keys() == expected.keys()
    for folder, text in listed.items():
        if not text.startswith("one module a"):
            assert set(re.findall(r"`(\w+)`", text)) == expected[folder], folder


@pytest.mark.parametrize("section", ["A question", "An HTTP request", "A training sample"])
def test_rows_of_a_path_are_numbered_and_name_objects(section: str) -> None:
    rows = rows_of(section)
    assert [row[0] for row in rows] == [str(number) for number in range(1, len(rows) + 1)]
    for _, where, text in rows:
        names = re.findall(r"`(qwen2vl\.[\w.]+)`", where)
        assert names or text.split(" ", 3)[3].startswith("again"), text
        for name in names + re.findall(r"`(qwen2vl\.[\w.]+)`", text):
            resolve_name(name)  # raises if there is no such object


def test_the_path_of_a_question_is_what_the_code_calls() -> None:
    rows = rows_of("A question")
    assert rows[0][1] == "`qwen2vl.cli.commands.ask`"
    named = {name.lower() for name in re.findall(r"`(LLM\.\w+)`", rows[0][2])}
    assert named == {c for c in calls_in("cli/commands/ask.py") if c.startswith("llm.")}
    assert calls_in("engine/llm.py", "LLM", "prepare") >= {"self.processor", "self.validate"}
    numbers = {row[1].strip("`").rpartition(".")[2]: int(row[0]) for row in rows}
    of_step = ["schedule", "execute_model", "update_from_output"]
    assert numbers["step"] < numbers[of_step[0]] < numbers[of_step[1]] < numbers[of_step[2]]
    called = calls_in("engine/engine_core.py", "EngineCore", "step")
    assert {call.rpartition(".")[2] for call in called} >= {*of_step}
    assert "layer_cache.attend" in calls_in("model/text.py")
