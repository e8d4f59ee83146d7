"""The vocabulary: no homemade terms, no old identifiers, and every glossary term can be searched.

`docs/glossary.md` lists the terms of the field that name a feature of this codebase.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Words of an earlier private vocabulary, in prose and in parts of identifiers.
HOMEMADE = """
    room rooms floors house houses shelf shelves rehearse rehearsal rehearsed guesses habit habits
    reception donor donors transplant transplanted tally outlook film films torn mender mended wheel
    wish wishes sprints door doors eyes
""".split()
QUOTATION = "the eyes on a giraffe"  # an example of the Qwen2-VL paper
PHRASES = (
    "next room",
    "back up:",
    "must not know",
    "never knows",
    "small integers",
    "none the wiser",
    "at rest",
    "gives way",
    "by heart",
    "is asked of",
)

# Identifiers that were replaced by the field's; the glossary has the new ones.
OLD_IDENTIFIERS = set(
    """
    Alive Channels Corpus Decode Donor Drafter FileClip Gain GatheredRows Groups HeldOut
    Joined KeptItems Kind KeyChain MANNERS Measurer MemoryOrder NarrowLinear News Outcome
    Outline Outlook PackedLinear PackedRows Page PhaseClock Preparer ProbeConfig Ranks Reception
    RecomputeConfig RowLinear RowsFolder Rule Runner Share Slices Stop Tally TextDonor
    VisionCache VisionDonor VisionShelf Wish Words at_work attend_packed choose colour
    compile_direct compile_widening dequantised dialects direct drawn_weights fall forced
    gives_way grid_of hears heard is_torn join_turns laid_out leg lend manners mend mender
    narrow_linear normalise num_drafts objective one_token opaque orders outlook packs phases
    preview probe put_layers quantise rehearse round_by_examples round_by_squares says
    seen_through served share_out shortlist sinks small_integers stored_kind stored_layer
    taken_apart tells torn transplant unheard viewers vision_rows widen
    """.split()
)

ROW = re.compile(r"^\| ([^|]+?) \| [^|]+ \| `(qwen2vl[\w.]*)` \|$", re.MULTILINE)


def sources(*folders: str) -> list[Path]:
    """List the Python files of some folders, this test aside."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if path != Path(__file__)]


def pages() -> list[Path]:
    """List the Markdown pages that are prose, the append-only results aside."""
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "dev").glob("*.md")]
    return [*sorted(ROOT.glob("*.md")), *sorted(pages)]


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield what a file says, with line numbers: names split into words, comments, strings."""
    if path.suffix == ".md":
        yield from enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], words_of(token.string)
        elif token.type in (tokenize.COMMENT, tokenize.STRING):
            yield token.start[0], token.string


def words_of(identifier: str) -> str:
    """Split snake_case and CamelCase into words."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", identifier).replace("_", " ")


def homemade_terms(path: Path) -> list[str]:
    """Return the places where a file uses a homemade term."""
    pattern = re.compile(rf"\b({'|'.join(HOMEMADE)})\b|{'|'.join(PHRASES)}", re.IGNORECASE)
    return [
        f"{path.relative_to(ROOT)}:{number}: {found[0]}"
        for number, text in prose_of(path)
        for found in pattern.finditer(text.replace(QUOTATION, ""))
    ]


@pytest.mark.parametrize(
    "files",
    [sources("qwen2vl"), sources("tests"), sources("benchmarks", "dev", "examples"), pages()],
    ids=["qwen2vl", "tests", "benchmarks", "pages"],
)
def test_no_homemade_terms(files: list[Path]) -> None:
    found = [place for path in files for place in homemade_terms(path)]
    assert not found, "use the field's term; docs/glossary.md"


def test_homemade_terms_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text('"""Next room."""\nvision_shelf = 1  # of guesses\nx.house = DonorKind\n')
    assert [place.rpartition(": ")[2] for place in homemade_terms(path)] == [
        "Next room",
        "shelf",
        "guesses",
        "house",
        "Donor",
    ]


def defined_names(tree: ast.Module) -> set[str]:
    """Collect the names of classes, functions, parameters and assigned variables."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def test_old_identifiers_are_gone() -> None:
    found = {
        str(path.relative_to(ROOT)): names
        for path in sources("qwen2vl")
        if (names := OLD_IDENTIFIERS & defined_names(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert not found


def glossary() -> list[tuple[str, str]]:
    """Read the rows of docs/glossary.md: term, and where it is implemented."""
    return ROW.findall((ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"))


def test_the_glossary_has_rows() -> None:
    assert len(glossary()) > 40


@pytest.mark.parametrize(("term", "where"), glossary(), ids=[term for term, _ in glossary()])
def test_a_docstring_of_the_module_contains_the_term(term: str, where: str) -> None:
    found = resolve_name(where)
    module = found if isinstance(found, ModuleType) else resolve_name(found.__module__)
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, holders)]
    plain = re.sub(r"[\s-]+", " ", " ".join(texts)).lower()
    assert re.sub(r"[\s-]+", " ", term).lower() in plain
