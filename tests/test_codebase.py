"""Rules of the codebase that a test can check; docs/architecture.md gives the reasons.

Import layers, module docstrings and `__all__`, names, annotations, sizes of files and folders,
where `print` is allowed, and whether the documents name existing files, commands and figures.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qwen2vl"

# Modules of such names collect unrelated code.
BANNED_NAMES = {"utils", "util", "common", "base", "misc", "helpers", "core"}
MAX_LINES = 400
MAX_MODULES = 12  # in a folder, besides __init__.py
MAX_DEPTH = 3  # qwen2vl/package/subpackage/module.py
UNLIMITED = {"cli/commands", "recipes"}  # one file a command, one file a recipe

# A measured figure in the README is a number with one of these units; it cites its line of
# benchmarks/results.md, as in "2.1 % [r3]".
UNITS = r"%|ms|s|min|minutes|seconds|hours|MB|GB|M|tokens/s"
FIGURE = re.compile(rf"(?<![\w.])(\d[\d,]*(?:\.\d+)?) ?({UNITS})(?![\w/])(?: \[(r\d+)\])?")
RESULT = re.compile(r"^- \*\*(r\d+)\*\* `(\{.*\})`$", re.MULTILINE)
RESULT_KEYS = {"date", "commit", "machine", "command", "numbers"}

# Absolute paths of somebody's machine; example paths in the documents are relative.
MACHINE_PATH = re.compile(r"(?<![\w.~-])(?:/(?:work|root|home|Users)/\w|[A-Z]:\\\\?Users)")


def modules() -> list[Path]:
    """List the source files of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def scripts() -> list[Path]:
    """List the runnable files beside the package."""
    return [
        path for name in ("examples", "benchmarks", "dev") for path in (ROOT / name).glob("*.py")
    ]


def documents() -> list[Path]:
    """List the Markdown pages."""
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "dev").glob("*.md")]
    return [*sorted(ROOT.glob("*.md")), *sorted(pages)]


@cache
def tree(path: Path) -> ast.Module:
    """Parse one source file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(path: Path, node: ast.stmt | ast.expr | None = None) -> str:
    """Name a file, or a line in it, for a failure's text."""
    shown = str(path.relative_to(ROOT))
    return shown if node is None else f"{shown}:{node.lineno}"


def body_without_docstring(path: Path) -> list[ast.stmt]:
    """Return a module's statements without its docstring and `__future__` imports."""
    body = tree(path).body[1:] if ast.get_docstring(tree(path)) else tree(path).body
    return [
        node
        for node in body
        if not (isinstance(node, ast.ImportFrom) and node.module == "__future__")
    ]


def exported(path: Path) -> list[str] | None:
    """Read a module's `__all__`, or None when it has none."""
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


# Layers ---------------------------------------------------------------------------------------


def test_imports_follow_the_layers() -> None:
    # In a process of its own: import-linter disables every logger it does not know.
    code = "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 broken" in done.stdout


def test_every_package_is_in_a_layer() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    placed = set(re.findall(r"qwen2vl\.(\w+)", " ".join(layers)))
    packages = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()}
    assert packages - {"__init__", "__main__"} <= placed


@pytest.mark.parametrize("module", ["errors", "files", "grounding", "config", "fetch"])
def test_the_lowest_layers_import_the_standard_library_only(module: str) -> None:
    third_party = loaded_by(f"qwen2vl.{module}") - sys.stdlib_module_names - {"qwen2vl"}
    assert not third_party


def test_importing_the_package_is_cheap() -> None:
    assert not loaded_by("qwen2vl") & {"torch", "numpy", "PIL", "av", "tokenizers", "transformers"}


def loaded_by(module: str) -> set[str]:
    """Import a module in a fresh interpreter; return the top-level modules this brought in."""
    code = (
        "import sys; before = set(sys.modules); import importlib; "
        f"importlib.import_module({module!r}); print(*(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


# Docstrings and exports -----------------------------------------------------------------------


def test_every_module_has_a_docstring() -> None:
    wrong = [
        f"{place(path)}: {len(lines)} lines"
        for path in modules()
        if not 3 <= len(lines := (ast.get_docstring(tree(path)) or "").splitlines()) <= 12
    ]
    assert not wrong, "module docstrings are 3 to 12 lines long"


def test_every_module_lists_its_public_names() -> None:
    missing = [
        place(path)
        for path in modules()
        if body_without_docstring(path) and exported(path) is None and path.stem != "__main__"
    ]
    assert not missing, "these modules have no __all__"


def test_public_names_exist_and_are_sorted() -> None:
    wrong = [
        f"{place(path)}: {problem}"
        for path in modules()
        for problem in problems_of_all(path, exported(path) or [])
    ]
    assert not wrong


def problems_of_all(path: Path, names: list[str]) -> Iterator[str]:
    """Compare a module's `__all__` with what it defines."""
    if names != sorted(names, key=ruff_order):
        yield "__all__ is not sorted"
    if len(names) != len(set(names)):
        yield "__all__ repeats a name"
    if names:
        module = import_module(dotted(path))
        yield from (f"{name} is not in the module" for name in names if not hasattr(module, name))


def dotted(path: Path) -> str:
    """Name a module as `import` does."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def ruff_order(name: str) -> tuple[int, str]:
    """Sort as ruff's RUF022 does: CONSTANTS, then Classes, then functions."""
    if name.isupper() and len(name) > 1:
        return 0, name
    return (1 if name[0].isupper() else 2), name


def test_modules_import_only_exported_names() -> None:
    names = {dotted(path): exported(path) or [] for path in modules()}
    wrong = [
        f"{place(path, node)}: {alias.name} of {node.module}"
        for path in modules()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.module in names
        for alias in node.names
        if alias.name not in names[node.module] and f"{node.module}.{alias.name}" not in names
    ]
    assert not wrong, "add the name to __all__ of its module, or do not import it"


# Types, names, sizes ----------------------------------------------------------------------------


def test_every_function_is_annotated() -> None:
    wrong = [
        f"{place(path, node)}: {node.name}: {what}"
        for path in [*modules(), *scripts(), *sorted((ROOT / "tests").rglob("*.py"))]
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for what in unannotated(node)
    ]
    assert not wrong


def unannotated(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yield the parts of a signature that lack an annotation."""
    if node.returns is None:
        yield "return type"
    arguments = [*node.args.posonlyargs, *node.args.args]
    if arguments and arguments[0].arg in ("self", "cls"):
        arguments = arguments[1:]
    extra = [star for star in (node.args.vararg, node.args.kwarg) if star is not None]
    for argument in [*arguments, *node.args.kwonlyargs, *extra]:
        if argument.annotation is None:
            yield argument.arg


def test_no_module_has_a_generic_name() -> None:
    parts = {part for path in modules() for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert not {part.strip("_") for part in parts} & BANNED_NAMES


def test_packages_are_at_most_three_deep() -> None:
    deep = [place(path) for path in modules() if len(path.relative_to(PACKAGE).parts) > MAX_DEPTH]
    assert not deep


def test_no_folder_holds_too_many_modules() -> None:
    folders = Counter(
        str(path.relative_to(PACKAGE).parent) for path in modules() if path.stem != "__init__"
    )
    long = {f: n for f, n in folders.items() if n > MAX_MODULES and f not in UNLIMITED}
    assert not long, f"at most {MAX_MODULES} modules in a folder"


def test_every_file_is_short() -> None:
    long = [
        f"{place(path)}: {count} lines"
        for path in [*modules(), *scripts()]
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    ]
    assert not long, f"the limit is {MAX_LINES} lines"


def test_examples_are_short() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 40, place(path)


def test_only_the_cli_prints() -> None:
    wrong = [
        place(path, node)
        for path in modules()
        if path.relative_to(PACKAGE).parts[0] != "cli"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert not wrong


def test_no_path_of_a_machine_is_written_down() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wrong = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        data = path.read_bytes() if path.is_file() else b""
        if b"\0" not in data:
            lines = data.decode("utf-8").splitlines()
            wrong += [f"{name}:{i}" for i, x in enumerate(lines, 1) if MACHINE_PATH.search(x)]
    assert not wrong


def test_ci_installs_every_font_package() -> None:
    from qwen2vl.synth.fonts import JUDGE_PACKAGES, TRAINING_PACKAGES

    listed = (ROOT / ".ci" / "run").read_text(encoding="utf-8").split()
    assert {*TRAINING_PACKAGES, *JUDGE_PACKAGES} <= set(listed)


# Documents --------------------------------------------------------------------------------------


def code_of(page: str) -> str:
    """Return what a page shows as code: fenced blocks and spans, one a line."""
    fences = re.findall(r"^```.*?\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*fences, *re.findall(r"`([^`\n]+)`", prose)])


@pytest.mark.parametrize("page", documents(), ids=place)
def test_documents_name_only_commands_that_exist(page: Path) -> None:
    code = code_of(page.read_text(encoding="utf-8"))
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    unknown = set(re.findall(r"^\s*\$? ?make ([a-z]+)", code, re.M)) - set(targets)
    assert not unknown, "no such make targets"
    used = set(re.findall(r"^\s*\$? ?qwen2vl ([a-z][a-z-]*)", code, re.M))
    assert used <= cli_commands(), "no such qwen2vl commands"


def cli_commands() -> set[str]:
    """List the subcommands of `qwen2vl` that can be called."""
    from qwen2vl.cli.main import COMMANDS

    return {
        name
        for name in COMMANDS
        if (PACKAGE / "cli" / "commands" / f"{name.replace('-', '_')}.py").exists()
    }


@pytest.mark.parametrize("page", documents(), ids=place)
def test_documents_name_only_objects_that_exist(page: Path) -> None:
    code = code_of(page.read_text(encoding="utf-8"))
    named = re.findall(r"^qwen2vl(?:\.\w+)+$", code, re.MULTILINE)
    assert not [name for name in named if not resolves(name)]


def resolves(name: str) -> bool:
    """Return whether a dotted name resolves to a module or to an attribute of one."""
    try:
        resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", documents(), ids=place)
def test_documents_name_only_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    code = code_of(text)
    named = re.findall(r"(?<![\w./*-])(?:[\w.-]+/)*[\w-]+\.(?:py|md|toml|txt)\b", code)
    named += re.findall(r"^(?:[\w.-]+/)+$", code, re.MULTILINE)
    shown = set(re.findall(r"^```toml\n# (\S+)$", text, re.MULTILINE))  # files that a page has
    missing += [
        name
        for name in named
        if name not in shown
        and not any((root / name).exists() for root in (ROOT, PACKAGE, page.parent))
    ]
    assert not missing


def results() -> dict[str, dict[str, object]]:
    """Read benchmarks/results.md: id -> one run."""
    text = (ROOT / "benchmarks" / "results.md").read_text(encoding="utf-8")
    return {name: json.loads(line) for name, line in RESULT.findall(text)}


def test_results_are_numbered_and_complete() -> None:
    runs = results()
    assert list(runs) == [f"r{i + 1}" for i in range(len(runs))]
    for name, run in runs.items():
        assert run.keys() >= RESULT_KEYS, name


@pytest.mark.parametrize("page", documents(), ids=place)
def test_figures_equal_the_result_they_cite(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    wrong = list(figure_problems(prose, results(), must_cite=page.name == "README.md"))
    assert not wrong


def figure_problems(
    prose: str, runs: dict[str, dict[str, object]], *, must_cite: bool
) -> Iterator[str]:
    """Yield every figure that cites no run, or differs from the run that it cites."""
    for figure in FIGURE.finditer(prose):
        value, _, cited = figure.groups()
        if cited is None:
            if must_cite:
                yield f"{figure[0]}: cites no line of benchmarks/results.md"
        elif cited not in runs:
            yield f"{figure[0]}: there is no such line"
        elif float(value.replace(",", "")) not in leaves(runs[cited]["numbers"]):
            yield f"{figure[0]}: the line holds {runs[cited]['numbers']}"
    cited_names = set(re.findall(r"\[(r\d+)\]", prose))
    yield from (f"[{name}]: there is no such line" for name in sorted(cited_names - runs.keys()))


def leaves(numbers: object) -> set[float]:
    """Collect the numbers of one run at any depth; strings are skipped."""
    if isinstance(numbers, dict):
        return set().union(*map(leaves, numbers.values()))
    if isinstance(numbers, list):
        return set().union(*map(leaves, numbers))
    if isinstance(numbers, str):
        return set()
    assert isinstance(numbers, int | float)
    return {float(numbers)}


@pytest.mark.parametrize(
    ("prose", "complaint"),
    [
        ("12.5 ms [r1]", None),
        ("1,200 tokens/s [r1]", None),
        ("| 12.5 ms [r1] |", None),
        ("Python 3.11, torch 2.11, 2 cores", None),
        ("12.6 ms [r1]", "the line holds"),
        ("12.5 ms", "cites no line"),
        ("12.5 ms [r2]", "no such line"),
        ("as measured [r7]", "no such line"),
    ],
)
def test_figure_problems(prose: str, complaint: str | None) -> None:
    runs: dict[str, dict[str, object]] = {"r1": {"numbers": {"a": 12.5, "b": {"c": 1200}}}}
    problems = list(figure_problems(prose, runs, must_cite=True))
    assert (complaint is None) == (not problems)
    assert complaint is None or complaint in problems[0]
